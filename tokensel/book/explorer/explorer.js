// The explorers of the book: each <div class="explorer"> holds a dictionary computed beforehand, as JSON, and a still
// figure. This script draws the dictionary with controls and hides the still figure. Without it the figure stays.
(() => {
  "use strict";
  const VEIL = "rgb(96 104 122 / 0.86)";
  const ERROR = "230 159 0";

  // --- small helpers ---------------------------------------------------------------------------------------------

  const element = (tag, attributes = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), attributes);
    node.append(...children);
    return node;
  };

  // A control inside its label, so that a click on either reaches it.
  const labelled = (text, control, ...more) => element("label", {}, element("span", { textContent: text }), control, ...more);

  const select = (pairs) =>
    element("select", {}, ...pairs.map(([value, text]) => element("option", { value, textContent: text })));

  const verdict = (score) =>
    score === null || score === undefined ? "" : score === 1 ? "right" : score === 0 ? "wrong" : `partly right (${score.toFixed(2)})`;

  const loadImage = (view) => {
    const image = element("img", { src: view.image });
    return image.decode().then(() => image);
  };

  const percent = (share) => `${+(100 * share).toFixed(1)} %`;

  // --- kept tokens -----------------------------------------------------------------------------------------------

  // Calls paint(context, x, y, width, height, number) for every cell of a view drawn on `canvas`.
  const drawView = (canvas, image, view, grey, paint) => {
    const scale = Math.max(1, Math.round(384 / image.naturalWidth));
    canvas.width = image.naturalWidth * scale;
    canvas.height = image.naturalHeight * scale;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    if (grey) {
      context.globalCompositeOperation = "saturation";
      context.fillStyle = "gray";
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.globalCompositeOperation = "source-over";
    }
    const width = canvas.width / view.columns;
    const height = canvas.height / view.rows;
    for (let cell = 0; cell < view.rows * view.columns; cell++) {
      context.fillStyle = paint(cell);
      context.fillRect((cell % view.columns) * width, Math.floor(cell / view.columns) * height, width, height);
    }
  };

  const tokens = (box, data) => {
    const names = Object.keys(data.methods);
    const picker = select(data.examples.map((example, number) => [number, example.name]));
    const method = select(names.map((name) => [name, data.methods[name]]));
    const keep = element("input", { type: "range", min: 0, max: data.keeps.length - 1, step: 1 });
    keep.value = Math.floor(data.keeps.length / 2);
    const share = element("output");
    const question = element("p", { className: "explorer-question" });
    const drawings = element("div", { className: "explorer-drawings" });
    const answers = element("tbody");
    const status = element("p", { className: "explorer-status" });
    status.setAttribute("role", "status");
    const columns = ["the model sees", "tokens", "mean error", "answer", ""];
    const head = columns.map((text) => (text ? element("th", { textContent: text, scope: "col" }) : element("td")));
    box.append(
      element(
        "form",
        { className: "explorer-controls", onsubmit: () => false },
        labelled("image", picker),
        labelled("method", method),
        labelled("tokens kept", keep, share),
      ),
      question,
      drawings,
      status,
      element("table", {}, element("thead", {}, element("tr", {}, ...head)), answers),
    );

    const loaded = data.examples.map((example) => Promise.all(example.views.map(loadImage)));

    const row = (name, line) => {
      const error = line.mean_error === undefined ? "" : line.mean_error.toFixed(2);
      const cells = [line.tokens, error, line.answer, verdict(line.score)];
      return element(
        "tr",
        {},
        element("th", { textContent: name, scope: "row" }),
        ...cells.map((text) => element("td", { textContent: text })),
      );
    };

    const show = async () => {
      const example = data.examples[picker.value];
      const number = Number(keep.value);
      const step = example.steps[method.value][number];
      const images = await loaded[picker.value];
      if (step !== data.examples[picker.value].steps[method.value][Number(keep.value)]) return; // the reader has changed a control meanwhile
      share.value = percent(data.keeps[number]);
      keep.setAttribute("aria-valuetext", share.value);
      const right = example.answers.length ? `  (right: ${example.answers.join(" or ")})` : "";
      question.replaceChildren(element("q", { textContent: example.question }), right);
      drawings.replaceChildren();
      for (const part of ["kept", "error"]) {
        example.views.forEach((view, place) => {
          const canvas = element("canvas");
          const letters = step.kept[place];
          drawView(canvas, images[place], view, part === "error", (cell) => {
            if (letters[cell] === "-") return "white";
            if (part === "kept") return letters[cell] === "1" ? "transparent" : VEIL;
            return `rgb(${ERROR} / ${0.85 * Math.min(1, step.error[place][cell] / 100)})`;
          });
          const kept = [...letters].filter((letter) => letter === "1").length;
          const real = [...letters].filter((letter) => letter !== "-").length;
          canvas.setAttribute("role", "img");
          canvas.setAttribute(
            "aria-label",
            part === "kept"
              ? `${example.name}, ${view.name}: ${kept} of ${real} tokens kept by ${data.methods[method.value]}, the others veiled`
              : `${example.name}, ${view.name}: reconstruction error of each token, the more orange the larger`,
          );
          const caption = part === "kept" ? `${view.name}: ${kept} of ${real} kept` : `${view.name}: error`;
          drawings.append(element("figure", {}, canvas, element("figcaption", { textContent: caption })));
        });
      }
      const compared = new Set([method.value, "selector", "random"].filter((name) => names.includes(name)));
      answers.replaceChildren(
        row("all tokens", example.full),
        ...[...compared].map((name) => row(data.methods[name], example.steps[name][number])),
        row("no image", example.none),
      );
      status.textContent = `${step.tokens} of ${example.full.tokens} tokens, mean error ${step.mean_error.toFixed(2)}, answer: ${step.answer}`;
    };
    for (const control of [picker, method, keep]) control.addEventListener("input", show);
    return show();
  };

  // --- an answer during which tokens are dropped ---------------------------------------------------------------------

  // One bar for each step, as high as the share of tokens left; the current step is marked.
  const drawBars = (canvas, steps, total, current) => {
    canvas.width = 640;
    canvas.height = 120;
    const context = canvas.getContext("2d");
    const textColor = getComputedStyle(canvas).color;
    const slot = canvas.width / steps.length;
    const tallest = canvas.height - 8;
    steps.forEach((step, number) => {
      context.fillStyle = number === current ? `rgb(${ERROR})` : textColor;
      context.globalAlpha = number === current ? 1 : 0.45;
      const height = Math.max(2, (tallest * step.tokens) / total);
      context.fillRect(number * slot + 1, canvas.height - height, Math.max(1, slot - 2), height);
    });
  };

  const answer = (box, data) => {
    const picker = select(data.examples.map((example, number) => [number, example.name]));
    const method = select(Object.entries(data.methods));
    const moment = element("input", { type: "range", min: 0, step: 1 });
    const place = element("output");
    const question = element("p", { className: "explorer-question" });
    const text = element("p", { className: "explorer-answer" });
    const drawings = element("div", { className: "explorer-drawings" });
    const bars = element("canvas", { className: "explorer-stairs" });
    bars.setAttribute("role", "img");
    const status = element("p", { className: "explorer-status" });
    status.setAttribute("role", "status");
    box.append(
      element(
        "form",
        { className: "explorer-controls", onsubmit: () => false },
        labelled("image", picker),
        labelled("method", method),
        labelled("token of the answer", moment, place),
      ),
      question,
      text,
      drawings,
      element("figure", {}, bars, element("figcaption", { textContent: "visual tokens left at each token of the answer" })),
      status,
    );
    const loaded = data.examples.map((example) => Promise.all(example.views.map(loadImage)));

    const show = async (restart) => {
      const example = data.examples[picker.value];
      const steps = example.steps[method.value];
      const images = await loaded[picker.value];
      if (example !== data.examples[picker.value] || steps !== example.steps[method.value]) return; // the reader has changed a control meanwhile
      moment.max = steps.length - 1;
      if (restart) moment.value = Math.floor(steps.length / 2);
      const number = Number(moment.value);
      const step = steps[number];
      const before = number ? steps[number - 1].text : "";
      const newest = step.text.startsWith(before) ? step.text.slice(before.length) : "";
      const end = number === steps.length - 1 ? "∎" : "";
      place.value = `${number + 1} of ${steps.length}`;
      moment.setAttribute("aria-valuetext", place.value);
      const right = example.answers.length ? `  (right: ${example.answers.join(" or ")})` : "";
      question.replaceChildren(element("q", { textContent: example.question }), right);
      const earlier = newest ? before : step.text;
      text.replaceChildren("answer so far: ", earlier, element("strong", { textContent: newest }), end);
      drawings.replaceChildren(
        ...example.views.map((view, which) => {
          const canvas = element("canvas");
          const letters = step.kept[which];
          drawView(canvas, images[which], view, false, (cell) =>
            letters[cell] === "-" ? "white" : letters[cell] === "1" ? "transparent" : VEIL,
          );
          const left = [...letters].filter((letter) => letter === "1").length;
          const real = [...letters].filter((letter) => letter !== "-").length;
          canvas.setAttribute("role", "img");
          canvas.setAttribute("aria-label", `${example.name}, ${view.name}: ${left} of ${real} tokens left, the others veiled`);
          return element("figure", {}, canvas, element("figcaption", { textContent: `${view.name}: ${left} of ${real} left` }));
        }),
      );
      drawBars(bars, steps, example.tokens, number);
      bars.setAttribute("aria-label", `visual tokens left, from ${steps[0].tokens} at the first token to ${steps.at(-1).tokens} at the last`);
      status.textContent =
        `${example.name}, ${data.methods[method.value]}, token ${place.value}: ${step.tokens} of ${example.tokens} visual tokens left, ` +
        `answer so far: ${step.text}` + (end ? `, complete, ${verdict(example.scores[method.value])}` : "");
    };
    for (const control of [picker, method]) control.addEventListener("input", () => show(true));
    moment.addEventListener("input", () => show(false));
    return show(true);
  };

  // --- one function for each kind -----------------------------------------------------------------------------------------

  const KINDS = { tokens, answer };

  document.addEventListener("DOMContentLoaded", () => {
    for (const box of document.querySelectorAll(".explorer")) {
      const data = JSON.parse(box.querySelector("script[type='application/json']").textContent);
      if (!KINDS[data.kind]) continue;
      KINDS[data.kind](box, data).then(() => {
        box.querySelector(".explorer-still").hidden = true;
        box.dataset.ready = "true";
      });
    }
  });
})();
