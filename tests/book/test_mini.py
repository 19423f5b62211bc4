"""The small world is what its docstrings say; its training batches are what the stock model sees."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokensel.book.mini import train as training
from tokensel.book.mini.canvas import TILE
from tokensel.book.mini.losses import Heads, TrainingLosses
from tokensel.book.mini.model import KINDS, SHRINKS, build_mini_model, build_processor, build_tokenizer
from tokensel.book.mini.packing import HEAD, drills, layout, pack_questions, tiles
from tokensel.book.mini.probes import UNASKED, middles, ordinals, places
from tokensel.book.mini.recipe import ONE_TILE, Recipe, Stage
from tokensel.book.mini.step_batches import StepBatch, StepBatches, labels_of
from tokensel.book.mini.suite import BENCHMARKS
from tokensel.book.mini.words import ALPHABET, SHAPES, SPLITS
from tokensel.book.mini.world import DRAW, SIZES, draw_page
from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.utils.files import load_tensors
from tokensel.vlm import load_vlm, reduce_inputs
from tokensel.vlm.native import OFF


@pytest.fixture(scope="module")
def models():
    def make(kind):
        torch.manual_seed(0)
        return build_mini_model(kind).eval()

    return {kind: make(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def model(models):
    return models["llava-next"]


@pytest.mark.parametrize("task", DRAW)
def test_a_page_is_a_function_of_task_split_and_index(task):
    first, again, other = draw_page(task, "test", 3), draw_page(task, "test", 3), draw_page(task, "test", 4)
    assert np.array_equal(first.image, again.image)
    assert first.questions == again.questions
    assert first.image.size != other.image.size or not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("task", ["forms", "posters", "scene_text", "transcribe"])
def test_no_longer_answer_of_the_test_split_is_drawn_in_training(task):
    def answers(split):
        pages = (draw_page(task, split, index) for index in range(150))
        return {
            word for page in pages for qa in page.questions for word in qa.answers[0].split() if len(word) > 3
        }

    assert answers("test").isdisjoint(answers("train"))


@pytest.mark.parametrize("kind, seed, science", [("llava-next", 5, 3.0), ("llava-onevision", 6, 8.0)])
def test_the_recipe_of_a_shipped_model_can_be_read(kind, seed, science):
    path = Path(__file__).parents[2] / "data" / "mini" / kind / "recipe.json"
    recipe, content = Recipe.load(path), json.loads(path.read_text())
    assert recipe.seed == seed and recipe.stages[0].oversample["science"] == science
    again = json.loads(json.dumps(asdict(recipe)).replace('"oversample":', '"oftener":'))
    # the share of hidden patches came later: a recipe without it has none; so did stages without probes
    content["stages"] = [{"probes": True} | stage for stage in content["stages"]]
    assert again == {name: ({"hidden": 0.0} | content)[name] for name in again}


# of the questions and answers of pages 0 to 19 in train, validation and test: the benchmarks may never change
DRAWN = {
    "forms": "89cd310152346c02",
    "charts": "6fd3a973f7e31b66",
    "posters": "987da3b4da668d0a",
    "scene_text": "0a58a0b9ea9259db",
    "attributes": "85f4fbc8134a62d3",
    "science": "25c60a84ccac93a0",
    "diagrams": "b8cbcfddbc3fe20b",
    "mixed": "b48506f5a5450d3b",
    "transcribe": "f0f79a182f69ced3",
    "describe": "a7201c887b7d1e27",
}


@pytest.mark.parametrize("task", DRAW)
def test_the_world_is_drawn_as_ever(task):
    asked = [
        [qa.question, qa.answers, qa.category, qa.options]
        for split in SPLITS
        for index in range(20)
        for qa in draw_page(task, split, index).questions
    ]
    assert hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16] == DRAWN[task]


def test_an_unknown_task_or_split_is_named():
    with pytest.raises(TokenselError, match="formz"):
        draw_page("formz", "test", 0)
    with pytest.raises(TokenselError, match="dev"):
        draw_page("forms", "dev", 0)


@pytest.mark.parametrize("task", BENCHMARKS)
def test_a_benchmark_row_has_the_columns_of_the_real_ones(task):
    rows = BENCHMARKS[task].load("test", 8)
    assert {"image", "question", "answers", "question_id", "options"} <= set(rows.column_names)
    assert len(set(rows["question_id"])) == 8
    for row in rows:
        assert row["answers"][0] and (not row["options"] or row["answers"][0] in "ABCD")
        assert "<unk>" not in build_tokenizer().convert_ids_to_tokens(
            build_tokenizer()(f"{row['question']} {row['answers'][0]}").input_ids
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_training_tiles_and_layout_are_those_of_the_processor_and_the_stock_model(models, kind, size):
    model, processor = models[kind], build_processor(kind)
    page = draw_page("forms", "train", 1, size)
    inputs = processor(images=page.image, text="USER:<image>\nASSISTANT:", return_tensors="pt")
    ours, placeholders = tiles(page), (inputs["input_ids"] == model.config.image_token_id).sum()
    assert ours.shape == inputs["pixel_values"][0].shape
    assert torch.allclose(
        ours, inputs["pixel_values"][0], atol=0.02
    )  # the processor rounds the thumbnail otherwise
    visual = TrainingLosses(model, Heads(128, 192), bf16=False).visual([size])
    assert (
        visual[size, False] == len(layout(model.model, size)) == len(layout(models["llava-next"].model, size))
    )
    assert placeholders == visual.get((size, True), visual[size, False])
    shrinks = kind == "llava-onevision" and size[0] * size[1] > 2 * 1.1**2 * TILE**2  # the model's own rule
    assert (placeholders < visual[size, False]) == shrinks


def test_a_letter_knows_what_stands_before_it_in_its_word():
    page = draw_page("forms", "train", 3, (64, 128))
    drawn, alphabet = page.letters[1:], " " + ALPHABET  # without the thumbnail, in which nothing can be read
    rows = np.concatenate([drawn[0], drawn[1]], 1), np.concatenate([page.before[1], page.before[2]], 1)
    found = set()
    for letters, before in zip(*rows):
        for place in letters.nonzero()[0]:
            found.add((alphabet[before[place]] + alphabet[letters[place]]).strip())
    words = [
        *(qa.answers[0] for qa in page.questions),
        *(qa.question.split()[-1].strip("?") for qa in page.questions),
    ]
    assert found == {
        pair for word in words for pair in (word[0], *(word[i : i + 2] for i in range(len(word) - 1)))
    }
    assert not page.before[0].any() and not page.before[1:][drawn == 0].any()


@pytest.mark.parametrize("index", range(4))
def test_a_shape_in_a_chain_knows_its_neighbours(index):
    page = draw_page("diagrams", "train", index, (128, 128))
    answers = {qa.question.split(" A. ")[0]: qa.options["ABCD".index(qa.answers[0])] for qa in page.questions}
    names, here = ["", *SHAPES, "end"], page.follower[1:] > 0
    assert here.sum() == sum(question.startswith("what comes after") for question in answers) + 1
    for kind, leader, follower in zip(page.objects[1:][here], page.leader[1:][here], page.follower[1:][here]):
        shape = names[kind]
        assert names[leader] == answers.get(f"what comes before the {shape}?", "end")
        assert names[follower] == answers.get(f"what comes after the {shape}?", "end")
    assert not draw_page("attributes", "train", index).leader.any()


def test_a_spot_lies_where_the_answer_says():
    for index in range(30):
        for qa in draw_page("attributes", "train", index).practice:
            for word, (axis, sign) in {
                "left": (0, -1),
                "right": (0, 1),
                "top": (1, -1),
                "bottom": (1, 1),
            }.items():
                assert word not in qa.answers[0].split() or qa.spot[axis] * sign > 0, qa


@pytest.mark.parametrize("task", ["science", "diagrams", "forms"])
def test_a_letter_is_asked_for_in_words_before_the_options_and_where_the_answer_begins(task):
    page, tokenizer = draw_page(task, "train", 3), build_tokenizer()
    asked = page.questions + page.practice
    packed = pack_questions([asked], 10, np.random.default_rng(0))
    where = packed.named[0] >= 0
    wanted = [qa.named for qa in asked if qa.options or (qa.named.isdigit() and int(qa.named) < 10)]
    said = [tokenizer.decode([word]).strip() for word in packed.named[0][where]]
    assert said[::2] == said[1::2] == wanted
    assert [tokenizer.decode([word]) for word in packed.ids[0][where]] == ["?", "ASSISTANT:"] * len(wanted)
    assert task == "forms" or all(qa.named not in "ABCD" for qa in page.questions)


def test_the_place_asked_about_is_asked_for_where_the_answer_begins(model):
    page, size = draw_page("attributes", "train", 1, (64, 128)), (64, 128)
    losses = TrainingLosses(model, Heads(128, model.config.text_config.hidden_size), bf16=False)
    packed = pack_questions([page.practice], len(losses.layout(size)), np.random.default_rng(0))
    where = ~packed.spots[0].isnan().any(1)
    asked = [qa for qa in page.practice if qa.spot]
    assert torch.allclose(packed.spots[0][where], torch.tensor([qa.spot for qa in asked]))
    assistant = build_tokenizer().convert_tokens_to_ids("ASSISTANT:")
    assert (packed.ids[0][where] == assistant).all() and len(asked) < len(
        page.practice
    )  # not where things are counted
    batch = StepBatch(tiles(page), labels_of([page]), size, tasks=("attributes",), packed=packed)
    with torch.no_grad():
        _, loss, _ = losses.forward(batch, tower=False)
        packed.spots += 1
        _, further, counts = losses.forward(batch, tower=False)
    assert further != loss and counts["across"][1] <= len(asked)


@pytest.mark.parametrize("size", [(64, 64), (128, 96), (128, 128)])
def test_places_count_rows_and_columns_of_the_packed_tokens(model, size):
    index = layout(model.model, size)
    row, column = places(index, thumbnail=size != (64, 64))
    ends, small = index < 0, 64 * (size != (64, 64))
    assert (row[ends] == UNASKED).all() and (column[ends] == UNASKED).all() and ends.sum() == size[0] // 8
    large = ~ends & (torch.arange(len(index)) >= small)
    seen = list(zip(row[large].tolist(), column[large].tolist()))
    assert seen == [(y, x) for y in range(size[0] // 8) for x in range(size[1] // 8)]
    far = middles(row, column, size)
    assert torch.allclose(far[large].mean(0), torch.zeros(2), atol=1e-6), (
        "the middle of the page is the middle"
    )
    assert (far[large].abs() < 1).all() and (
        small == 0 or torch.allclose(far[:small].mean(0), torch.zeros(2), atol=1e-6)
    )
    assert (row[:small] >= 16).all() and len(set(zip(row[:small].tolist(), column[:small].tolist()))) == small


def test_things_of_a_kind_are_counted_one_by_one():
    assert ordinals(torch.tensor([[0, 2, 1, 2, 0, 2, 1]])).tolist() == [[0, 1, 1, 2, 0, 3, 2]]


@pytest.mark.parametrize(
    "kind, shrunk", [("llava-next", False), ("llava-onevision", False), ("llava-onevision", True)]
)
def test_packed_questions_see_what_they_would_see_alone(models, kind, shrunk, monkeypatch):
    """Logits behind a page with many questions equal those of the stock forward with each question alone."""
    model, processor = models[kind], build_processor(kind)
    page, size = draw_page("charts", "train", 5, (128, 112)), (128, 112)
    losses = TrainingLosses(model, Heads(128, model.config.text_config.hidden_size), bf16=False)
    packed = pack_questions(
        [page.questions[:3]], losses.visual([size])[size, shrunk], np.random.default_rng(0)
    )
    with torch.no_grad():
        batch = StepBatch(tiles(page), labels_of([page]), size, shrunk, ("charts",), packed)
        hidden, _, _ = losses.forward(batch, tower=False)
        ours = model.lm_head(hidden)[0][packed.labels[0] >= 0]
        if kind == "llava-onevision" and not shrunk:
            processor.vision_aspect_ratio = OFF
            monkeypatch.setattr(model.config, "vision_aspect_ratio", OFF)
        rows = []
        for qa in page.questions[:3]:
            prompt = f"USER:<image>\n{qa.question}ASSISTANT:"
            inputs = processor(images=page.image, text=prompt + f"{qa.answers[0]}</s>", return_tensors="pt")
            inputs["pixel_values"] = tiles(page)[None]
            said = len(build_tokenizer()(f"{qa.answers[0]}</s>", add_special_tokens=False).input_ids)
            rows.append(model(**inputs).logits[0, -said - 1 : -1])
    assert torch.allclose(ours, torch.cat(rows), atol=1e-4)


def test_questions_of_a_page_do_not_see_each_other():
    pages = [draw_page("attributes", "train", index, (64, 128)) for index in range(2)]
    packed = pack_questions([page.questions[:3] for page in pages], 10, np.random.default_rng(0))
    prefix, mask = HEAD + 10, packed.mask()
    for row in range(2):
        starts = (packed.positions[row, prefix:] == prefix).nonzero().flatten().tolist()
        assert len(starts) == 3
        assert (mask[row, 0, prefix + starts[1] :, prefix + starts[0] : prefix + starts[1]] < -1e30).all()
        assert (mask[row, 0, prefix + starts[1] :, :prefix] == 0).all()


def test_a_drill_names_one_of_its_options_and_answers_with_its_letter():
    said = build_tokenizer().batch_decode(drills(np.random.default_rng(0), 2, 3).ids)
    for turn in "".join(said).split("</s>")[:-1]:
        question, letter = turn.replace("<pad>", "").split("ASSISTANT:")
        named, listed = question.strip().removeprefix("which is ").split("? ")
        assert f"{letter.strip()}. {named}" in listed


TINY = Recipe(
    tower_steps=2,
    tower_pages=2,
    head_steps=3,
    stages=(Stage("tile", 2, 2, ONE_TILE, tower=False), Stage("page", 2, 10, SIZES, drills=2)),
)


def train(out, workers=1, start=None, kind="llava-next"):
    settings = dict(
        save_every=1, device="cpu", workers=workers, bf16=False, compiled=False, start=start, kind=kind
    )
    return training.train_mini(out, TINY, **settings)


def weights(folder):
    return load_tensors(folder / "model.safetensors")[0]


def test_a_stopped_training_ends_at_the_same_weights(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole")
    calls = {"left": 5}  # stops in the middle of the second phase

    def stop(self, batch, tower, real=TrainingLosses.answer_loss):
        calls["left"] -= 1
        if calls["left"] == 2:
            raise KeyboardInterrupt
        return real(self, batch, tower)

    monkeypatch.setattr(TrainingLosses, "answer_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut")
    monkeypatch.undo()
    one, two = weights(whole), weights(train(tmp_path / "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_finished_model_is_trained_on_and_only_new_heads_are_fitted_first(tmp_path, monkeypatch):
    first = train(tmp_path / "first")

    def stop(self, batch, tower):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingLosses, "answer_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "second", start=first)
    monkeypatch.undo()
    begun, old = load_tensors(tmp_path / "second" / "checkpoint.safetensors")[0], weights(first)
    before = build_mini_model()
    before.load_state_dict(type(before).from_pretrained(first).state_dict())
    assert all(torch.equal(begun[f"model.{name}"], tensor) for name, tensor in before.state_dict().items())
    heads = len((tmp_path / "second" / "history.heads.jsonl").read_text().splitlines())
    assert heads == TINY.head_steps and not (tmp_path / "second" / "history.tower.jsonl").exists()
    new = weights(train(tmp_path / "second", start=first))
    assert any(not torch.equal(new[name], tensor) for name, tensor in old.items())


def test_two_workers_share_each_batch_and_end_at_the_same_weights_again(tmp_path):
    whole, *halves = (
        StepBatches(TINY, "tower", range(9), {}, worker, count) for worker, count in ((0, 1), (0, 2), (1, 2))
    )
    tasks = whole.pages(0, 3, 5)[0]
    assert [tasks[0::2], tasks[1::2]] == [half.pages(0, 3, 5)[0] for half in halves]
    one, two = (weights(train(tmp_path / name, workers=2)) for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_history_has_each_step_once_and_counts_right_answers(tmp_path):
    train(tmp_path)
    train(tmp_path)  # from its last checkpoint on
    lines = [json.loads(line) for line in (tmp_path / "history.language.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(0 <= right <= total for line in lines for right, total in line["tasks"].values())
    assert "drill" in lines[3]["tasks"] and "drill" not in lines[0]["tasks"]


def test_a_model_of_the_other_kind_lends_what_fits_and_every_phase_is_run(tmp_path):
    first, called = train(tmp_path / "first"), {"shrunk": 0}
    with pytest.MonkeyPatch.context() as patch:

        def count(self, batch, tower, real=TrainingLosses.answer_loss):
            called["shrunk"] += batch.shrunk
            return real(self, batch, tower)

        patch.setattr(TrainingLosses, "answer_loss", count)
        folder = train(tmp_path / "second", start=first, kind="llava-onevision")
    assert len((tmp_path / "second" / "history.tower.jsonl").read_text().splitlines()) == TINY.tower_steps
    assert called["shrunk"] > 0
    new = weights(folder)
    lent = [
        name for name, tensor in weights(first).items() if name in new and new[name].shape == tensor.shape
    ]
    assert any("language_model" in name for name in lent) and any("vision_tower" in name for name in lent)
    vlm = load_vlm(str(folder), device="cpu")
    assert vlm.native == SHRINKS and type(vlm.model).__name__ == "LlavaOnevisionForConditionalGeneration"
    page = draw_page("forms", "test", 0, (128, 128))
    inputs = vlm.inputs([page.image], [vlm.prompt(page.questions[0].question)])
    prompt = reduce_inputs(vlm.model, inputs, make_scorer("uniform"), keep=0.5)
    assert int(prompt.n_visual) == 160 and len(vlm.generate(prompt, max_new_tokens=2)) == 1


def test_the_finished_folder_loads_as_any_llava_next(tmp_path):
    folder = train(tmp_path)
    loaded, processor = (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    pages = [draw_page("forms", "test", index, size).image for index, size in enumerate(SIZES[:2])]
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is the NAME?"}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    inputs = processor(images=pages, text=[prompt] * 2, padding=True, return_tensors="pt")
    assert loaded.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == 2
    assert type(loaded).__name__ == "LlavaNextForConditionalGeneration"
