"""Check every shape and type of the package while the tests run; keep the tests off the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

from jaxtyping import install_import_hook

# before anything imports the package: modules that are loaded already would go unchecked
install_import_hook("tokensel", "beartype.beartype")
