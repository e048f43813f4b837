"""The benchmark of the loader, on a few small images."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.loader import pipelines
from benchmarks.loader.measure import Options, data_source, main, what_fails
from benchmarks.loader.pipelines import (
    CACHED,
    OURS,
    TORCHVISION_PIL,
    TORCHVISION_TENSOR,
    build_pipeline,
)
from msdetr.config import DataConfig
from msdetr.data.cache import SHARED_MEMORY

PIPELINES = [OURS, CACHED, TORCHVISION_PIL, TORCHVISION_TENSOR]


@pytest.fixture
def source():
    with data_source(Options(images=6)) as source:
        yield source


def test_a_run_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    arguments = ["--images", "4", "--rounds", "1", "--workers", "1", "--implementations", OURS]
    assert main([*arguments, "--output", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [(row["stage"], row["workers"]) for row in rows] == [
        ("decode", 0), ("augment", 0), ("collate", 0), ("whole", 0), ("whole", 1)
    ]  # fmt: skip
    for row in rows:
        assert row["implementation"] == OURS
        assert row["images_per_second_per_core"] == pytest.approx(1e3 / row["cpu_ms_per_image"])
        assert row["cores_per_gpu"] == pytest.approx(40 / row["images_per_second_per_core"])
        assert row["peak_memory_mb"] > 50
        assert (row["worker_peak_memory_mb"] is None) == (row["workers"] == 0)
        assert {"device", "torch", "commit", "threads"} <= row.keys()
    assert "images_per_second_per_core" in capsys.readouterr().out


@pytest.mark.parametrize("name", PIPELINES)
def test_stages_make_what_the_loader_makes(name, source):
    if name == CACHED and not SHARED_MEMORY.is_dir():
        pytest.skip("shared memory has no folder here")
    pipeline = build_pipeline(name, source)
    assert pipeline is not None
    assert pipeline.num_images == 6
    samples = [pipeline.augment(pipeline.decode(0, position)) for position in range(2)]
    staged = pipeline.collate(samples)
    batches = list(pipeline.loader(0, 0))
    assert len(batches) == 3
    assert type(batches[0]) is type(staged)
    for pixels in (staged[0], batches[0][0]):
        pixels = getattr(pixels, "pixels", pixels)
        assert pixels.shape[:2] == (2, 3)
        assert pixels.dtype == (torch.uint8 if name in (OURS, CACHED) else torch.float32)
        assert pixels.float().std() > 0


@pytest.mark.parametrize("name", [OURS, CACHED])
def test_stages_of_ours_are_its_samples(name, source):
    if name == CACHED and not SHARED_MEMORY.is_dir():
        pytest.skip("shared memory has no folder here")
    pipeline = build_pipeline(name, source)
    for _ in range(2):  # with a cache, from the file and from memory
        for position in range(6):
            staged = pipeline.augment(pipeline.decode(3, position))
            generator = loader_pipelines.sample_generator(0, 3, position)
            for a, b in zip(staged, pipeline.dataset.sample(position, generator), strict=True):
                assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_peers_draw_from_the_same_distribution(source):
    """Sizes of results, ours against torchvision's transforms, on one image."""
    ours, peer = build_pipeline(OURS, source), build_pipeline(TORCHVISION_TENSOR, source)
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
    sides = set(DataConfig().train_sizes)
    # torchvision may lose a pixel of the shorter side to rounding.
    assert {min(shape) for shape in theirs} <= sides | {side - 1 for side in sides}


def test_simplejpeg_is_optional(source, monkeypatch):
    monkeypatch.setattr(loader_pipelines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed"):
        loader_pipelines.simplejpeg_decoder(source)


def test_the_data_set_goes_round(source):
    dataset = build_pipeline(OURS, source).dataset
    with data_source(Options(images=70)) as repeated:
        many = build_pipeline(OURS, repeated).dataset
        assert len(many) == 70
        assert many.annotations.file_name(64) == many.annotations.file_name(0)
        labels, boxes = many.annotations.targets(64)
        assert torch.equal(boxes, many.annotations.targets(0)[1])
        assert len(labels) == 1
    assert len(dataset) == 6


def test_a_slow_loader_fails_the_check():
    def row(name, rate, workers=0):
        return {
            "implementation": name,
            "stage": "whole",
            "workers": workers,
            "images_per_second_per_core": rate,
        }

    peer = row(TORCHVISION_PIL, 60.0)
    assert what_fails([row(OURS, 61.0), peer, row(CACHED, 1.0)]) == []
    assert len(what_fails([row(OURS, 59.0), peer])) == 1
    assert len(what_fails([row(OURS, 44.0), row(TORCHVISION_PIL, 40.0)])) == 1
    assert len(what_fails([row(OURS, float("nan")), peer])) == 2
    assert what_fails([row(OURS, 50.0, workers=2), peer]) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--images", "1"], "must be at least the batch"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--step-rate", "0"], "step_rate must be positive"),
        (["--implementations", "dali"], "known are"),
        (["--root", "no/such/folder"], "does not exist"),
    ],
)
def test_wrong_options_are_refused(arguments, reason, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert reason in capsys.readouterr().err.replace("\n", " ")
