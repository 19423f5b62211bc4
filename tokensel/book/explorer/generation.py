"""Steps for the explorer of a growing answer: the text so far and the remaining visual tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from tokensel.book.explorer.steps import Example, cell_codes, views
from tokensel.figures import overlays, style
from tokensel.schedules import Schedule
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Vlm, encode, reduce


def generation_steps(
    vlm: Vlm,
    examples: Sequence[Example],
    schedules: Mapping[str, Schedule],
    max_new_tokens: int = 48,
    progress: bool = True,
) -> dict[str, Any]:
    """Answer each question under each schedule, and record which visual tokens remain at every step.

    Args:
        vlm: the model to ask; :func:`tokensel.schedules.pruned` must support its language model.
        examples: what is asked, one at a time.
        schedules: what drops visual tokens while the answer is generated, by name.
        max_new_tokens: the longest answer, in tokens.
        progress: show a progress bar.

    Returns:
        A dictionary of kind "answer" for :func:`tokensel.book.explorer.embed`. ``steps[method]`` of an
        example has one entry for each token of the answer: ``text``, the answer up to that token; ``kept``,
        as in :class:`~tokensel.book.explorer.steps.Exploration`, for the layers in which the fewest tokens
        remain; and ``tokens``, their number.

    Raises:
        TokenselError: no examples or no schedules.
    """
    if not examples or not schedules:
        raise TokenselError("nothing to show: give at least one image with a question, and one schedule")
    processor = vlm.processor.image_processor
    entries = []
    for example in tqdm(examples, desc="answers", unit="image", disable=not progress):
        encoded = encode(vlm.model, vlm.inputs([example.image], [vlm.prompt(example.question)]))
        tiled = overlays.tiled_image(encoded, 0, (processor.image_mean, processor.image_std))
        prompt, valid = reduce(encoded), encoded.layout.valid
        entry: dict[str, Any] = {
            "name": example.name,
            "question": example.question,
            "answers": list(example.answers),
            "views": views(tiled),
            "tokens": int(valid.sum()),
            "steps": {},
            "scores": {},
        }
        for name, schedule in schedules.items():
            output = vlm.generate_output(prompt, max_new_tokens, schedule)
            drops = [] if output.pruning is None else output.pruning.drops
            steps = []
            for step in range(int(output.lengths[0])):
                kept = valid
                if past := [drop for drop in drops if drop.step <= step]:
                    kept = valid & overlays.left_cells(encoded, prompt.visual, past[-1].columns[0])
                text = vlm.processor.tokenizer.decode(output.tokens[0, : step + 1], skip_special_tokens=True)
                cells = [cell_codes(*view) for view in zip(tiled.maps(kept), tiled.maps(valid))]
                steps.append({"text": text.strip(), "kept": cells, "tokens": int(kept.sum())})
            entry["steps"][name], entry["scores"][name] = steps, example.score(output.texts[0])
        entries.append(entry)
    return {
        "kind": "answer",
        "model": vlm.name,
        "methods": {name: style.label(name) for name in schedules},
        "examples": entries,
    }
