"""Small things to train on: images, a tower, features, a configuration."""

from pathlib import Path

import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from tiny import noise_image, scale_up
from transformers import CLIPVisionConfig, CLIPVisionModel

from tokensel.data.features import Features
from tokensel.training.config import TrainConfig

VISION = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=24,
    patch_size=6,
)


def sample_images(count=3):
    return [noise_image(30 + 7 * i, 50 - 5 * i, seed=i) for i in range(count)]


def save_images(path: Path, count=4) -> Path:
    (path / "deep").mkdir(parents=True)
    for i, image in enumerate(sample_images(count)):
        image.save(path / ("deep" if i % 2 else ".") / f"{i}.jpg")
    return path


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def dataset(count=5):
    return Dataset.from_dict({"image": sample_images(count), "question": ["?"] * count}).cast_column(
        "image", ImageFeature()
    )


def clip_tower(path, seed=0):
    torch.manual_seed(seed)
    tower = CLIPVisionModel(CLIPVisionConfig(**VISION))
    scale_up(tower)
    tower.save_pretrained(path)
    return tower


def small_config(**options):
    return TrainConfig(
        **(dict(steps=6, batch_size=4, layers=1, statistics_tiles=8, progress=False) | options)
    )


def random_features(tiles=40, tokens=9, width=16, seed=0):
    tokens = torch.randn(tiles, tokens, width, generator=torch.Generator().manual_seed(seed))
    return Features(tokens * 3 + 1, keys=torch.arange(tiles))


def weights(trained):
    return trained.selector.state_dict() | {
        f"r.{k}": v for k, v in trained.reconstructor.state_dict().items()
    }


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one | two)
