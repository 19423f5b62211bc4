"""Where the images of a training come from: folders, datasets, lists; what is skipped and what is refused."""

import io
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, List
from datasets import Features as DatasetFeatures
from datasets import Image as ImageFeature
from little import clip_tower, cut, dataset, sample_images, save_images
from PIL import Image

from tokensel.data.encoders import VisionEncoder
from tokensel.data.image_sources import open_images
from tokensel.utils.errors import TokenselError


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tower")
    clip_tower(path)
    return VisionEncoder.from_pretrained(path)


def test_a_folder_is_searched_to_the_bottom_and_a_cut_file_is_named(tmp_path):
    save_images(tmp_path / "p")
    (tmp_path / "p" / "notes.txt").write_text("no image")
    source = open_images(tmp_path / "p")
    assert source.length == 4
    cut(tmp_path / "p" / "2.jpg")
    opened = [source.open(*row) for row in source.stream()]
    assert [image is None for image in opened].count(True) == 1
    assert source.skipped == [str(tmp_path / "p" / "2.jpg")]
    assert open_images(tmp_path / "p", limit=2).length == 2


def test_datasets_in_memory_on_disk_and_as_parquet_give_the_same_images(tmp_path):
    rows = dataset()
    rows.save_to_disk(tmp_path / "disk")
    rows.to_parquet(tmp_path / "rows.parquet")
    expected = [np.asarray(image) for image in sample_images(5)]
    for source in (
        open_images(rows),
        open_images(tmp_path / "disk"),
        open_images(tmp_path / "rows.parquet"),
        open_images(tmp_path / "rows.parquet", streaming=True),
        open_images(sample_images(5)),
    ):
        opened = [np.asarray(source.open(*row)) for row in source.stream()]
        assert len(opened) == 5 and all(map(np.array_equal, opened, expected)), source.name
        later = [np.asarray(source.open(*row)) for row in source.stream(3)]
        assert len(later) == 2 and np.array_equal(later[0], expected[3])


def test_images_come_upright_and_in_rgb(tmp_path):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held sideways
    image.save(tmp_path / "side.png", exif=exif)
    source = open_images(tmp_path)
    opened = source.open(*source.row(0))
    assert opened.mode == "RGB" and opened.size == (4, 6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{}/empty", "a folder without images"),
        ("{}/none", "neither a folder of images nor a parquet file"),
        ("someone/some-dataset", "cannot be loaded .*give a local folder or parquet file"),
        ("a:b:c:d", "name:config:split"),
    ],
)
def test_no_images_is_a_clear_error(name, words, tmp_path):
    (tmp_path / "empty" / "below").mkdir(parents=True)
    with pytest.raises(TokenselError, match=words) as caught:
        open_images(name.format(tmp_path))
    assert "\n" not in str(caught.value)


def test_wrong_columns_splits_and_limits_are_refused():
    with pytest.raises(TokenselError, match="no column 'picture' among"):
        open_images(dataset(), column="picture")
    with pytest.raises(TokenselError, match=r"has the splits .*name one"):
        open_images(DatasetDict({"train": dataset()}))
    with pytest.raises(TokenselError, match="no images in it"):
        open_images([])
    with pytest.raises(TokenselError, match="limit is 0"):
        open_images(dataset(), limit=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_an_image_are_skipped_and_named(streaming, tmp_path):
    content = [dataset(1)[0]["image"], None, dataset(1)[0]["image"]]
    image_column = Dataset.from_dict({"image": content}, features=DatasetFeatures({"image": ImageFeature()}))
    image_column.to_parquet(tmp_path / "images.parquet")
    files = [io.BytesIO() for _ in content]
    for file, image in zip(files, content):
        (image or Image.new("RGB", (1, 1))).save(file, "PNG")
    encoded = [None if image is None else file.getvalue() for file, image in zip(files, content)]
    records = [{"bytes": value, "path": None} for value in encoded]
    for name, rows in {"bytes": encoded, "records": records}.items():
        Dataset.from_dict({"image": rows}).to_parquet(tmp_path / f"{name}.parquet")
    for name in ("images", "bytes", "records"):
        source = open_images(tmp_path / f"{name}.parquet", streaming=streaming)
        opened = [source.open(*row) for row in source.stream()]
        assert [image is None for image in opened] == [False, True, False] and source.skipped == ["row 1"], (
            name
        )


@pytest.mark.parametrize(
    "column",
    [[1, 2], [[1.0, 2.0]], [[["a.png"]]], [True], [{"left": b"", "right": b""}], "images"],
    ids=["numbers", "arrays", "lists", "truths", "records", "lists of images"],
)
def test_a_column_that_holds_no_images_is_refused_in_one_line(column, tmp_path):
    if column == "images":
        features = DatasetFeatures({"image": List(ImageFeature())})
        rows = Dataset.from_dict({"image": [sample_images(2)]}, features=features)
    else:
        rows = Dataset.from_dict({"image": column})
    rows.to_parquet(tmp_path / "rows.parquet")
    for source in (rows, tmp_path / "rows.parquet"):
        with pytest.raises(TokenselError, match=r"column .image. is of type .*name a column of") as caught:
            open_images(source)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "images", [7, {"a": 1}, b"bytes", Image.new("RGB", (2, 2)), iter([]), torch.zeros(2)]
)
def test_what_is_no_list_of_images_is_refused_in_one_line(images):
    with pytest.raises(TokenselError, match="give a folder, a dataset or a list of images"):
        open_images(images)


def test_a_list_may_hold_all_that_is_an_image_and_nothing_else(encoder, tmp_path):
    image = sample_images(1)[0]
    image.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    rows = [image, np.asarray(image), content, str(tmp_path / "a.png"), io.BytesIO(content)]
    source = open_images(rows)
    opened = [np.asarray(source.open(*row)) for row in source.stream()]
    assert len(opened) == 5 and all(np.array_equal(one, opened[0]) for one in opened)
    assert torch.equal(encoder.preprocess(rows), encoder.preprocess([image] * 5))
    source = open_images([image, [image]])
    with pytest.raises(TokenselError, match="row 1: list is no image"):
        [source.open(*row) for row in source.stream()]
    for call in (encoder.preprocess, encoder.encode):
        with pytest.raises(TokenselError, match="give at least one image"):
            call([])


def test_the_identity_of_a_source_is_that_of_its_images(tmp_path):
    save_images(tmp_path / "p")
    shutil.copytree(tmp_path / "p", tmp_path / "moved")
    identity = open_images(tmp_path / "p").identity()
    assert open_images(tmp_path / "moved").identity() == identity
    assert open_images(tmp_path / "p", limit=3).identity() != identity
    sample_images(9)[8].save(tmp_path / "moved" / "0.jpg")
    assert open_images(tmp_path / "moved").identity() != identity
    in_memory = open_images(sample_images(5)).identity()
    assert open_images(sample_images(5)).identity() == in_memory
    assert open_images(sample_images(5)[::-1]).identity() != in_memory
    dataset(5).to_parquet(tmp_path / "rows.parquet")
    for streaming in (False, True):
        one, two = (open_images(tmp_path / "rows.parquet", streaming=streaming) for _ in range(2))
        assert one.identity() == two.identity()
