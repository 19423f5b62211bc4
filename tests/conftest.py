"""Check every shape and type of the package while the tests run; keep the tests off the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# numbers are compared to the last bit, so they come from the CPU everywhere; the GPU has tests of its own
if os.environ.get("TOKENSEL_TESTS_ON") != "gpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from jaxtyping import install_import_hook

# before anything imports the package: modules that are loaded already would go unchecked
install_import_hook("tokensel", "beartype.beartype")

from pathlib import Path

import pytest
import suite_tiny

from tokensel.benchmarks.config import EvalConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder of a tiny LLaVA-NeXT, with a selector for it beside it."""
    return suite_tiny.save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def config(model, tmp_path) -> EvalConfig:
    """Four methods at two keeps on nine questions to that model."""
    return EvalConfig(
        model=str(model),
        selector=str(model.parent / "selector"),
        diffprune=str(model.parent / "diffprune"),
        visionselector=str(model.parent / "visionselector"),
        suite="suite_tiny",
        methods=("full", "none", "random", "selector"),
        keeps=(0.2, 0.6),
        n=9,
        batch_size=4,
        out=str(tmp_path / "out"),
    )
