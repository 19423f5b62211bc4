"""How a schedule chooses among the columns of one prompt: what it may read, and what it lets stay."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokensel.budget import fraction_count
from tokensel.schedules.attention import RESPONSE, chosen_rows, last_rows, token_types, type_mass
from tokensel.schedules.decoder import Decoder, attention_of, cache_of
from tokensel.schedules.deepstack import Deepstack
from tokensel.schedules.prompt import Prompt
from tokensel.schedules.schedule import Schedule
from tokensel.schedules.stages import Stage, as_given, stay_columns
from tokensel.schedules.view import View

__all__ = ["Choosing"]


class Choosing:
    """The choices of one schedule, and the attention that they need beside the model's own.

    Attributes:
        starts: the first layers of the stages, rising.
        deepstack: what is added to visual columns after the first layers; nothing in most models.
        total: cells of each row of the prompt.
        step: the generation step; 0 is the prefill, -1 is before it.
        ranked: step and layer of the rows of attention that were computed in addition to the model's own, and
            how many of them each row of the batch needed.
        reread: how many layers read the prompt of each row a second time.
    """

    def __init__(self, decoder: Decoder, schedule: Schedule):
        self.decoder, self.schedule = decoder, schedule
        self.rank: Callable[[View], Tensor] | None = getattr(schedule, "rank", None)
        self.count: Callable[[View], Tensor] | None = getattr(schedule, "count", None)
        self.restores: bool = getattr(schedule, "restores", False)
        self.starts = (0, *sorted(schedule.layers()))
        self.deepstack = Deepstack()
        self.step = -1
        self.ranked: dict[tuple[int, int], Tensor] = {}
        self.attention_inputs: dict[int, tuple] = {}  # of the attention before a drop, at this step
        self.rows: dict[int, Tensor] = {}  # the attention its last token paid
        self.entered: dict[int, Tensor] = {}  # hidden states at the entrance of layers, for a ranking
        self.layer_kwargs: dict[str, Any] = {}  # what the model passes to its layers in the prefill

    def begin_prefill(self, prompt: Prompt, stages: dict[int, Stage]) -> None:
        """Begin with a prompt, on the host, and what is left of it by the first layer of each stage."""
        self.prompt, self.stages = prompt, stages
        self.types, self.total = token_types(prompt.visual, prompt.real), prompt.cells.sum(1)
        self.step, self.ranked = 0, {}
        self.reread = torch.zeros_like(self.total)

    def begin_decode(self) -> None:
        """Begin the next decode step."""
        self.step += 1
        self.entered.clear()

    def remember_attention(self, index: int, kwargs: dict[str, Any]) -> None:
        """Keep the inputs of the attention before layer ``index``, in case they are needed."""
        inputs = kwargs["hidden_states"], kwargs["position_embeddings"], cache_of(kwargs)
        self.attention_inputs[index] = inputs

    def remember_input(self, index: int, hidden: Float[Tensor, "rows length width"]) -> None:
        """Keep what enters layer ``index`` in the prefill."""
        if self.step == 0:
            self.entered[index] = hidden

    def before(self, index: int) -> Stage:
        """The stage before the one that begins at layer ``index``."""
        return self.stages[self.starts[self.starts.index(index) - 1]]

    def choose(
        self, index: int, stage: Stage, hidden: Float[Tensor, "rows length width"]
    ) -> tuple[Bool[Tensor, "rows left"], Float[Tensor, "rows length width"]]:
        """Which of the stage's columns stay, and the hidden states, which a schedule may recycle.

        An evicted column never comes back. Where a schedule restores, the columns are those that are attended
        to at this step.
        """
        view = self._view(index, hidden) if self.step == 0 and self.rank is not None else None
        stay = self._stay(index, stage, view)
        recycle = getattr(self.schedule, "recycle", None)
        if recycle is None or view is None or torch.equal(stay, stage.real):
            return stay, hidden
        return recycle(view, stay)

    def _stay(self, index: int, stage: Stage, view: View | None) -> Bool[Tensor, "rows left"]:
        """Which of the stage's columns stay by rank and count."""
        if self.count is not None and view is not None:
            count, before = self.count(view).cpu(), view.columns.cells.sum(1)
            scores = partial(self._own_scores, view)
            return stay_columns(self.prompt, stage, count, count < before, scores, self.schedule.newline)
        keep = self.schedule.entering(index, self.step, partial(self._mass, index))
        if isinstance(keep, Tensor):
            keep = keep.cpu()
            count = fraction_count(self.total, keep)
        elif keep >= (1.0 if self.restores else stage.keep):
            return stage.real
        else:
            stage.keep = keep
            count = fraction_count(self.total, keep) if keep > 0 else torch.zeros_like(self.total)
            keep = torch.full((len(self.total),), keep, dtype=torch.float64)  # 0.9999999999999998 is below 1
        scores = partial(self._scores, index) if view is None else partial(self._own_scores, view)
        return stay_columns(self.prompt, stage, count, keep < 1, scores, self.schedule.newline)

    def _view(self, index: int, hidden: Float[Tensor, "rows length width"]) -> View:
        """What a schedule's own ranking may read at the entrance of layer ``index``."""
        stage = self.before(index)

        def rows(queries: Int[Tensor, "rows queries"], rotate: bool) -> Tensor:
            place = (0, index - 1)
            known = self.ranked.get(place, torch.zeros(len(queries), dtype=torch.long))
            # a row without an image needs no ranking, whatever the other rows need
            self.ranked[place] = known + (self.total > 0) * queries.shape[1]
            inputs, rotation, _ = self.attention_inputs[index]
            attention = attention_of(self.decoder, index - 1)
            return chosen_rows(attention, inputs, rotation, queries, stage.real, rotate)

        return View(
            index,
            self.prompt.gather(stage.order, stage.real),
            stage.order,
            self.prompt,
            self.entered[0],
            self.entered[index - 1],
            hidden,
            rows,
            partial(self._without, index),
        )

    def _without(self, index: int, unread: Bool[Tensor, "rows length"]) -> Float[Tensor, "rows heads length"]:
        """What the last token attends to in the layer before ``index`` if nobody reads some of the prompt.

        The layers before ``index`` run a second time, by themselves: no hook sees it but the one that keeps
        the attention's inputs, and no cache is written.
        """
        hidden, attn = self.entered[0], str(self.decoder.config._attn_implementation)
        real = self.prompt.real & ~unread
        length = real.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        # a column that nobody reads attends to itself: a softmax over nothing would be NaN
        allowed = causal & real[:, None, :] | torch.eye(length, dtype=torch.bool)
        mask = as_given(allowed[:, None].to(hidden.device), hidden, attn)
        changed = {"attention_mask": mask, "use_cache": False, "cache": None, "past_key_values": None}
        kwargs = self.layer_kwargs | {k: v for k, v in changed.items() if k in self.layer_kwargs}
        own_inputs = self.attention_inputs[index]
        columns = torch.arange(length).expand(len(real), -1)
        for number, layer in enumerate(self.decoder.layers[:index]):
            hidden = layer.forward(hidden, **kwargs)
            hidden = self.deepstack.add(number, hidden, columns, self.prompt.real)
        inputs, rotation, _ = self.attention_inputs[index]
        self.attention_inputs[index] = own_inputs
        self.reread = torch.where(self.total > 0, index, self.reread)
        place = (0, index - 1)
        self.ranked[place] = self.ranked.get(place, torch.zeros_like(self.total)) + (self.total > 0)
        last = torch.full((len(real), 1), length - 1)
        attention = attention_of(self.decoder, index - 1)
        return chosen_rows(attention, inputs, rotation, last, real)[:, :, 0]

    def _own_scores(self, view: View, _needed: Bool[Tensor, "rows"]) -> Float[Tensor, "rows left"]:
        """The schedule's own ranking; the last column comes first, as in FastV's."""
        assert self.rank is not None, "there is a view only for a schedule that ranks"
        scores = self.rank(view).float().cpu().clone()
        scores[:, -1] = torch.inf
        return scores

    def _attention(self, index: int, needed: Bool[Tensor, "rows"]) -> Float[Tensor, "rows heads keys"]:
        """What the newest token attended to in the layer before ``index``, computed at most once a step."""
        if index not in self.rows:
            hidden, rotation, cache = self.attention_inputs[index]
            real = self.before(index).real
            # the newest token sees what is left of the prompt, and every token of the answer: one a decode
            # step
            attn_mask = torch.cat([real, real.new_ones(len(real), self.step)], 1)[:, None].to(hidden.device)
            attention = attention_of(self.decoder, index - 1)
            self.rows[index] = last_rows(attention, hidden, rotation, cache, attn_mask)[:, :, 0]
        # a row counts for itself: its cost must not depend on which other rows are in the batch
        place = (self.step, index - 1)
        self.ranked[place] = self.ranked.get(place, torch.zeros_like(needed)) | needed
        return self.rows[index]

    def _mass(self, index: int) -> Float[Tensor, "rows heads types"]:
        """The same by type of token, as a schedule may read it."""
        attention = self._attention(index, torch.ones_like(self.total, dtype=torch.bool))
        types = self.types.gather(1, self.before(index).order)
        types = torch.cat([types, types.new_full((len(types), self.step), RESPONSE)], 1)
        return type_mass(attention[:, :, None], types.to(attention.device))[:, 0]

    def _scores(self, index: int, needed: Bool[Tensor, "rows"]) -> Float[Tensor, "rows left"]:
        """The same averaged over heads (FastV's ranking), for the columns that layer ``index`` may keep."""
        before = self.before(index).order
        rows = (
            self._attention(index, needed).mean(1).cpu()[:, : before.shape[1]]
        )  # without the answer's tokens
        # the layer before may hold more columns than this stage: go through the prompt's own numbering
        prompt = torch.zeros(self.prompt.visual.shape, dtype=rows.dtype).scatter(1, before, rows)
        prompt[:, -1] = torch.inf  # the answer is predicted from the last column: it comes first
        return prompt.gather(1, self.stages[index].order)
