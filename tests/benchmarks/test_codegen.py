"""The codegen benchmark: its cases, its options, and a whole run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.codegen.measure import TABLE, Options, main
from benchmarks.codegen.cases import CASES
from benchmarks.codegen.checks import row_key

ROOT = Path(__file__).resolve().parents[1]


def test_cases_differ_by_name_or_type() -> None:
    assert len({(case.name, case.dtype) for case in CASES}) == len(CASES)
    assert Options().is_complete
    assert Options().selected == list(CASES)
    assert not Options(architectures=("sm_90",)).is_complete
    part = Options(cases="decoder-300")
    assert not part.is_complete
    assert {case.dtype for case in part.selected} == {"bfloat16", "float32", "float16"}
    assert {case.name for case in part.selected} == {"decoder-300"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--workers", "0"], "workers must be at least 1"),
        (["--cases", "resnet"], "none contains 'resnet'"),
        (["--architectures", "sm_70"], "invalid choice"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert reason in " ".join(capsys.readouterr().err.split())


def test_interpreted_kernels_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_stored_rows_are_of_all_cases() -> None:
    rows = json.loads(TABLE.read_text())
    assert len({row_key(row) for row in rows}) == len(rows)
    stored = {(row["case"], row["dtype"], row["architecture"]) for row in rows}
    assert stored == {
        (case.name, case.dtype, architecture)
        for case in CASES
        for architecture in Options().architectures
    }


def test_compiles_stores_and_checks(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    table = tmp_path / "table.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        where = ["--architectures", "sm_90", "--cases", "decoder-300 float16"]
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.codegen.measure", *where, "--table", str(table), *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    other = {"kernel": "k", "case": "other", "dtype": "float16", "architecture": "sm_90"}
    table.write_text(json.dumps([other]))
    done = run()
    assert done.returncode == 0, done.stderr
    assert "forward_kernel" in done.stdout
    kept, row = json.loads(table.read_text())
    assert kept == other
    assert row_key(row) == ("forward_kernel", "decoder-300", "float16", "sm_90")
    assert row["benchmark"] == "codegen"
    assert {"triton", "torch", "commit"} <= row.keys()
    assert 32 <= row["registers"] <= 255
    assert row["num_warps"] == 1
    # Four points, 16 rows of 64 bytes, four corners: 32 loads of 512 bytes per warp. Line tables
    # are wrong about one now and then.
    assert row["row_loads"].keys() == {"128"}
    assert 30 <= row["row_loads"]["128"] <= 33
    assert row["scalar_row_loads"] == 0
    assert row["loop_instructions"] < row["instructions"]
    assert row["instructions_per_unit"] == pytest.approx(row["loop_instructions"] / 8, abs=0.01)
    assert 50 < row["instructions_per_unit"] < 195

    better = {**row, "instructions_per_unit": row["instructions_per_unit"] / 1.1}
    table.write_text(json.dumps([better]))
    done = run("--check")
    assert done.returncode == 1, done.stderr
    problem = "forward_kernel decoder-300 float16 sm_90: instructions_per_unit rose"
    assert problem in done.stdout
    assert json.loads(table.read_text()) == [better]
