"""The benchmark of non-maximum suppression, at small sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.nms import measure as benchmark
from msdetr.ops.nms import nms_mask

TINY = ["--device", "cpu", "--problems", "1", "2", "--boxes", "30", "--repetitions", "2"]


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "nms.json"
    assert benchmark.main([*TINY, "--output", str(output)]) == 0
    rows = json.loads(output.read_text())
    assert [(row["implementation"], row["problems"]) for row in rows] == [
        ("torchvision", 1),
        ("torchvision", 2),
    ]
    assert all(row["equal"] and row["p50_us"] > 0 for row in rows)
    assert "torchvision" in capsys.readouterr().out


def test_other_results_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object, impl: str = "auto", **kwargs: object) -> torch.Tensor:
        keep = nms_mask(*args, **kwargs)
        return keep if impl == "reference" else ~keep

    monkeypatch.setattr(benchmark, "nms_mask", wrong)
    assert benchmark.main(TINY) == 1


def test_some_boxes_are_suppressed() -> None:
    keep = nms_mask(benchmark.make_boxes(2, 1000), iou_threshold=0.9)
    assert 0.5 < keep.float().mean() < 0.95


@pytest.mark.gpu
def test_the_kernel_is_timed(tmp_path: Path) -> None:
    output = tmp_path / "nms.json"
    options = ["--problems", "2", "--boxes", "100", "--repetitions", "2", "--device", "cuda"]
    assert benchmark.main([*options, "--output", str(output)]) == 0
    rows = {row["implementation"]: row for row in json.loads(output.read_text())}
    assert rows["msdetr"]["device_us"] > 0
    assert rows["torchvision"]["device_us"] is None
