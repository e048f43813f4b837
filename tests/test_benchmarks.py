"""The benchmark of a training step, at a size that takes a second."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks.bench_train_step import (
    LOSS_TOLERANCE,
    NUM_CLASSES,
    PHASES,
    Options,
    check_same_losses,
    main,
    random_batch,
)
from benchmarks.common import PhaseTimer
from benchmarks.published_code import published_flags
from msdetr.config import config_to_dict
from msdetr.presets import PRESETS
from msdetr.published import config_from_published_args

ROW_FIELDS = {
    "benchmark": str,
    "preset": str,
    "implementation": str,
    "dtype": str,
    "batch": int,
    "height": int,
    "width": int,
    "images_per_second": float,
    "step_seconds_p50": float,
    "step_seconds_best": float,
    "forward_seconds": float,
    "criterion_seconds": float,
    "backward_seconds": float,
    "optimizer_seconds": float,
    "peak_memory_mb": float,
    "device": str,
    "torch": str,
    "triton": (str, type(None)),
    "commit": str,
    "threads": int,
}
TINY = ["--preset", "tiny", "--batch", "1", "--height", "64", "--width", "64", "--device", "cpu"]
NEEDS_PUBLISHED = pytest.mark.skipif(
    "MSDETR_PUBLISHED" not in os.environ,
    reason="set MSDETR_PUBLISHED to a checkout of the published code",
)


def test_tiny_step_writes_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "rows.json"
    assert main([*TINY, "--steps", "2", "--warmup", "1", "--output", str(path)]) == 0

    (row,) = json.loads(path.read_text())
    assert row.keys() == ROW_FIELDS.keys()
    for name, kind in ROW_FIELDS.items():
        assert isinstance(row[name], kind), name
    assert (row["benchmark"], row["preset"], row["implementation"]) == (
        "train_step",
        "tiny",
        "msdetr",
    )
    assert (row["batch"], row["height"], row["width"]) == (1, 64, 64)
    assert all(row[f"{phase}_seconds"] > 0 for phase in PHASES)
    assert 0 < row["step_seconds_best"] <= row["step_seconds_p50"]
    assert row["images_per_second"] == pytest.approx(1 / row["step_seconds_p50"])
    # Two measured steps: their medians are means, which add up.
    phases = sum(row[f"{phase}_seconds"] for phase in PHASES)
    assert phases == pytest.approx(row["step_seconds_p50"])
    assert row["peak_memory_mb"] > 50
    assert "step_seconds_p50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--preset", "huge"], "known are ms-detr-r50-300"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--published", "no/such/folder"], "has no package `models`"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert reason in capsys.readouterr().err.replace("\n", " ")


def test_batch_is_a_function_of_the_options() -> None:
    options = Options(preset="tiny", batch=3, height=48, width=80, num_targets=5)
    batch = random_batch(options)
    assert batch.images.pixels.shape == (3, 3, 48, 80)
    assert batch.images.pixels.dtype == torch.uint8
    assert batch.targets.count.tolist() == [5, 5, 5]
    assert batch.targets.labels.max() < NUM_CLASSES
    centers, sides = batch.targets.boxes[:, :5].chunk(2, dim=-1)
    assert (sides > 0).all()
    assert (centers - sides / 2 >= -1e-6).all()
    assert (centers + sides / 2 <= 1 + 1e-6).all()
    assert torch.equal(batch.images.pixels, random_batch(options).images.pixels)
    other = random_batch(dataclasses.replace(options, seed=1))
    assert not torch.equal(batch.images.pixels, other.images.pixels)


@pytest.mark.parametrize("name", ["ms-detr-r50-300", "ms-detr-pp-r50-300", "ms-detr-pp-r50-900"])
def test_flags_say_the_whole_recipe(name: str) -> None:
    config = Options(preset=name).config
    read_back = config_to_dict(config_from_published_args(published_flags(config)))
    recipe = config_to_dict(config)
    for part in ("model", "assignment", "loss", "optimizer"):
        assert read_back[part] == recipe[part]


def test_every_preset_is_an_option() -> None:
    for name, preset in PRESETS.items():
        assert Options(preset=name).config.optimizer == preset.config.optimizer


def test_losses_that_agree_pass() -> None:
    difference = check_same_losses(
        {"total": 2.0, "loss_ce": 0.5}, {"total": 2.0 * (1 + 1e-5), "loss_ce": 0.5}
    )
    assert difference == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize(
    "published",
    [
        {"total": 2.0, "loss_ce": 0.5 * (1 + 2 * LOSS_TOLERANCE)},
        {"total": 2.0, "loss_ce": float("nan")},
        {"total": 2.0},
    ],
)
def test_losses_that_differ_are_refused(published: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="loss_ce"):
        check_same_losses({"total": 2.0, "loss_ce": 0.5}, published)


def test_phases_follow_each_other() -> None:
    timer = PhaseTimer(torch.device("cpu"))
    timer.start()
    timer.lap("first")
    timer.lap("second")
    assert list(timer.seconds()) == ["first", "second"]
    timer.start()
    timer.lap("other")
    assert list(timer.seconds()) == ["other"]


@NEEDS_PUBLISHED
def test_against_the_published_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    size = ["--batch", "1", "--height", "128", "--width", "160", "--steps", "1", "--warmup", "0"]
    where = ["--device", "cpu", "--published", os.environ["MSDETR_PUBLISHED"]]
    assert main([*size, *where, "--output", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [row["implementation"] for row in rows] == ["msdetr", "published, PyTorch attention"]
    assert all(row.keys() == ROW_FIELDS.keys() for row in rows)
    assert "ours / published" in capsys.readouterr().out


@NEEDS_PUBLISHED
def test_a_recipe_that_the_published_code_lacks_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main([*TINY, "--published", os.environ["MSDETR_PUBLISHED"]])
    assert "model.backbone is 'convnet' in the recipe" in capsys.readouterr().err
