from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from msdetr.engine.distributed import Worker
from msdetr.engine.metrics.meter import StepMeter
from msdetr.engine.metrics.writer import MetricsWriter

WORKER = Worker(device=torch.device("cpu"))


def test_averages_over_steps_and_sums_over_layers() -> None:
    meter = StepMeter(WORKER, images_per_step=4)
    for scale in (1.0, 3.0):
        terms = {
            "one_to_one/class": torch.tensor([1.0, 2.0, 3.0]) * scale,
            "encoder/giou": torch.tensor([0.5]) * scale,
        }
        meter.add(torch.tensor(10.0 * scale), torch.tensor(0.1 * scale), terms)
    row = meter.read()
    assert row["loss"] == pytest.approx(20.0)
    assert row["grad_norm"] == pytest.approx(0.2)
    assert row["one_to_one/class"] == pytest.approx(12.0)
    assert row["encoder/giou"] == pytest.approx(1.0)
    meter.add(torch.tensor(7.0), torch.tensor(0.0), {})
    assert meter.read()["loss"] == 7.0


def test_speed_leaves_out_pauses() -> None:
    meter = StepMeter(WORKER, images_per_step=4)
    with meter.paused():
        time.sleep(0.5)
    meter.add(torch.tensor(1.0), torch.tensor(1.0), {})
    time.sleep(0.1)
    meter.add_wait(0.05)
    row = meter.read()
    assert 20 < row["images_per_second"] <= 40
    assert 0.25 < row["data_wait_share"] <= 0.5


def test_reading_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no step"):
        StepMeter(WORKER, images_per_step=1).read()


def test_rows_are_appended(tmp_path: Path) -> None:
    for step in (1, 2):  # The second writer is that of a resumed run.
        writer = MetricsWriter(tmp_path / "run", WORKER)
        writer.write("train", {"step": step, "loss": 0.5})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"kind": "train", "step": 1, "loss": 0.5},
        {"kind": "train", "step": 2, "loss": 0.5},
    ]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    other = Worker(device=torch.device("cpu"), rank=1, world_size=2)
    MetricsWriter(tmp_path / "run", other).write("train", {"step": 1})
    assert not (tmp_path / "run").exists()


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    writer = MetricsWriter(tmp_path, WORKER)
    writer.write("train", {"step": 1, "loss": 0.5})
    assert (tmp_path / "metrics.jsonl").is_file()
    assert not (tmp_path / "tensorboard").exists()


def test_with_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    writer = MetricsWriter(tmp_path, WORKER)
    writer.write("train", {"step": 1, "loss": 0.5})
    assert list((tmp_path / "tensorboard").glob("events.*"))
