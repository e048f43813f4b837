"""The documents show the stored rows, and nothing typed by hand."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import common, table
from benchmarks.attention import measure as attention
from benchmarks.common import RESULTS, read_json, write_rows
from benchmarks.table import DOCUMENTS, NOTHING, SECTIONS, main, tables

PAGE = "before\n\n<!-- rows: {} -->\nold\nlines\n<!-- end of rows -->\n\nafter\n"


def test_committed_documents_show_the_committed_rows() -> None:
    assert main(["--check"]) == 0
    text = "".join(path.read_text() for path in DOCUMENTS)
    assert [text.count(f"<!-- rows: {name} -->") for name in SECTIONS] == [1] * len(SECTIONS)


def test_documents_are_checked_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.format("detector"))
    monkeypatch.setattr(table, "DOCUMENTS", (page,))
    arguments = ["--results", str(tmp_path)]
    assert main([*arguments, "--check"]) == 1
    assert "differs" in capsys.readouterr().out
    assert main(arguments) == 0
    assert page.read_text() == PAGE.format("detector").replace("old\nlines", NOTHING)
    assert main([*arguments, "--check"]) == 0
    write_rows(tmp_path / "train_step_cuda.json", read_json(RESULTS / "train_step_cpu.json"))
    assert main([*arguments, "--check"]) == 1
    assert main(arguments) == 0
    assert "| ms-detr-r50-300 | 480 | 640 | float32 | 2 | eager | 0.264 |" in page.read_text()


def test_tables_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"driver": "580.1", "sm_clock_mhz": 1755, "sm_clock_max_mhz": 1980}
    monkeypatch.setattr(common, "_gpu_state", lambda _: state)
    options = attention.Options(
        shapes=("tiny",),
        batches=(2,),
        spreads=(0.0,),
        dtypes=("float32",),
        implementations=("reference",),
        device="cpu",
    )
    (rows,) = attention.measure(options, timer=lambda calls: [1e-3, 2e-3, 3e-3])
    wrong = {**rows[-1], "implementation": "other", "p50_us": None, "status": "wrong: by far"}
    text = tables(SECTIONS["attention"], [*rows, wrong])
    assert "driver 580.1, multiprocessors at 1755 to 1755 of 1980 MHz:" in text
    assert "| tiny | 2 | float32 | 0.0 | reference | 2000.0 | 2000.0 | 2000.0 |" in text
    assert "| tiny | 2 | float32 | 0.0 | other | - | - | - |" in text
    assert text.endswith("| wrong: by far |")

    text = tables(SECTIONS["assignment"], read_json(RESULTS / "assignment_cpu.json")[:4])
    assert "| one_to_many | 16 | 300 | 20 | chunked | " in text


def test_the_state_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda = torch.device("cuda", 0)
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\n[ "$1" = --id=GPU-abc ] && echo "580.1, 1755, 1980"\n')
    smi.chmod(0o755)
    properties = type("Properties", (), {"uuid": "abc"})
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: properties)
    monkeypatch.setenv("PATH", str(tmp_path))
    expected = {"driver": "580.1", "sm_clock_mhz": 1755, "sm_clock_max_mhz": 1980}
    assert common._gpu_state(cuda) == expected
    smi.unlink()
    assert common._gpu_state(cuda) == dict.fromkeys(expected)
    assert common._gpu_state(torch.device("cpu")) == dict.fromkeys(expected)


def test_results_do_not_change_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    rows, code = results / "rows.json", tmp_path / "code.py"
    monkeypatch.setattr(common, "RESULTS", results)
    monkeypatch.setenv("MSDETR_COMMIT", "from-outside")
    commit = common._commit.__wrapped__
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() == "from-outside"
    rows.write_text("old")
    code.write_text("old")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    clean = commit()
    rows.write_text("new")
    assert commit() == clean != "from-outside"
    code.write_text("new")
    assert commit() == f"{clean}-dirty"
