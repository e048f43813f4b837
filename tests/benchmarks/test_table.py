"""The documents show the stored rows, and nothing typed by hand."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import common, table
from benchmarks.attention import measure as attention
from benchmarks.common import RESULTS, read_json, write_rows
from benchmarks.table import DOCUMENTS, NOTHING, SECTIONS, fill, main, tables

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
    text = page.read_text()
    assert "preset ms-detr-r50-300, height 480, width 640, dtype float32, batch 2**" in text
    assert "| eager | 0.264 |" in text


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
    ours = [{**row, "implementation": "msdetr-fused", "p50_us": 800.0} for row in rows]
    wrong = {**rows[-1], "implementation": "other", "implementation_version": "1.2"}
    wrong |= {"p50_us": None, "status": "wrong: a|b"}
    text = tables(SECTIONS["attention"], [*rows, *ours, wrong])
    assert "**dtype float32, spread 0.0, shape tiny, batch 2**\n(" in text
    assert "driver 580.1, multiprocessors at 1755 to 1755 of 1980 MHz):" in text
    assert "\n| reference | 2000.0 | 2000.0 | 2000.0 | 2.50 x |" in text
    assert "\n| msdetr-fused | 800.0 | 800.0 | 800.0 | 1.00 x |" in text
    assert "\n| other 1.2 | - | - | - | - |" in text
    assert text.endswith("| wrong: a\\|b |")
    other = [{**row, "spread": 1.0} for row in rows]
    assert "status" not in (text := tables(SECTIONS["attention"], [*rows, *other]))
    assert text.count("\n| reference | 2000.0 ") == text.count("spread") == 2

    cases = read_json(RESULTS / "assignment_cpu.json")[:4]
    text = tables(SECTIONS["assignment"], cases)
    assert "| 16 | chunked | " in text
    # A case that was measured again.
    assert tables(SECTIONS["assignment"], [{**cases[0], "p50_us": 1.0}, *cases]) == text


def test_documents_show_typical_cases() -> None:
    (row, *_) = read_json(RESULTS / "assignment_cpu.json")
    page = PAGE.format("assignment")
    assert (row["queries"], row["targets"]) == (300, 20)
    text = fill(page, [row, {**row, "targets": 100}, {**row, "queries": 900}])
    assert text == fill(page, [row]) != fill(page, [])


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
