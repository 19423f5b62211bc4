"""Videos: reduced where the family can, one line where it cannot.

The processors' parts for videos need torchvision, so that what they return is written here by hand.
"""

import pytest
import tiny_families
import torch
from test_laws import generated, masked_logits
from tiny import noise_image

from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Vlm, encode, reduce, reduce_inputs

# rows of images and clips by their size in patches: time, height and width; an image has one step of time
IMAGE, CLIP, LONG = ("image", (1, 6, 8)), ("video", (2, 4, 6)), ("video", (3, 6, 4))
BATCHES = ([[CLIP]], [[LONG], [IMAGE, CLIP]], [[CLIP, LONG], []], [[CLIP, IMAGE, IMAGE], [LONG], [IMAGE]])


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def qwen(request, tmp_path_factory) -> Vlm:
    return tiny_families.loaded(request.param, tmp_path_factory.mktemp(request.param))


def inputs_of(vlm: Vlm, rows) -> dict[str, torch.Tensor]:
    """What the processor of a Qwen-VL returns for rows of images and clips, padded on the left."""
    config, tokenizer, prompts = vlm.model.config, vlm.processor.tokenizer, []

    def words(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    pixels, grids = {"image": [], "video": []}, {"image": [], "video": []}
    for number, row in enumerate(rows):
        ids = words("look")
        for kind, (time, high, wide) in row:
            place, cells = getattr(config, f"{kind}_token_id"), high * wide // 4
            # in Qwen3-VL each step of time stands behind its time stamp
            steps = time if kind == "video" and config.model_type == "qwen3_vl" else 1
            for step in range(steps):
                ids += words(f"<{step}.5 seconds>") if steps > 1 else []
                ids += [config.vision_start_token_id, *[place] * (time * cells // steps)]
                ids += [config.vision_end_token_id]
            noise = torch.Generator().manual_seed(len(ids) + sum(map(len, pixels.values())))
            pixels[kind].append(torch.randn(time * high * wide, 3 * 2 * 4 * 4, generator=noise))
            grids[kind].append([time, high, wide])
        prompts.append(ids + words("what" + "?" * number))
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    out = {"input_ids": ids, "attention_mask": (ids != 0).long(), "mm_token_type_ids": types}
    for kind, values in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels[kind]:
            out |= {values: torch.cat(pixels[kind]), f"{kind}_grid_thw": torch.tensor(grids[kind])}
    if grids["video"] and config.model_type == "qwen2_5_vl":
        out["second_per_grid_ts"] = torch.linspace(0.5, 1.5, len(grids["video"]))
    return out


@pytest.mark.parametrize("rows", BATCHES)
def test_nothing_dropped_changes_no_logit(qwen, rows):
    inputs = inputs_of(qwen, rows)
    tokens, logits = generated(qwen, inputs)
    ours, ours_logits = generated(qwen, reduce_inputs(qwen.model, inputs))
    assert (ours_logits - logits).abs().max() == 0.0 and torch.equal(ours, tokens)
    assert logits.std() > 0.3


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("scorer", ["norm", "uniform"])
def test_half_dropped_equals_the_masked_full_prompt(qwen, rows, scorer):
    inputs = inputs_of(qwen, rows)
    encoded = encode(qwen.model, inputs)
    reduced = reduce(encoded, make_scorer(scorer), 0.5)
    tokens, logits = generated(qwen, reduced)
    kept = reduced.kept.flatten()[encoded.layout.source]
    masked = masked_logits(qwen, inputs, kept, tokens)
    assert (logits - masked).abs().max() < 1e-4
    whole = masked_logits(qwen, inputs, torch.ones_like(kept), tokens)
    assert (whole - masked).abs().max() > 1e-2


@pytest.mark.parametrize("scorer", ["norm", "random", "diversity"])
def test_a_batch_equals_its_rows_alone(qwen, scorer):
    inputs = inputs_of(qwen, BATCHES[3])
    batch = reduce_inputs(qwen.model, inputs, make_scorer(scorer), 0.4)
    tokens, logits = generated(qwen, batch)
    # sizes and patches of the images and clips of each row
    parts = {"image": [2, 0, 1], "video": [1, 1, 0]}
    start = {"image": 0, "video": 0}
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        alone = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
        for kind, values in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            some = slice(start[kind], start[kind] + parts[kind][row])
            start[kind] = some.stop
            if some.stop > some.start:
                grids = inputs[f"{kind}_grid_thw"]
                patches = inputs[values].split(grids.prod(1).tolist())[some]
                alone |= {f"{kind}_grid_thw": grids[some], values: torch.cat(patches)}
                if kind == "video" and "second_per_grid_ts" in inputs:
                    alone["second_per_grid_ts"] = inputs["second_per_grid_ts"][some]
        reduced = reduce_inputs(qwen.model, alone, make_scorer(scorer), 0.4)
        assert torch.equal(reduced.n_visual, batch.n_visual[row : row + 1])
        ours, ours_logits = generated(qwen, reduced)
        assert torch.equal(ours[0], tokens[row]) and (ours_logits[0] - logits[row]).abs().max() < 1e-4


def test_a_budget_is_one_for_a_clip_or_one_for_each_step_of_time(qwen):
    encoded = encode(qwen.model, inputs_of(qwen, [[LONG], [IMAGE, CLIP]]))
    assert encoded.layout.tiles == [3, 1, 2] and encoded.n_visual.tolist() == [18, 24]
    clip = reduce(encoded, make_scorer("norm"), 0.5).kept
    assert clip.sum(1).split([3, 1, 2])[0].sum() == 9 and clip[3].sum() == 6 and clip[4:].sum() == 6
    assert len(set(clip[:3].sum(1).tolist())) > 1  # a step of time may have more than another
    step = reduce(encoded, make_scorer("norm"), 0.5, budget="tile").kept
    assert step.sum(1).tolist() == [3, 3, 3, 6, 3, 3]


def test_beams_of_clips_equal_those_of_the_stock_model(qwen):
    inputs = inputs_of(qwen, [[CLIP, IMAGE]])
    options = dict(num_beams=2, num_return_sequences=2, max_new_tokens=5, do_sample=False)
    ours = qwen.model.generate(**reduce_inputs(qwen.model, inputs), **options)
    assert torch.equal(ours, qwen.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :])


def test_clips_and_placeholders_that_do_not_match_get_one_line(qwen):
    inputs = inputs_of(qwen, [[CLIP, IMAGE]])
    swapped = torch.where(
        inputs["mm_token_type_ids"] == 2, qwen.model.config.image_token_id, inputs["input_ids"]
    )
    without = {name: value for name, value in inputs.items() if name != "video_grid_thw"}
    longer = inputs | {"video_grid_thw": torch.tensor([[3, 4, 6]])}
    for given, line in (
        (inputs | {"input_ids": swapped}, "placeholders in input_ids do not match"),
        (longer, "placeholders in input_ids do not match"),
        (without, "without video_grid_thw"),
        ({**inputs, "pixel_values_videos": None}, "image placeholders in input_ids, but the images give 12"),
    ):
        with pytest.raises(TokenselError, match=line) as caught:
            encode(qwen.model, given)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["internvl", "smolvlm"])
def test_frames_that_arrive_as_pixel_values_are_an_image_each(family, tmp_path):
    vlm = tiny_families.loaded(family, tmp_path)
    # as their processors write a video: uncut frames behind their number or time stamp
    frames = [noise_image(24, 24, seed) for seed in range(3)]
    before, after = {
        "internvl": ("<img>", "</img>"),
        "smolvlm": ("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
    }[family]
    token = vlm.processor.image_token
    text = "".join(f"\nFrame{n}: {before}{token * 9}{after}" for n in range(3)) + "what?"
    cut = {"internvl": {"crop_to_patches": False}, "smolvlm": {"do_image_splitting": False}}[family]
    nested = [frames] if family == "smolvlm" else frames
    pixels = vlm.processor.image_processor(nested, return_tensors="pt", **cut)
    inputs = dict(vlm.processor.tokenizer([text], return_tensors="pt"))
    inputs |= {name: pixels[name] for name in ("pixel_values", "pixel_attention_mask") if name in pixels}
    encoded = encode(vlm.model, inputs)
    assert encoded.layout.tiles == [1, 1, 1]
    _, logits = generated(vlm, inputs)
    assert (generated(vlm, reduce(encoded))[1] - logits).abs().max() == 0.0
    reduced = reduce(encoded, make_scorer("norm"), 0.4)
    assert reduced.kept.sum(1).tolist() == [4, 4, 4]
    tokens, logits = generated(vlm, reduced)
    masked = masked_logits(vlm, inputs, reduced.kept.flatten()[encoded.layout.source], tokens)
    assert (logits - masked).abs().max() < 1e-4
