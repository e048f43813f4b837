from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from engine.helpers import RELATIVES, tiny_config

from msdetr.config import RunConfig
from msdetr.data.dataset import build_dataset
from msdetr.data.loader import train_image_buckets
from msdetr.engine.distributed import Worker
from msdetr.engine.warm_up import warm_up_batches

WORKER = Worker(device=torch.device("cpu"))


def config_of(data: Path, tmp_path: Path, kind: str, **data_fields: object) -> RunConfig:
    config = tiny_config(data, tmp_path / "run")
    fields = {"num_image_buckets": 2, "train_sizes": (32, 64)} | data_fields
    model = config.model
    if kind != "none":
        model = dataclasses.replace(RELATIVES[kind], num_classes=None)
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, **fields))


def shapes_of(config: RunConfig) -> list[tuple[tuple[int, int], int]]:
    """(image size, target slots) of all batches."""
    data = build_dataset(config.data, "train")
    found = []
    for batch in warm_up_batches(config, data, WORKER):
        height, width = batch.images.pixels.shape[2:]
        assert len(batch.images.pixels) == config.train.batch_size
        found.append(((height, width), batch.targets.labels.shape[1]))
    return found


def largest_count(config: RunConfig) -> int:
    annotations = build_dataset(config.data, "train").annotations
    return max(len(annotations.targets(i)[0]) for i in range(len(annotations)))


def test_two_numbers_of_targets_are_enough(shapes: Path, tmp_path: Path) -> None:
    config = config_of(shapes, tmp_path, "none", target_buckets=(1, 2, 4, 8))
    sizes = train_image_buckets(config, build_dataset(config.data, "train"))
    assert len(sizes) == 2
    assert shapes_of(config) == [(size, 1) for size in sizes] + [(sizes[0], 2)]


@pytest.mark.parametrize("kind", ["ms-dn", "ms-contrastive"])
@pytest.mark.parametrize("buckets", [(1,), (1, 2, 4, 8, 16)], ids=str)
def test_denoising_takes_all_pairs_that_the_data_can_fill(
    shapes: Path, tmp_path: Path, kind: str, buckets: tuple[int, ...]
) -> None:
    config = config_of(shapes, tmp_path, kind, target_buckets=buckets)
    sizes = train_image_buckets(config, build_dataset(config.data, "train"))
    most = largest_count(config)
    assert most > 1
    # Beyond the last bucket, multiples of it.
    slots = list(range(1, most + 1))
    if len(buckets) > 1:
        slots = [bucket for bucket in buckets if bucket < 2 * most]
    assert shapes_of(config) == [(size, count) for size in sizes for count in slots]


def test_without_image_buckets_there_is_nothing_to_warm_up(shapes: Path, tmp_path: Path) -> None:
    for kind in ("none", "ms-dn"):
        assert shapes_of(config_of(shapes, tmp_path, kind, num_image_buckets=0)) == []
