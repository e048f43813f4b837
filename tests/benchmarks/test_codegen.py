"""The codegen check: its faults and regressions, and a whole run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.codegen.cases import CASES
from benchmarks.codegen.checks import check, find_faults, find_regressions, row_key
from benchmarks.codegen.compiler import ARCHITECTURES
from benchmarks.codegen.measure import table_path
from benchmarks.common import RESULTS, Row

ROOT = Path(__file__).resolve().parents[2]
CLEAN: Row = {
    "kernel": "forward_kernel",
    "case": "encoder",
    "dtype": "bfloat16",
    "architecture": "sm_90",
    "registers": 80,
    "spill_bytes": 0,
    "loop_spills": 0,
    "warps_per_sm": 24,
    "instructions": 1200,
    "instructions_per_unit": 123.0,
    "scalar_row_loads": 0,
    "retried_atomics": 0,
    "fences": {"MEMBAR.ALL.CTA": 2, "FENCE.VIEW.ASYNC.S": 2},
}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"spill_bytes": 24}, "spills 24 bytes per thread, maximum 16"),
        ({"spill_bytes": 8, "loop_spills": 1}, "has 1 spills in its loop over points"),
        ({"retried_atomics": 3}, "has 3 compare-and-swap atomics"),
        ({"fences": {"MEMBAR.SC.GPU": 1}}, "has fences of the whole GPU: MEMBAR.SC.GPU"),
        ({"scalar_row_loads": 4}, "reads value by 4 loads of at most 32 bits"),
        ({"instructions_per_unit": 130.5}, "130.5 instructions per unit, target 130"),
        (
            {"instructions_per_unit": 160.5, "kernel": "points_kernel"},
            "160.5 instructions per unit, target 160",
        ),
    ],
)
def test_faults_are_found(changes: Row, fault: str) -> None:
    assert find_faults({**CLEAN, **changes}) == [fault]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # A register or two, outside of the encoder's loops.
        {"spill_bytes": 16},
        {"spill_bytes": 16, "loop_spills": 1, "case": "decoder-300"},
        # sm_80 has no such instructions.
        {"retried_atomics": 3, "architecture": "sm_80"},
        {"fences": {"MEMBAR.SC.GPU": 1}, "architecture": "sm_80"},
        # The targets are those of one type and architecture.
        {"instructions_per_unit": 150.0, "architecture": "sm_100"},
        {"instructions_per_unit": 150.0, "dtype": "float32"},
        {"instructions_per_unit": 900.0, "kernel": "value_kernel"},
        {"instructions_per_unit": None, "scalar_row_loads": None, "kernel": "splat_kernel"},
    ],
)
def test_clean_code_has_no_faults(changes: Row) -> None:
    assert find_faults({**CLEAN, **changes}) == []


@pytest.mark.parametrize(
    ("changes", "regressions"),
    [
        ({"instructions_per_unit": 126.6, "instructions": 2400, "registers": 96}, []),
        ({"spill_bytes": 8}, ["spill_bytes rose from 0 to 8"]),
        ({"instructions_per_unit": 126.75}, ["instructions_per_unit rose from 123.0 to 126.75"]),
        (
            {"registers": 88, "warps_per_sm": 20},
            ["warps_per_sm fell from 24 to 20 (registers: from 80 to 88)"],
        ),
    ],
)
def test_regressions_are_found(changes: Row, regressions: list[str]) -> None:
    assert find_regressions({**CLEAN, **changes}, CLEAN) == regressions


def test_a_kernel_without_points_regresses_in_total() -> None:
    stored = {**CLEAN, "instructions_per_unit": None}
    assert find_regressions({**stored, "instructions": 1236}, stored) == []
    (regression,) = find_regressions({**stored, "instructions": 1237}, stored)
    assert regression == "instructions rose from 1200 to 1237"


def test_check_names_each_offending_row() -> None:
    worse = {**CLEAN, "retried_atomics": 3, "instructions_per_unit": 128.0}
    other = {**CLEAN, "case": "decoder-300"}
    atomics = "forward_kernel encoder bfloat16 sm_90: has 3 compare-and-swap atomics"
    rose = "forward_kernel encoder bfloat16 sm_90: instructions_per_unit rose from 123.0 to 128.0"
    assert check([CLEAN, other], [CLEAN, other]) == []
    assert check([other, worse], [CLEAN, other]) == [atomics, rose]
    assert check([worse, other], []) == [atomics]
    (missing,) = check([CLEAN, other], [CLEAN])
    assert missing.endswith("is not stored: run without --check")


@pytest.mark.parametrize("version", ["3.6.0", "3.8.0", "3.9.0"])
def test_stored_rows_cover_all_cases(version: str) -> None:
    rows = json.loads(table_path(RESULTS, version).read_text())
    assert {row["triton"] for row in rows} == {version}
    assert len({row_key(row) for row in rows}) == len(rows)
    assert {(row["case"], row["dtype"], row["architecture"]) for row in rows} == {
        (case.name, case.dtype, architecture) for case in CASES for architecture in ARCHITECTURES
    }
    assert check(rows, rows) == []


def test_compiles_stores_and_checks(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    table = table_path(tmp_path, triton.__version__)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        cases = ["--architectures", "sm_90", "--cases", "decoder-300 float16"]
        command = [sys.executable, "-m", "benchmarks.codegen", *cases, "--results", str(tmp_path)]
        return subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    other = {"kernel": "k", "case": "encoder", "dtype": "float16", "architecture": "sm_90"}
    table.write_text(json.dumps([other, {**other, "case": "gone"}]))
    process = run()
    assert process.returncode == 0, process.stderr
    kept, row = json.loads(table.read_text())
    assert kept == other
    assert row_key(row) == ("forward_kernel", "decoder-300", "float16", "sm_90")
    assert 32 <= row["registers"] <= 255
    # Four points, 16 rows of 64 bytes, four corners: 32 loads of 512 bytes per warp. The line table
    # misplaces one now and then.
    assert row["row_loads"].keys() == {"128"}
    assert 30 <= row["row_loads"]["128"] <= 33
    assert row["instructions_per_unit"] == pytest.approx(row["loop_instructions"] / 8, abs=0.01)
    assert 50 < row["instructions_per_unit"] < 195

    better = {**row, "instructions_per_unit": row["instructions_per_unit"] / 1.1}
    table.write_text(json.dumps([better]))
    process = run("--check")
    assert process.returncode == 1, process.stderr
    assert "forward_kernel decoder-300 float16 sm_90: instructions_per_unit rose" in process.stdout
    assert json.loads(table.read_text()) == [better]

    # A version of Triton without stored rows is reported and does not fail.
    table.unlink()
    process = run("--check")
    assert process.returncode == 0, process.stderr
    assert "is reported, not checked" in process.stdout
    assert not table.exists()
