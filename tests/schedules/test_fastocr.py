"""A step that attends to a share of the image and evicts nothing equals one with a mask, without a cache."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from reference import cache_bytes, generated, prompt, vlm_of

from tokensel.cost import held_tokens, kv_bytes
from tokensel.cost.answers import answer_work, work_cost
from tokensel.methods import check_method
from tokensel.schedules import FastOcr, Fixed
from tokensel.utils.errors import TokenselError

STEPS = 16


@torch.no_grad()
def reference(vlm, reduced, schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy decoding without a cache; from a layer on, a step's token sees the cells it ranks highest."""
    lm, start = vlm.model.model.language_model, schedule.layer
    embeds, mask = reduced["inputs_embeds"], reduced["attention_mask"]
    rows, length = mask.shape
    positions = reduced.get("position_ids", (mask.cumsum(1) - 1).clamp(min=0))
    cells = reduced.visual & ~reduced.newlines
    seen = [torch.ones(rows, length, dtype=torch.bool)]  # by step

    def hide(index, _layer, args, kwargs):
        columns = args[0].shape[1]
        allowed = mask.bool()[:, None] & torch.ones(columns, columns, dtype=torch.bool).tril()
        if index >= start:
            for step, chosen in enumerate(seen):
                if length - 1 + step < columns:
                    allowed[:, length - 1 + step, :length] &= chosen
        allowed = allowed | torch.eye(columns, dtype=torch.bool)
        return args, kwargs | {
            "attention_mask": torch.zeros(allowed.shape).masked_fill_(~allowed, -1e30)[:, None]
        }

    def run(**options):
        return lm(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, **options
        )

    attn = vlm.model.config._attn_implementation
    vlm.model.set_attn_implementation("eager")
    hooks = [
        layer.register_forward_pre_hook(partial(hide, i), with_kwargs=True)
        for i, layer in enumerate(lm.layers)
    ]
    tokens, logits = [], []
    for step in range(STEPS):
        if step:
            paid = run(output_attentions=True).attentions[start - 1][:, :, -1].mean(1)
            chosen = ~cells
            for row in range(rows):
                places = cells[row].nonzero()[:, 0].tolist()
                count = max(1, round(schedule.keep * len(places))) if places else 0
                best = sorted(places, key=lambda c, row=row: (-float(paid[row, c]), c))[:count]
                chosen[row, best] = True
            seen.append(chosen)
        logits.append(vlm.model.lm_head(run().last_hidden_state[:, -1]))
        tokens.append(logits[-1].argmax(-1))
        embeds = torch.cat([embeds, lm.embed_tokens(tokens[-1])[:, None]], 1)
        mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
    for hook in hooks:
        hook.remove()
    vlm.model.set_attn_implementation(attn)
    return torch.stack(tokens, 1), torch.stack(logits, 1)


@pytest.mark.parametrize("rows", [[0], [0, 1, 3]], ids=["one", "ragged"])
@pytest.mark.parametrize("schedule", [FastOcr(2, 0.2), FastOcr(1, 0.05)], ids=["second", "first"])
@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
def test_attending_to_a_share_equals_masking(text, schedule, rows):
    vlm = vlm_of(text)
    reduced = prompt(vlm, rows)
    out, pruning = generated(vlm, reduced, schedule)
    tokens, logits = reference(vlm, reduced, schedule)
    assert torch.equal(out.sequences, tokens)
    assert torch.allclose(torch.stack(out.logits, 1), logits, atol=1e-4)
    assert [drop.step for drop in pruning.drops] == list(range(1, STEPS))


def test_what_is_attended_to_moves_and_comes_back():
    vlm = vlm_of("llama")
    _, pruning = generated(vlm, prompt(vlm, [0]), FastOcr(2, 0.2))
    chosen = [set(drop.columns[0].tolist()) for drop in pruning.drops]
    gone_once = {c for one, two in pairwise(chosen) for c in one - two}
    back = {c for before, after in pairwise(chosen) for c in after - before}
    assert gone_once & back, "a cell that one step leaves out is chosen by a later one"


def test_every_cache_holds_the_whole_prompt_and_is_counted_so():
    vlm, schedule = vlm_of("llama"), FastOcr(2, 0.2)
    reduced = prompt(vlm, [0])
    with cache_bytes(vlm) as seen:
        output = vlm.generate_output(reduced, STEPS, schedule)
    config, text = vlm.model.config.text_config, int((~reduced.visual).sum())
    cached, left = (torch.stack(part)[:, :, 0] for part in (output.pruning.cached, output.pruning.left))
    bytes_each = kv_bytes(config, 1, 4) // config.num_hidden_layers
    assert seen == (held_tokens(text, cached.numpy()) * bytes_each).tolist()
    assert bool((cached == int(reduced.visual.sum())).all())
    cells = torch.stack(output.pruning.cells)[:, :, 0]
    assert cells[1:, 2:].unique().tolist() == [round(0.2 * int(reduced.n_visual))]
    assert torch.equal(left[:, :2], cached[:, :2]) and torch.equal(left[0], cached[0])
    (work,) = answer_work(vlm.model, reduced, output)
    flops, mean_bytes = work_cost(vlm.model.config, work, 4)
    assert mean_bytes == pytest.approx(sum(map(sum, seen)) / len(seen))
    (full,) = answer_work(vlm.model, reduced, vlm.generate_output(reduced, STEPS))
    (fixed,) = answer_work(vlm.model, reduced, vlm.generate_output(reduced, STEPS, Fixed(2, 0.2)))
    assert flops < work_cost(vlm.model.config, full, 4)[0]
    assert mean_bytes > work_cost(vlm.model.config, fixed, 4)[1]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_ratio_of_1_changes_no_logit_and_rows_do_not_change_one_another(attn):
    vlm = vlm_of("llama", attn)
    reduced = prompt(vlm, [None, 0, 1])
    plain, _ = generated(vlm, reduced, FastOcr(2, 1.0), 6)
    whole = vlm.model.generate(
        **reduced, output_logits=True, return_dict_in_generate=True, do_sample=False, max_new_tokens=6
    )
    assert all(torch.equal(*pair) for pair in zip(plain.logits, whole.logits, strict=True))
    some, _ = generated(vlm, reduced, FastOcr(2, 0.1), 6)
    assert torch.allclose(some.logits[3][0], whole.logits[3][0], atol=1e-5)  # a row without an image
    assert not torch.allclose(some.logits[3][1], whole.logits[3][1], atol=1e-4)


def test_it_is_a_method_whose_options_are_checked():
    row = check_method("fastocr")
    assert row.schedule == "fastocr" and row.uses_keep
    with pytest.raises(TokenselError, match=r"keep is 1\.5"):
        FastOcr(2, 1.5)
