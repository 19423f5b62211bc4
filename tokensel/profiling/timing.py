"""Time one batch of answers: when each token arrived, what each part took, the peak of memory."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from tokensel.data.features import Features
from tokensel.methods import check_method
from tokensel.profiling.workload import MeasuredModel, Variant
from tokensel.scorers import Scorer
from tokensel.vlm import Reduced
from tokensel.vlm.families import family_of

PHASES = ("encoder", "selector", "selection", "projector", "prefill", "other")


class Stamps(BaseStreamer):
    """Records when each token reaches the host, that is, after the device has finished it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(perf_counter())

    def end(self) -> None:
        pass


class Spans:
    """Seconds between pairs of marks, by name. On a GPU the marks are events, which do not synchronise."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: dict[str, list[Any]] = {}

    def mark(self, name: str) -> None:
        """Begin the span ``name``, or end it if it has begun. Later marks of a finished span are ignored."""
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
        """Length of every finished span; synchronise the device first."""
        finished = {name: marks for name, marks in self.marks.items() if len(marks) == 2}
        if self.device.type != "cuda":
            return {name: end - begin for name, (begin, end) in finished.items()}
        return {name: begin.elapsed_time(end) / 1000 for name, (begin, end) in finished.items()}

    @contextmanager
    def hooked(self, model: PreTrainedModel) -> Iterator[None]:
        """Within this context, mark the first run of each part of the model."""
        core: Any = model.base_model
        family = family_of(model.config)
        tower, text = family.tower(model), getattr(core, family.text)
        edges: list[tuple[nn.Module, nn.Module | None, str]] = [
            (tower, tower, "encoder"),
            (text, model.get_output_embeddings(), "prefill"),
        ]
        # the merger of a Qwen-VL is a part of its tower
        projector = getattr(core, "multi_modal_projector", getattr(core, "connector", None))
        edges += [] if projector is None else [(projector, projector, "projector")]
        with ExitStack() as stack:
            for first, last, name in edges:
                begin = first.register_forward_pre_hook(lambda *_, name=name: self._begin(name))
                assert last is not None, "every model that generates has output embeddings"
                end = last.register_forward_hook(lambda *_, name=name: self.mark(name))
                for hook in (begin, end):
                    stack.callback(hook.remove)
            yield

    def _begin(self, name: str) -> None:
        # a method may read the prompt once to choose its tokens; that is a part of the choice
        choosing = name == "prefill" and len(self.marks.get("prepare", ())) == 1
        if name not in self.marks and not choosing:
            self.mark(name)


class Timed:
    """A scorer whose calls are timed; in all other respects the scorer that it wraps."""

    def __init__(self, scorer: Scorer, spans: Spans):
        self.scorer, self.spans = scorer, spans
        self.name, self.needs_cls_attention = scorer.name, scorer.needs_cls_attention
        self.scope, self.adaptive = scorer.scope, scorer.adaptive

    def __getattr__(self, name: str) -> Any:
        # asked for what is not set above: what only some scorers have, such as merge()
        return getattr(self.scorer, name)

    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]:
        self.spans.mark("selector")
        scores = self.scorer(features)
        self.spans.mark("selector")
        return scores


@torch.inference_mode()
def time_answer(measured: MeasuredModel, variant: Variant, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Answer a processed batch under one variant, and measure what it takes.

    The images are processed already: resizing them and cutting them into tiles is not timed.

    Returns:
        ``first_token``: seconds from pixels on the device to the first token on the host; ``further_token``:
        median seconds of each later token; ``answer``: seconds until the last token; ``peak_bytes``: peak
        memory, ``None`` where the platform does not report it; ``phases``: seconds to the first token by
        :data:`PHASES`, where "selection" is what turns scores into a shorter prompt, and "other" the overhead
        of ``generate``; ``n_visual``, ``length``: visual tokens and all tokens of a row that enter the
        language model.
    """
    model: Any = measured.model
    tokens = measured.config.new_tokens
    stamps, spans = Stamps(), Spans(model.device)
    name = check_method(variant.method).scorer
    scorer = Timed(measured.scorers[name], spans) if name else None
    _wait(model.device)
    peak = watch_peak(model.device)
    start = perf_counter()
    with spans.hooked(model):
        spans.mark("prepare")
        prepared = measured.prepare(variant, inputs, scorer)
        spans.mark("prepare")
        with measured.dropping(variant, prepared):
            options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
            model.generate(**prepared, **options, streamer=stamps)
    _wait(model.device)
    times = stamps.times[-tokens:]  # generate also passes the prompt to the streamer
    first, took = times[0] - start, spans.seconds()
    phases = {part: took.get(part, 0.0) for part in ("encoder", "selector", "projector")}
    shorter = isinstance(prepared, Reduced)
    phases["selection"] = took["prepare"] - sum(phases.values()) if shorter else 0.0
    phases["prefill"] = took["prefill"]
    phases["other"] = first - sum(phases.values())
    return {
        "first_token": first,
        "further_token": median(after - before for before, after in pairwise(times)),
        "answer": times[-1] - start,
        "peak_bytes": peak(),
        "phases": {name: phases[name] for name in PHASES},
        "n_visual": int(prepared.n_visual[0]) if isinstance(prepared, Reduced) else None,
        "length": prepared["attention_mask"].shape[1],
    }


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Within this context, PyTorch uses ``count`` CPU threads; 0 leaves them as they are."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def watch_peak(device: torch.device) -> Callable[[], int | None]:
    """Start watching memory; the returned function gives the peak since then in bytes, or ``None``."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    try:  # Linux: the peak of resident memory, weights included
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return lambda: None

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    return resident
