"""What the explorer of a growing answer shows: at every step, what is written and which visual tokens are left."""

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from tokensel.book.explorer.steps import Subject, letters, views
from tokensel.figures import overlays, style
from tokensel.schedules import Schedule
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Vlm, encode, reduce


def write_steps(
    vlm: Vlm,
    subjects: Sequence[Subject],
    schedules: Mapping[str, Schedule],
    max_new_tokens: int = 48,
    progress: bool = True,
) -> dict[str, Any]:
    """Let the model answer each question under each schedule, and note what is left of the picture at every step.

    Args:
        vlm: the model to ask; its language model is one that :func:`tokensel.schedules.pruned` takes.
        subjects: what is asked, one at a time.
        schedules: what drops visual tokens while the answer grows, by name.
        max_new_tokens: where answers stop at the latest.
        progress: show a bar.

    Returns:
        A dictionary of kind "answer" for :func:`tokensel.book.explorer.embed`. A picture's ``steps[method]`` has one entry a
        token of the answer: ``said``, the answer up to it; ``kept``, as in
        :class:`~tokensel.book.explorer.steps.Exploration`, of the layers in which the fewest tokens are left; and how many.

    Raises:
        TokenselError: no subjects or no schedules.
    """
    if not subjects or not schedules:
        raise TokenselError("nothing to show: give at least one picture with a question, and one schedule")
    images = vlm.processor.image_processor
    found = []
    for subject in tqdm(subjects, desc="answers", unit="picture", disable=not progress):
        encoded = encode(vlm.model, vlm.inputs([subject.image], [vlm.prompt(subject.question)]))
        seen = overlays.look(encoded, 0, (images.image_mean, images.image_std))
        prompt, real = reduce(encoded), encoded.layout.valid
        picture = {
            "name": subject.name,
            "question": subject.question,
            "answers": list(subject.answers),
            "views": views(seen),
            "tokens": int(real.sum()),
            "steps": {},
            "scores": {},
        }
        for name, schedule in schedules.items():
            output = vlm.generate_output(prompt, max_new_tokens, schedule)
            steps = []
            for step in range(int(output.lengths[0])):
                dropped = [drop for drop in output.pruning.drops if drop.step <= step]
                kept = (
                    overlays.left_cells(encoded, prompt.visual, dropped[-1].columns[0]) & real
                    if dropped
                    else real
                )
                said = vlm.processor.tokenizer.decode(output.tokens[0, : step + 1], skip_special_tokens=True)
                cells = [letters(*view) for view in zip(seen.maps(kept), seen.maps(real))]
                steps.append({"said": said.strip(), "kept": cells, "tokens": int(kept.sum())})
            picture["steps"][name], picture["scores"][name] = steps, subject.score(output.texts[0])
        found.append(picture)
    return {
        "kind": "answer",
        "model": vlm.name,
        "methods": {name: style.label(name) for name in schedules},
        "pictures": found,
    }
