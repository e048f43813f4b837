"""Stored rows of a whole detector as a table and as plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plot_detector, readme_table

ROW = {
    "benchmark": "train_step",
    "preset": "tiny",
    "implementation": "eager",
    "dtype": "float32",
    "batch": 2,
    "height": 480,
    "width": 640,
    "images_per_second": 0.123456,
    "seconds_p50": 16.2,
    "seconds_p80": 0.0321,
    "speedup_over_eager": 1.0,
    "speedup_over_published": None,
    "gpu_idle_share": None,
    "kernels": None,
    "host_reads": None,
    "model_flops_utilisation": None,
    "peak_memory_mb": 7531.6,
    "device": "Some GPU",
    "torch": "2.15.0",
    "triton": None,
    "commit": "abc",
}


def write(path: Path, *changes: dict[str, Any]) -> Path:
    path.write_text(json.dumps([{**ROW, **change} for change in changes]))
    return path


def test_table_of_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert readme_table.main([str(write(tmp_path / "rows.json", {}))]) == 0
    assert capsys.readouterr().out == (
        "Training step, 480x640, Some GPU, torch 2.15.0, Triton absent, commit abc:\n"
        "\n"
        "| preset | precision | batch | implementation "
        "| images/s | median | p80 | over eager | peak memory |\n"
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| `tiny` | float32 | 2 | eager | 0.123 | 16.2 s | 32.1 ms | 1.00 x | 7.4 GiB |\n"
    )


def test_table_per_circumstance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a.json", {}, {"speedup_over_published": 1.5, "gpu_idle_share": 0.05})
    second = write(tmp_path / "b.json", {"benchmark": "inference"}, {"device": "Other"})
    assert readme_table.main([str(first), str(second)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| preset |") == 3
    assert "| 1.00 x | 1.50 x | 5.0% | 7.4 GiB |" in printed
    assert "| 1.00 x | - | - | 7.4 GiB |" in printed
    assert "Inference, 480x640, Some GPU" in printed
    assert "Training step, 480x640, Other" in printed


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "holds no rows of train_step or inference"),
        ("[", "is not JSON"),
        ('[{"benchmark": "train_step"}]', "rows lack images_per_second"),
    ],
)
def test_files_without_rows_are_refused(
    tmp_path: Path, text: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    for main in (readme_table.main, plot_detector.main):
        with pytest.raises(SystemExit):
            main([str(path)])
        assert reason in capsys.readouterr().err


def test_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = write(
        tmp_path / "rows.json",
        {},
        {"implementation": "compiled", "batch": 8},
        {"dtype": "bfloat16"},
        {"benchmark": "inference"},
    )
    assert plot_detector.main([str(path), "--output", str(tmp_path / "new")]) == 0
    expected = [tmp_path / "new" / f"rows_{name}.png" for name in ("train_step", "inference")]
    assert capsys.readouterr().out.split() == [str(path) for path in expected]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in expected)
