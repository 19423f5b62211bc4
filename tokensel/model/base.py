"""What the trained models share as Hugging Face models: configuration, model card, clear errors."""

import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar, TypeVar, no_type_check

from huggingface_hub import HfApi
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel

from tokensel.utils.errors import CheckpointError, DiskError, TokenselError, reason
from tokensel.utils.files import no_space
from tokensel.utils.loading import hub_options, quiet, split_hub_options

Loaded = TypeVar("Loaded", bound="CoreModel")


@no_type_check  # transformers makes it a dataclass that takes any keyword; a checked signature would not
class CoreConfig(PretrainedConfig):
    """Shape of a model, and how it was trained (for its card; empty until it is).

    Attributes:
        width: channels of the features, the encoder's width.
        layers: Transformer layers; three in the paper (Secs. 4.1.1, 4.2).
        heads: attention heads; ``None`` for heads of 64 channels (32 below a width of 256).
        mlp_ratio: inner width of the MLP over ``width``.
        keep: the paper's p of Eq. (3), the proportion below which keeping tokens is free.
        keep_most: of a training that drew its budget, the largest; ``keep`` is then the smallest.
        gate: how its scores became a mask, see :mod:`tokensel.model.gates`.
        metric: where the error of the reconstruction was measured, see ``tokensel.training.metrics``.
        tau_start, tau_end: temperature of the gate at the first and the last step.
        encoder, tower, feature_layer, drop_cls: which features it was trained on; see ``VisionEncoder``.
        training_data, steps, seed: what it was trained on, and how long.
        scale: the distance that counts as 1 in L_rec, see ``tokensel.model.objective.objective``.
        l_rec, l_pr: the two terms of Eq. (7), averaged over the last tenth of the training.
    """

    width: int = 1024
    layers: int = 3
    heads: int | None = None
    mlp_ratio: float = 4.0
    keep: float | None = None
    keep_most: float | None = None
    gate: str | None = None
    metric: str | None = None
    tau_start: float | None = None
    tau_end: float | None = None
    encoder: str = ""
    tower: str = ""
    feature_layer: int | None = None
    drop_cls: bool | None = None
    training_data: str = ""
    steps: int = 0
    seed: int | None = None
    scale: float | None = None
    l_rec: float | None = None
    l_pr: float | None = None


# the statistics of the features were called center and spread before version 0.2
_RENAMED = {r"\.center$": ".mean", r"\.spread$": ".std"}


class CoreModel(PreTrainedModel):
    """A Hugging Face model that writes its own card and raises one clear line if it cannot be loaded."""

    config_class: ClassVar[type[PretrainedConfig]] = CoreConfig
    _no_split_modules: ClassVar[list[str]] = ["TransformerLayer"]
    # statistics of the features lose too much in half precision, so they keep float32 under every dtype
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = [r"\.mean$", r"\.std$"]
    role: ClassVar[str] = ""
    usage: ClassVar[str] = ""
    method: ClassVar[str] = (
        "*When Less is Enough: Adaptive Token Reduction for Efficient Image Representation*, arXiv 2503.16660"
    )

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write weights (safetensors), ``config.json`` and the model card ``README.md``.

        Each file is replaced atomically: after a kill it is the old one or the new one.

        Raises:
            DiskError: no space left on the device, or nothing can be written there.
        """
        push = kwargs.pop("push_to_hub", False)
        repo_id = kwargs.pop("repo_id", None)
        folder = Path(save_directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".part") as part:
                with quiet():
                    # not with the names of the file that it was loaded from, which may be those of 0.1
                    super().save_pretrained(part, *args, **{"save_original_format": False} | kwargs)
                (Path(part) / "README.md").write_text(self.model_card(), encoding="utf-8")
                for file in sorted(os.listdir(part)):
                    os.replace(Path(part) / file, folder / file)
        except (OSError, SafetensorError) as error:
            if "No space left" in str(error):
                raise no_space(error, folder) from None
            raise DiskError(f"{folder}: cannot write here ({reason(error)}); give another folder") from None
        if push:
            self.push_to_hub(repo_id or Path(save_directory).name)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        **upload: Any,
    ) -> str:
        """Upload what ``save_pretrained`` writes, the card included; returns the address of the commit.

        The stock method would replace our card by a blank one.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            message = commit_message or f"Upload {type(self).__name__}"
            return str(
                api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message=message, **upload)
            )

    @classmethod
    def from_pretrained(cls: type[Loaded], name: str | os.PathLike, *args: Any, **kwargs: Any) -> Loaded:
        """Load from a folder or a Hub id, in evaluation mode.

        Args:
            name: folder or Hub id.
            args, kwargs: of transformers' ``from_pretrained``; ``token``, ``revision``, ``cache_dir`` and
                ``local_files_only`` reach every request, the first included.

        Raises:
            TokenselError: no such folder or Hub model (or no connection to the Hub), another kind of model,
                a checkpoint cut short, or one that lacks weights.
        """
        expected = cls.config_class.model_type
        report = kwargs.pop("output_loading_info", False)
        hub, kwargs = split_hub_options(kwargs)
        options = hub_options(name, **hub)
        try:
            kind = cls.config_class.get_config_dict(name, **options)[0].get("model_type")
            if kind != expected:
                raise TokenselError(
                    f"{name}: its config.json says {kind}, not {expected}; give a {cls.__name__}"
                )
            loading: Any = super().from_pretrained  # its declared type does not know output_loading_info
            with quiet():
                loaded = loading(
                    name, *args, output_loading_info=True, key_mapping=_RENAMED, **options, **kwargs
                )
        except (SafetensorError, EOFError) as error:
            raise CheckpointError(
                f"{name}: its weights are cut short or damaged ({error}); fetch or save it again"
            ) from None
        except TokenselError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise TokenselError(
                f"{name}: cannot load a {cls.__name__} ({reason(error)}); give a Hub id or a local folder"
            ) from None
        model, info = loaded
        if info["missing_keys"]:
            raise CheckpointError(
                f"{name}: lacks the weights {sorted(info['missing_keys'])[:3]}; save it again"
            )
        return loaded if report else model

    def facts(self) -> dict[str, Any]:
        """Rows of the model card; those that are ``None`` or empty are left out."""
        c = self.config
        layer = c.feature_layer
        if layer is not None:
            layer = f"{layer}" + (", without the CLS token" if c.drop_cls else "")
        return {
            "encoder": c.encoder and f"`{c.encoder}`",
            "feature layer": layer,
            "width": c.width,
            "p of Eq. (3)": c.keep if c.keep_most is None else f"{c.keep} to {c.keep_most}",
            "gate": c.gate,
            "metric of L_rec": c.metric,
            "training data": c.training_data,
            "steps": c.steps or None,
            "seed": c.seed,
            "L_rec, Eq. (7), relative (1 = predicting the mean)": c.l_rec and round(c.l_rec, 4),
            "L_pr, Eq. (6)": c.l_pr and round(c.l_pr, 4),
        }

    def model_card(self) -> str:
        """The text of README.md on the Hub: what the model is, its training data and its losses."""
        rows = "\n".join(
            f"| {name} | {value} |" for name, value in self.facts().items() if value not in (None, "")
        )
        return (
            "---\nlibrary_name: tokensel\ntags:\n- tokensel\n- visual-token-selection\n---\n"
            f"# {type(self).__name__}\n\n{self.role}\n\n| | |\n|---|---|\n{rows}\n\n"
            f"```python\n{self.usage}\n```\n\n"
            f"Method: {self.method}. Independent implementation; not the authors' weights.\n"
        )
