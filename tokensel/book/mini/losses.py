"""The two losses of the small model's training: on the labels of patches, and on answers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokensel.book.mini.canvas import CELLS, ILLEGIBLE, PATCH
from tokensel.book.mini.packing import HEAD, PackedQuestions, layout, patch_pixels
from tokensel.book.mini.probes import Probes
from tokensel.book.mini.recipe import ONE_TILE, tiles_of
from tokensel.book.mini.step_batches import LABELS, StepBatch
from tokensel.vlm.layout import pack
from tokensel.vlm.native import count_tokens

RARE = (
    "letters",
    "objects",
    "sizes",
    "papers",
)  # labels of few patches, or unknown of many: there, 0 weighs less


class Heads(nn.Module):
    """Heads on the tower, and on the language model at the visual tokens; discarded after training."""

    def __init__(self, width: int, language_width: int):
        super().__init__()
        self.patch = nn.ModuleDict({name: nn.Linear(width, count + 1) for name, count in LABELS.items()})
        self.pixels = nn.Linear(width, 48)
        self.holds = nn.Linear(width, sum(LABELS.values()))
        self.cell = nn.Linear(width, CELLS * CELLS)
        self.whole = nn.Linear(width, 3 * PATCH * PATCH)
        self.probes = Probes(language_width)


class TrainingLosses:
    """The losses of a batch and counts of right predictions, as tensors, so that nothing waits for a GPU."""

    def __init__(self, model: Any, heads: Heads, bf16: bool):
        self.model, self.core, self.heads = model, model.model, heads
        self.device = next(model.parameters()).device
        self.bf16, self._layouts = bf16, {}

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def layout(self, size: tuple[int, int]) -> Tensor:
        """Where the visual tokens of a page come from, see :func:`~tokensel.book.mini.packing.layout`."""
        if size not in self._layouts:
            self._layouts[size] = layout(self.core, size).to(self.device)
        return self._layouts[size]

    def visual(self, sizes: Iterable[tuple[int, int]]) -> dict[tuple[tuple[int, int], bool], int]:
        """Visual tokens of pages of ``sizes``, with newlines; also when shrunk, if the model does that."""
        counts = {(size, False): len(self.layout(size)) for size in sizes}
        if getattr(self.core.config, "vision_aspect_ratio", None):
            shrunk = {size: count_tokens(self.model, *size) for size in sizes if size not in ONE_TILE}
            counts |= {(size, True): visual + newlines for size, (_, visual, newlines) in shrunk.items()}
        return counts

    def _features(self, seen) -> Tensor:
        """The tower's output for the language model: the patches, at one of its layers."""
        config = self.core.config
        states = seen.hidden_states[config.vision_feature_layer]
        return (
            states[:, 1:] if config.vision_feature_select_strategy == "default" else states
        )  # without the CLS token

    def tower_loss(self, batch: StepBatch) -> tuple[Tensor, dict[str, Any]]:
        """Loss of the tower on the labels, and counts of right predictions."""
        with self._autocast():
            if batch.hidden is not None:
                return self._pixels(batch, batch.hidden)
            return self._labels(batch, self.core.vision_tower(batch.pixels, output_hidden_states=True))

    def _pixels(self, batch: StepBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Loss of a tower that sees no label: all pixels of a tile from the patches that are not hidden."""
        # a hidden patch is grey: 0 in normalised pixels
        seen = (~hidden).view(-1, 1, CELLS, CELLS).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
        patches = self._features(self.core.vision_tower(batch.pixels * seen, output_hidden_states=True))
        loss = functional.mse_loss(self.heads.whole(patches).float(), patch_pixels(batch.pixels, 1))
        return loss + self._places(patches), {}

    def _places(self, patches: Tensor) -> Tensor:
        """Loss on the place of a patch in its tile: else the tower forgets it for good."""
        cells = torch.arange(patches.shape[1], device=self.device).expand(len(patches), -1)
        return 0.3 * functional.cross_entropy(self.heads.cell(patches).float().transpose(1, 2), cells)

    def _labels(self, batch: StepBatch, seen) -> tuple[Tensor, dict[str, Any]]:
        """Loss of the heads on the tower's features, for the labels of patches and tiles."""
        labels = batch.labels
        patches = self._features(seen)
        logits = {name: head(patches).float() for name, head in self.heads.patch.items()}
        loss = 0.3 * functional.mse_loss(self.heads.pixels(patches).float(), patch_pixels(batch.pixels))
        if seen.pooler_output is not None:  # of the CLS token; SigLIP has none
            present = [
                functional.one_hot(labels[name], count + 1).amax(1)[:, 1:] for name, count in LABELS.items()
            ]
            holds = self.heads.holds(seen.pooler_output).float()
            loss = loss + functional.binary_cross_entropy_with_logits(holds, torch.cat(present, 1).float())
        loss = loss + self._places(patches)
        for name, count in LABELS.items():
            weight = torch.ones(count + 1, device=self.device)
            weight[0] = 0.3 if name in RARE else 1.0
            loss = loss + functional.cross_entropy(logits[name].flatten(0, 1), labels[name].flatten(), weight)
        legible = (labels["letters"] > 0) & (labels["letters"] < ILLEGIBLE)
        counts = {}
        for name, where in (("letters", legible), ("objects", labels["objects"] > 0)):
            right = (logits[name].argmax(-1) == labels[name]) & where
            counts[name] = torch.stack([right.sum(), where.sum()])
        return loss, counts

    def answer_loss(self, batch: StepBatch, tower: bool = True) -> tuple[Tensor, dict[str, Any]]:
        """Loss of the language model on the answers, and how many tokens of each page's answers are right.

        Every question has the same weight, whatever the length of its answer. With ``tower`` the tower is
        trained too.
        """
        with self._autocast():
            hidden, label_loss, counts = self.forward(batch, tower)
            drilled = None
            if batch.drill is not None:
                drilled = self._read(None, batch.drill)[-1][:, -batch.drill.ids.shape[1] :]
        assert batch.packed is not None, "a batch of the second phase has questions"
        loss, right, total = self._token_loss(hidden, batch.packed)
        counts["pages"] = torch.stack([right, total], 1)
        if drilled is not None and batch.drill is not None:
            more, right, total = self._token_loss(drilled, batch.drill)
            loss, counts["drill"] = loss + more, torch.stack([right.sum(), total.sum()])
        return loss + label_loss, counts

    def _token_loss(self, hidden: Tensor, packed: PackedQuestions) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss over the questions; right answer tokens of each row; all answer tokens of each row."""
        logits = self.model.lm_head(hidden).float()
        losses = functional.cross_entropy(logits.flatten(0, 1), packed.labels.flatten(), reduction="none")
        answered = packed.labels >= 0
        hit = (logits.argmax(-1) == packed.labels) & answered
        loss = (losses * packed.weights.flatten()).sum() / packed.weights.sum()
        return loss, hit.sum(1), answered.sum(1)

    def forward(self, batch: StepBatch, tower: bool = True) -> tuple[Tensor, Tensor | float, dict[str, Any]]:
        """Hidden states ``[pages, text, width]`` over the packed questions, the loss on labels, and counts.

        The labels are the tower's (with ``tower``) and those of the language model at the visual tokens.
        """
        assert batch.packed is not None and batch.size is not None, "a batch of the second phase has both"
        core, index = self.core, self.layout(batch.size)
        with torch.set_grad_enabled(tower and torch.is_grad_enabled()):
            seen = core.vision_tower(batch.pixels, output_hidden_states=True)
        label_loss, counts = self._labels(batch, seen) if tower else (0.0, {})
        pages, many = len(batch.packed.ids), tiles_of(batch.size)
        cells = self._features(seen)[: pages * many]
        if batch.shrunk:
            projected = core.multi_modal_projector(cells).float().split(many)
            visual = torch.stack(
                pack(core, projected, torch.tensor([batch.size] * pages), core.image_newline)
            )
        else:
            projected = core.multi_modal_projector(
                cells.reshape(pages, -1, cells.shape[-1])[:, index.clamp(min=0)]
            ).float()
            visual = torch.where((index < 0)[:, None], core.image_newline, projected)
        states = self._read(visual, batch.packed)
        asked = [state[:, -batch.packed.ids.shape[1] :] for state in states]
        if batch.shrunk or not batch.probed:  # an interpolated token has no single place
            return asked[-1], label_loss, counts
        at_visual = [state[:, HEAD : HEAD + len(index)] for state in states]
        probe_loss, probed = self.heads.probes(at_visual, asked, index, batch)
        return asked[-1], label_loss + probe_loss, counts | probed

    def _read(self, visual: Tensor | None, packed: PackedQuestions) -> tuple[Tensor, ...]:
        """Run the language model over <s> USER: | visual, if any | text; the states after each layer."""
        model = self.core.language_model
        start = model.embed_tokens(torch.tensor([[1, 5]], device=self.device)).expand(len(packed.ids), -1, -1)
        parts = [start, visual, model.embed_tokens(packed.ids)]
        return model(
            inputs_embeds=torch.cat([part for part in parts if part is not None], 1),
            attention_mask=packed.mask(),
            position_ids=packed.positions,
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states
