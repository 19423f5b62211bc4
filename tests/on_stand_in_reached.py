"""Every public function that takes or returns tensors has run on the stand-in device in the other tests."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from reached import REACHED

import tokensel

# annotations of what holds tensors, or computes with them
TENSORS = re.compile(
    r"Tensor|Features|Encoded|Reduced|\bPrompt\b|Forced|GenerationOutput|\bTrained\b|PreTrainedModel|Module\b|\bVlm\b"
)
ROOMS = ("tokensel.book.explorer",)  # of the book, the part that handles tensors

# Functions that compute nothing on the device: layouts and counts are on the host, and so are the data before
# a model reads them; others only look at modules, or pass tensors on.
LAYOUT = """vlm.choose.adaptive_cells vlm.choose.add_newlines vlm.choose.choose_cells
    vlm.encoded.Encoded.n_tiles vlm.encoded.Encoded.n_visual vlm.encoded.Encoded.per_row
    vlm.encoded.Encoded.positions vlm.families.base.Family.positions vlm.families.base.run_lengths
    vlm.families.base.Family.cut vlm.families.base.Family.tiles_layout vlm.families.internvl.InternVl.cut
    vlm.families.internvl.InternVl.tiles_layout vlm.families.qwen_vl.QwenVl.cut
    vlm.families.qwen_vl.QwenVl.tiles_layout
    vlm.families.idefics3.Idefics3.cut vlm.families.idefics3.Idefics3.tiles_layout
    vlm.families.gemma.Gemma3.cut vlm.families.gemma.Gemma3.tiles_layout vlm.families.gemma.PaliGemma.cut
    vlm.families.base.tensor vlm.families.internvl.InternVl.locate vlm.families.llava.Llava.locate
    vlm.families.llava.Llava.tiles_layout vlm.families.mistral3.Mistral3.cut
    vlm.families.mistral3.Mistral3.tiles_layout cost.published_families.image_grids
    vlm.families.qwen_vl.QwenVl.positions vlm.layout.Layout.real vlm.layout.plain_layout
    vlm.layout.Layout.behind
    vlm.families.base.Family.placeholders vlm.families.qwen_vl.QwenVl.placeholders
    vlm.layout.Layout.cell
    vlm.layout.Layout.image_of_tile vlm.layout.Layout.slots vlm.layout.Layout.spread vlm.layout.Layout.valid
    serving.counting.grid_layout serving.counting.layout_of serving.places.pending_positions
    vlm.layout.mark_cells vlm.layout.read_layout vlm.native.count_tokens schedules.prompt.Prompt.map_cells
    schedules.prompt.Prompt.map_row schedules.prompt.Prompt.real schedules.prompt.Prompt.repeat
    schedules.prompt.Prompt.gather schedules.feather.grid_cells schedules.grids.grids
    schedules.view.View.question
    schedules.random_cut.RandomCut.rank schedules.prune.Pruning.cached
    schedules.prune.Pruning.ranked schedules.prune.Pruning.reread
    schedules.choosing.Choosing.begin_prefill vlm.layout.Layout.centres
    vlm.kept.kept_by_place vlm.kept.kept_cells vlm.families.gemma.PaliGemma.tokens
    book.explorer.steps.cell_codes scorers.uniform.even_order"""
CPU_DATA = """data.encoders.VisionEncoder.preprocess data.loader.StoredFeatureLoader.batches
    data.loader.epoch_order data.loader.features_identity data.loader.rows_of_step
    data.encoders.VisionEncoder.stack vlm.family_encoder.FamilyEncoder.stack
    budget.measure_thresholds model.gumbel.gumbel_noise model.positions.sincos model.positions.grid_codes
    utils.files.load_tensors training.autoencoder.MaskedAutoencoder.standardise"""
MODULES = """data.encoders.VisionEncoder.from_vlm data.tower.encoder_layers data.tower.module_view
    profiling.timing.Spans.hooked profiling.workload.build_selector
    profiling.workload.build_learned training.answers.Learner.prepare training.frozen.training_identity
    vlm.families.base.check_cls vlm.followup.next_turn
    profiling.inference.summarise_inference schedules.decoder.decoder_of
    training.optim.adamw training.processes.Processes.parallel
    utils.devices.device_of vlm.families.base.Family.tower vlm.families.qwen_vl.QwenVl.tower
    vlm.families.idefics3.Idefics3.tower
    vlm.families.base.Family.check vlm.families.llava.Llava.check vlm.families.pixtral.Pixtral.check
    vlm.families.llava_next.LlavaNext.check vlm.families.llava_onevision.switch_off
"""
PASSED_ON = """training.metrics.in_features
    vlm.families.base.Family.embed vlm.families.qwen3_vl.Qwen3Vl.embed vlm.families.qwen_vl.QwenVl.deeper
    profiling.timing.Stamps.put schedules.fastv.FastV.entering schedules.rates.Exponential.entering
    schedules.rates.Fixed.entering schedules.clse.Clse.entering schedules.feather.Feather.entering
    schedules.priortr.PriorTR.entering schedules.pyramiddrop.PyramidDrop.entering
    schedules.random_cut.RandomCut.entering schedules.sparsevlm.SparseVLM.entering schedules.vtw.Vtw.entering
    schedules.fastocr.FastOcr.entering
    scorers.cls.ClsScorer.__call__
    model.gates.alone training.optim.mean_over_processes training.processes.Processes.sum
    vlm.reduce.Reduced.copy vlm.bias.check_read
    schedules.choosing.Choosing.remember_input vlm.reduce.Reduced.prompt"""
ON_HOST = {f"tokensel.{name}" for name in f"{LAYOUT} {CPU_DATA} {MODULES} {PASSED_ON}".split()}
# shapes without values, on no device at all
ON_META = {"tokensel.cost.published.hollow", "tokensel.serving.counting.skeleton"}
ENGINES = "tokensel.serving.vllm_"  # modules that only a running engine imports


def public_functions() -> Iterator[tuple[str, FunctionType]]:
    """Public functions and methods of the library, by module and qualified name."""
    for info in pkgutil.walk_packages(tokensel.__path__, "tokensel."):
        if info.name.endswith("__main__") or (".book" in info.name and not info.name.startswith(ROOMS)):
            continue
        if info.name.startswith(ENGINES):
            continue
        module = importlib.import_module(info.name)
        names = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
        for value in map(vars(module).get, names):
            if getattr(value, "__module__", None) != info.name:
                continue
            if getattr(value, "_is_protocol", False):
                continue
            members = vars(value).items() if inspect.isclass(value) else [("", value)]
            for name, member in members:
                function = plain(member)
                if function is None or name in getattr(value, "__abstractmethods__", ()):
                    continue
                if not name.startswith("_") or name == "__call__":
                    yield f"{info.name}.{function.__qualname__}", function


def plain(member: Any) -> FunctionType | None:
    """The function as it was written, without decorators."""
    member = getattr(member, "fget", None) or getattr(member, "func", None) or member
    member = inspect.unwrap(getattr(member, "__func__", member))
    return member if isinstance(member, FunctionType) else None


def handles_tensors(function: FunctionType) -> bool:
    return any(TENSORS.search(str(annotation)) for annotation in function.__annotations__.values())


def test_every_public_function_that_handles_tensors_has_run_on_the_device(request):
    files = {item.path.name for item in request.session.items}
    wanted = {path.name for path in Path(__file__).parent.glob("on_stand_in*.py")}
    if files != wanted or request.config.option.keyword:
        pytest.skip("the other tests on the stand-in device were not run")
    functions = {name for name, function in public_functions() if handles_tensors(function)} - ON_META
    assert len(functions) > 100
    assert not ON_HOST - functions, f"no such public functions: {sorted(ON_HOST - functions)}"
    missing = functions - set(REACHED) - ON_HOST
    assert not missing, f"no test on the stand-in device lets these compute there: {sorted(missing)}"
    assert not ON_HOST & set(REACHED), f"these compute on the device: {sorted(ON_HOST & set(REACHED))}"
