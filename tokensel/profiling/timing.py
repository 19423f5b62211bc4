"""One answer on the clock: when each token came, what each part took, how much memory there was at most."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import BaseStreamer

from tokensel.data.features import Features
from tokensel.methods import check_method
from tokensel.profiling.subject import Condition, Subject
from tokensel.scorers import Scorer
from tokensel.vlm import Reduced

PHASES = ("encoder", "selector", "selection", "projector", "prefill", "other")


class Stamps(BaseStreamer):
    """Notes when each token reaches the host, the device having finished it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(perf_counter())

    def end(self) -> None:
        pass


class Spans:
    """Seconds between marks by name; a GPU takes its own marks, so that nobody waits for it to be measured."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: dict[str, list[Any]] = {}

    def mark(self, name: str) -> None:
        """Begin the span ``name``, or end it if it has begun; once ended it stays as it is."""
        marks = self.marks.setdefault(name, [])
        if len(marks) < 2:
            marks.append(self._now())

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """Length of every span that has ended; the device must be done."""
        whole = {name: marks for name, marks in self.marks.items() if len(marks) == 2}
        if self.device.type != "cuda":
            return {name: end - begin for name, (begin, end) in whole.items()}
        return {name: begin.elapsed_time(end) / 1000 for name, (begin, end) in whole.items()}

    @contextmanager
    def listening(self, model: PreTrainedModel) -> Iterator[None]:
        """While this lasts, mark the first run of the model's parts."""
        core = model.base_model
        edges: list[tuple[nn.Module, nn.Module, str]] = [
            (core.vision_tower, core.vision_tower, "encoder"),
            (core.multi_modal_projector, core.multi_modal_projector, "projector"),
            (core.language_model, model.get_output_embeddings(), "prefill"),
        ]
        with ExitStack() as stack:
            for first, last, name in edges:
                begin = first.register_forward_pre_hook(lambda *_, name=name: self._begin(name))
                end = last.register_forward_hook(lambda *_, name=name: self.mark(name))
                for hook in (begin, end):
                    stack.callback(hook.remove)
            yield

    def _begin(self, name: str) -> None:
        if name not in self.marks:
            self.mark(name)


class Timed:
    """A scorer on the clock; otherwise the scorer that it holds."""

    def __init__(self, scorer: Scorer, spans: Spans):
        self.scorer, self.spans = scorer, spans
        self.name, self.needs_cls_attention = scorer.name, scorer.needs_cls_attention
        self.scope, self.adaptive = scorer.scope, scorer.adaptive

    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]:
        self.spans.mark("selector")
        scores = self.scorer(features)
        self.spans.mark("selector")
        return scores


@torch.inference_mode()
def time_answer(subject: Subject, condition: Condition, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Give the model a processed batch under one condition, and note what it costs.

    The pictures are processed already: resizing and cutting them into tiles is not on the clock.

    Returns:
        ``first_token``: seconds from pixels on the device to the first token on the host; ``further_token``: median
        seconds of each one after it; ``answer``: seconds until the last; ``peak_bytes``: of memory, ``None`` where it
        cannot be told; ``phases``: seconds to the first token by :data:`PHASES`, where "selection" is everything around
        the selector that turns scores into a shorter prompt, and "other" what ``generate`` itself takes;
        ``n_visual``, ``length``: visual tokens and all tokens of a row that enter the language model.
    """
    model, tokens = subject.model, subject.config.new_tokens
    scorer = subject.scorers.get(check_method(condition.method).scorer)
    stamps, spans = Stamps(), Spans(model.device)
    _wait(model.device)
    peak = watch_peak(model.device)
    start = perf_counter()
    with spans.listening(model):
        spans.mark("prepare")
        prepared = subject.prepare(condition, inputs, scorer and Timed(scorer, spans))
        spans.mark("prepare")
        with subject.dropping(condition, prepared):
            options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
            model.generate(**prepared, **options, streamer=stamps)
    _wait(model.device)
    times = stamps.times[-tokens:]  # generate also hands over the prompt
    first, took = times[0] - start, spans.seconds()
    inside = {name: took.get(name, 0.0) for name in ("encoder", "selector", "projector")}
    shorter = isinstance(prepared, Reduced)
    phases = inside | {"selection": took["prepare"] - sum(inside.values()) if shorter else 0.0}
    phases |= {"prefill": took["prefill"]}
    phases |= {"other": first - sum(phases.values())}
    return {
        "first_token": first,
        "further_token": median(after - before for before, after in zip(times, times[1:])),
        "answer": times[-1] - start,
        "peak_bytes": peak(),
        "phases": {name: phases[name] for name in PHASES},
        "n_visual": int(prepared.n_visual[0]) if shorter else None,
        "length": prepared["attention_mask"].shape[1],
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def watch_peak(device: torch.device) -> Callable[[], int | None]:
    """Start watching memory; what is returned tells the peak since then, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    try:  # Linux: the peak of the resident memory, the weights among it
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return lambda: None

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    return resident
