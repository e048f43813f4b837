"""The benchmarks of the loader and of padding, on a few small images."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.loader import buckets, pipelines
from benchmarks.loader.measure import Options, data_source, find_failures, main
from benchmarks.loader.pipelines import (
    CACHED,
    IMPLEMENTATIONS,
    OURS,
    TORCHVISION,
    Source,
    build_pipeline,
)
from msdetr.config import DataConfig
from msdetr.data.cache import SHARED_MEMORY
from msdetr.data.transforms import evaluation_transform

SIZES = ((480, 640), (640, 480), (427, 640))


@pytest.fixture
def source() -> Iterator[Source]:
    with data_source(Options(images=6)) as source:
        yield source


def test_a_run_writes_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    arguments = ["--images", "4", "--rounds", "1", "--workers", "1", "--implementations", OURS]
    assert main([*arguments, "--output", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [(row["stage"], row["workers"]) for row in rows] == [
        ("decode", 0), ("augment", 0), ("collate", 0), ("whole", 0), ("whole", 1)
    ]  # fmt: skip
    for row in rows:
        assert row["images_per_second_per_core"] == pytest.approx(1e3 / row["cpu_ms_per_image"])
        assert row["cores_per_gpu"] == pytest.approx(40 / row["images_per_second_per_core"])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_stages_compute_the_samples_of_the_loader(name: str, source: Source) -> None:
    if name == CACHED and not SHARED_MEMORY.is_dir():
        pytest.skip("shared memory has no folder here")
    pipeline = build_pipeline(name, source)
    samples = [pipeline.augment(pipeline.decode(0, position)) for position in range(2)]
    batches = list(pipeline.loader(0, 0))
    assert len(batches) == 3
    for batch in (batches[0], pipeline.collate(samples)):
        pixels = getattr(batch[0], "pixels", batch[0])
        assert pixels.shape[:2] == (2, 3)
        assert pixels.dtype == (torch.uint8 if name in (OURS, CACHED) else torch.float32)
        assert pixels.float().std() > 0
    if name not in (OURS, CACHED):
        return
    for position in [*range(6), *range(6)]:  # with a cache, from the file and from memory
        staged = pipeline.augment(pipeline.decode(3, position))
        generator = pipelines.sample_generator(0, 3, position)
        for a, b in zip(staged, pipeline.dataset.sample(position, generator), strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_peers_draw_from_the_same_distribution(source: Source) -> None:
    """Sizes of results on one image, ours and those of torchvision's transforms."""
    ours, peer = build_pipeline(OURS, source), build_pipeline(TORCHVISION, source)
    decoded = peer.decode(0, 0)
    torch.manual_seed(0)
    theirs = [peer.augment(decoded)[0].shape[1:] for _ in range(150)]
    size = ours.dataset.annotations.image_size(0)
    draws = [ours.dataset.transform(size, np.random.default_rng(seed)).size for seed in range(2000)]
    for axis in (0, 1):
        first, second = ([shape[axis] for shape in shapes] for shapes in (theirs, draws))
        error = statistics.stdev(first) / np.sqrt(len(first))
        assert abs(statistics.fmean(first) - statistics.fmean(second)) < 4 * error
        assert 0.7 < statistics.stdev(first) / statistics.stdev(second) < 1.4


def test_a_slow_loader_fails_the_check() -> None:
    def row(name: str, rate: float, workers: int = 0) -> dict[str, object]:
        where = {"implementation": name, "stage": "whole", "workers": workers}
        return {**where, "images_per_second_per_core": rate}

    peer = row(TORCHVISION, 60.0)
    assert find_failures([row(OURS, 61.0), peer, row(CACHED, 1.0)]) == []
    assert len(find_failures([row(OURS, 59.0), peer])) == 1
    assert len(find_failures([row(OURS, 44.0), row(TORCHVISION, 40.0)])) == 1
    assert len(find_failures([row(OURS, float("nan")), peer])) == 2
    assert find_failures([row(OURS, 50.0, workers=2), peer]) == []


def test_rows_of_padding(tmp_path: Path) -> None:
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": SIZES[i % 3][0], "width": SIZES[i % 3][1]}
        for i in range(12)
    ]
    boxes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 9, 9], "iscrowd": 0}
        for i in range(12)
    ]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "a"}]}
    annotations, path = tmp_path / "instances.json", tmp_path / "rows.json"
    annotations.write_text(json.dumps(content))
    arguments = ["--annotations", str(annotations), "--output", str(path), "--multiples", "64"]
    arguments += ["--num-batches", "256", "--batches", "2", "--buckets", "4", "16"]
    assert buckets.main(arguments) == 0
    *rows, targets = json.loads(path.read_text())
    assert (targets["mean_targets"], targets["mean_slots"], targets["shapes"]) == (1.0, 8.0, 1)
    assert targets["padded_share"] == pytest.approx(7 / 8)
    train = {
        (row["order"], row["rule"], row["buckets"]): row for row in rows if row["split"] == "train"
    }
    padded = [
        train[key]["padded_share"]
        for key in (
            ("area", "exact", None),
            ("random", "exact", None),
            ("random", "multiple", None),
            ("random", "buckets", 16),
            ("random", "buckets", 4),
        )
    ]
    assert 0 < padded[0] < padded[-1] < 1
    assert padded == sorted(padded)
    assert train["random", "multiple", None]["relative_area"] == 1.0
    assert train["random", "buckets", 16]["shapes"] <= 16


def test_padded_shapes_and_orders() -> None:
    transform = evaluation_transform(DataConfig(test_size=64))
    sizes = buckets.draw_batches(np.array([[50, 50]]), transform, 3, 10, "random")
    assert (buckets.padded_shapes(sizes, 48, ()) == 96).all()
    assert (buckets.padded_shapes(sizes, 1, [(60, 99), (70, 80)]) == (70, 80)).all()
    random, area = (
        buckets.draw_batches(
            np.array(SIZES), evaluation_transform(DataConfig()), 2, 200, order
        ).tolist()
        for order in ("random", "area")
    )
    assert np.sum(random) == np.sum(area)
    # Sorted, nearly all batches have one shape.
    assert np.mean([a == b for a, b in area]) > 0.9 > np.mean([a == b for a, b in random])
