"""Time a running server at several concurrencies and keeps; report ratios to keep 1 and to the ideal."""

import json
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, PretrainedConfig

from tokensel.benchmarks.server import Server, ServerError, parse_url
from tokensel.cost.count import Cost, count_decoder, first_token, layers_read, step_bytes
from tokensel.model.selector import TokenSelector
from tokensel.profiling.config import CostConfig, image_size
from tokensel.profiling.inference import Block, Rounds, quartiles
from tokensel.profiling.streaming import Burst, ask_burst, drawn_image, request_body
from tokensel.serving.counting import layout_of, skeleton
from tokensel.utils.errors import TokenselError
from tokensel.utils.files import write_json
from tokensel.utils.loading import hub_options
from tokensel.utils.provenance import command_line, environment
from tokensel.vlm.families import check_tiled

__all__ = ["measure_served", "served_lines"]

USED = {"model", "revision", "selector", "keeps", "images", "new_tokens", "repetitions", "warmup", "seed"}
USED |= {"server", "concurrency", "out", "name"}  # the options that mean something here
CLOCKS = ("requests_per_second", "first_token", "further_token")
FEWEST_REQUESTS = 4  # of a condition in a round
IDEAL = (
    "requests_per_second, first_token: speed-up if latency were proportional to the FLOPs of a request, "
    "counted by formula from the tokens that the server reports (encoder, selector, projector, prefill; for "
    "requests_per_second the decode steps, too). further_token: bytes of weights and caches that a decode "
    "step of so many requests reads, at keep 1 over those at this keep."
)


def measure_served(config: CostConfig, progress: bool = True) -> Path:
    """Measure running servers and write ``<out>/<name>.json``; after a kill, the same call resumes.

    Every round asks at each keep, in an order that rotates from round to round. The images of a round are
    the same at each keep, and no round has seen them before, so that no cache of the server helps.

    Args:
        config: what to measure; options that are of no use here must have their defaults.
        progress: show a bar on stderr.

    Raises:
        TokenselError: an option of no use, no server, one that does not follow the keep of a request, or a
            request that fails.
    """
    _check(config)
    model = AutoConfig.from_pretrained(config.model, **hub_options(config.model, revision=config.revision))
    check_tiled(model, "cost --serving")
    selector = None if config.selector is None else TokenSelector.from_pretrained(config.selector).config
    urls = [parse_url(url) for url in config.server]
    name, engine = _only_model(urls)
    keeps = [1.0, *(keep for keep in config.keeps if keep != 1.0)]
    machine = environment(torch.device("cpu")) | {"engine": engine}
    rounds = Rounds.of_measurement("served", config, machine)
    blocks = [Block(image, concurrency) for image in config.images for concurrency in config.concurrency]
    total = len(blocks) * (config.warmup + config.repetitions) * len(keeps)
    with tqdm(total=total, desc="cost", unit="burst", disable=not progress, file=sys.stderr) as bar:
        for block in blocks:
            missing = max(0, config.repetitions - len(rounds.of(block)))
            bar.update((config.repetitions - missing + (0 if missing else config.warmup)) * len(keeps))
            for number in range(-config.warmup if missing else 0, missing):
                images = _images(config, block, len(urls), rounds.sitting, number + config.warmup)
                times, turn = {}, len(rounds.of(block)) % len(keeps)
                for keep in keeps[turn:] + keeps[:turn]:
                    bodies = [request_body(name, image, keep, config.new_tokens) for image in images]
                    times[str(keep)] = _measured(ask_burst(urls, bodies, block.rows))
                    bar.update(1)
                _check_keeps(times)
                if number >= 0:
                    rounds.add(block, times)
    rows = [
        row
        for block in blocks
        for row in _summarise(config, model, selector, block, keeps, rounds.of(block)[: config.repetitions])
    ]
    report = {
        "model": config.model,
        "served_as": name,
        "machine": machine,
        "servers": len(urls),
        "sittings": max(round["sitting"] for round in rounds.all),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "config": asdict(config),
        "clock": "of the client: from the request, image included, to tokens as they are streamed; medians "
        "of rounds with quartiles, in seconds",
        "ideal": IDEAL,
        "rows": rows,
    }
    return write_json(Path(config.out) / f"{config.name}.json", report)


def _check(config: CostConfig) -> None:
    """Raise on options that would be ignored."""
    if not config.server:
        raise TokenselError("server is missing: give its URL, such as --server http://localhost:8000")
    for field in fields(config):
        if field.name not in USED and getattr(config, field.name) != field.default:
            raise TokenselError(
                f"{field.name} is {getattr(config, field.name)!r}, which a running server decides: leave it "
                "out with --serving"
            )


def _only_model(urls: list[str]) -> tuple[str, dict[str, Any]]:
    """The name of the one model that all servers have, and what they say of themselves."""
    names, engine = set(), {}
    for url in urls:
        try:
            models = Server(url).models()
        except ServerError as error:
            raise TokenselError(f"{error}; correct --server, or start the server first") from None
        names |= {*models}
        engine = {"name": ", ".join({*models.values()}), "version": _version(url)}
    if len(names) != 1:
        raise TokenselError(f"the servers have {', '.join(sorted(names)) or 'no model'}: give servers of one")
    return names.pop(), engine


def _version(url: str) -> str | None:
    """The version of vLLM, which it tells beside its API."""
    try:
        with urllib.request.urlopen(url.removesuffix("/v1") + "/version", timeout=10) as response:
            return json.load(response)["version"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _images(config: CostConfig, block: Block, servers: int, *seeds: int) -> list[str]:
    height, width = image_size(block.image)
    count = max(FEWEST_REQUESTS, block.rows) * servers
    return [drawn_image(height, width, config.seed, block.rows, *seeds, i) for i in range(count)]


def _measured(burst: Burst) -> dict[str, Any]:
    """One keep in one round: requests per second, medians over its requests, and counts."""
    timings = burst.timings
    return {
        "requests": len(timings),
        "requests_per_second": len(timings) / burst.seconds,
        "first_token": float(np.median([timing.first for timing in timings])),
        "further_token": float(np.median([timing.further for timing in timings])),
        "prompt_tokens": float(np.mean([timing.prompt_tokens for timing in timings])),
        "new_tokens": float(np.mean([timing.new_tokens for timing in timings])),
    }


def _check_keeps(times: dict[str, dict[str, Any]]) -> None:
    full = times["1.0"]["prompt_tokens"]
    for keep, measured in times.items():
        if float(keep) < 1 and measured["prompt_tokens"] >= full:
            raise TokenselError(
                f"a prompt has {measured['prompt_tokens']:g} tokens at keep {keep} and {full:g} at keep 1: "
                "the server does not follow it; start it with --trust-request-mm-kwargs"
            )


def _summarise(
    config: CostConfig,
    model: PretrainedConfig,
    selector: PretrainedConfig | None,
    block: Block,
    keeps: list[float],
    rounds: list[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """One row for each keep: medians with quartiles, ratios to keep 1 of the same round, and to the ideal."""
    full = [round["times"]["1.0"] for round in rounds]
    text: Any = model.get_text_config()
    itemsize = 4 if getattr(model, "dtype", None) == torch.float32 else 2
    costs = {
        keep: _counted(model, selector, block.image, keep, rounds[0]["times"][str(keep)]) for keep in keeps
    }
    for keep in keeps:
        times = [round["times"][str(keep)] for round in rounds]
        held = [int(each[0]["prompt_tokens"]) for each in (full, times)]
        # decode steps read what is held by then
        steps = [count_decoder(text, config.new_tokens, past=length) for length in held]
        reads = [step_bytes(text, length, block.rows, itemsize) for length in held]
        ideal = {
            "requests_per_second": (costs[1.0].total + steps[0]) / (costs[keep].total + steps[1]),
            "first_token": costs[keep].speedup(costs[1.0]),
            "further_token": reads[0] / reads[1],
        }
        row: dict[str, Any] = {"image": block.image, "concurrency": block.rows, "keep": keep}
        row |= {name: times[0][name] for name in ("requests", "prompt_tokens", "new_tokens")}
        row["rounds"] = len(rounds)
        for clock, best in ideal.items():
            pairs = [(before[clock], after[clock]) for before, after in zip(full, times, strict=True)]
            faster = clock == "requests_per_second"  # where more is better
            gain = quartiles([after / before if faster else before / after for before, after in pairs])
            row[clock] = quartiles([after for _, after in pairs])
            row[clock] |= {"speedup": gain, "ideal": best, "of_ideal": gain["median"] / best}
        row["flops"] = asdict(costs[keep]) | {"total": costs[keep].total}
        yield row


def _counted(
    model: PretrainedConfig,
    selector: PretrainedConfig | None,
    image: str,
    keep: float,
    measured: dict[str, Any],
) -> Cost:
    """FLOPs to the first token of one request, from shapes and the server's count of its prompt.

    The work of ranking tokens is counted for the selector only, and nothing is ranked at keep 1.
    """
    layout = layout_of(skeleton(model), torch.tensor([image_size(image)]))
    visual, newlines = int(layout.cell.sum()), int((~layout.cell).sum())
    text = int(measured["prompt_tokens"]) - newlines - max(1, round(keep * visual))
    selector = None if keep == 1.0 else selector
    return first_token(model, layout.tiles[0], visual, text, keep, newlines, selector, layers_read(model))


def served_lines(report: dict[str, Any]) -> Iterator[str]:
    """The report as a small table of text, one line for each concurrency and keep."""
    yield (
        f"{'image':>9} {'at a time':>9} {'keep':>4} {'prompt':>6} {'requests/s':>10} {'ratio':>5} "
        f"{'quartiles':>11} {'of ideal':>8} {'first token':>11} {'ratio':>5} {'further':>9} {'ratio':>5}"
    )
    for row in report["rows"]:
        rate, first, further = (row[clock] for clock in CLOCKS)
        gain = rate["speedup"]
        yield (
            f"{row['image']:>9} {row['concurrency']:>9} {row['keep']:>4.2g} {row['prompt_tokens']:>6g} "
            f"{rate['median']:>10.3g} {gain['median']:>5.2f} {gain['low']:>5.2f}-{gain['high']:<5.2f} "
            f"{rate['of_ideal']:>8.2f} {first['median']:>9.3f} s {first['speedup']['median']:>5.2f} "
            f"{1000 * further['median']:>6.1f} ms {further['speedup']['median']:>5.2f}"
        )
