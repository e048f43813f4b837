"""What the codegen benchmark objects to."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks.codegen.checks import check, find_faults, find_regressions
from benchmarks.common import Row

CLEAN: Row = {
    "kernel": "forward_kernel",
    "case": "encoder",
    "dtype": "bfloat16",
    "architecture": "sm_90",
    "registers": 80,
    "spill_bytes": 0,
    "warps_per_sm": 24,
    "instructions": 1200,
    "instructions_per_unit": 123.0,
    "scalar_row_loads": 0,
    "retried_atomics": 0,
    "fences": {"MEMBAR.ALL.CTA": 2, "FENCE.VIEW.ASYNC.S": 2},
    "triton": "3.9.0",
}


def test_clean_code_has_no_faults() -> None:
    assert find_faults(CLEAN) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes per thread"),
        ({"spill_bytes": 8, "architecture": "sm_80"}, "spills 8 bytes per thread"),
        ({"retried_atomics": 3}, "has 3 compare-and-swap atomics"),
        ({"retried_atomics": 3, "architecture": "sm_100"}, "has 3 compare-and-swap atomics"),
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
        # Without such instructions, sm_80 has to.
        {"retried_atomics": 3, "architecture": "sm_80"},
        {"fences": {"MEMBAR.SC.GPU": 1}, "architecture": "sm_80"},
        # The targets are of one type and architecture.
        {"instructions_per_unit": 150.0, "architecture": "sm_100"},
        {"instructions_per_unit": 150.0, "dtype": "float32"},
        {"instructions_per_unit": 150.0, "kernel": "points_kernel"},
        {"instructions_per_unit": 900.0, "kernel": "value_kernel"},
        {"instructions_per_unit": None, "scalar_row_loads": None, "kernel": "splat_kernel"},
    ],
)
def test_what_is_no_fault(changes: Row) -> None:
    assert find_faults({**CLEAN, **changes}) == []


@pytest.mark.parametrize(
    ("changes", "regressions"),
    [
        ({"instructions_per_unit": 126.6}, []),
        (
            {"instructions_per_unit": 126.75},
            ["instructions_per_unit rose from 123.0 to 126.75"],
        ),
        ({"instructions": 2400}, []),
        ({"registers": 96}, []),
        (
            {"registers": 88, "warps_per_sm": 20},
            ["warps_per_sm fell from 24 to 20 (registers: from 80 to 88)"],
        ),
        ({"instructions_per_unit": 100.0, "warps_per_sm": 28}, []),
    ],
)
def test_regressions_are_found(changes: Row, regressions: list[str]) -> None:
    assert find_regressions({**CLEAN, **changes}, CLEAN) == regressions


def test_a_kernel_without_points_regresses_in_total() -> None:
    stored = {**CLEAN, "instructions_per_unit": None}
    assert find_regressions({**stored, "instructions": 1236}, stored) == []
    (regression,) = find_regressions({**stored, "instructions": 1237}, stored)
    assert regression == "instructions rose from 1200 to 1237"


WORSE = {**CLEAN, "spill_bytes": 8, "instructions_per_unit": 128.0}
WHERE = "forward_kernel encoder bfloat16 sm_90: "


@pytest.mark.parametrize(
    ("stored", "problems"),
    [
        ([CLEAN], ["spills 8 bytes per thread", "instructions_per_unit rose from 123.0 to 128.0"]),
        # Rows of another version of Triton, or none: faults alone.
        ([{**CLEAN, "triton": "3.6.0"}], ["spills 8 bytes per thread"]),
        ([], ["spills 8 bytes per thread"]),
        (
            [{**CLEAN, "architecture": "sm_100"}],
            ["spills 8 bytes per thread", "is not stored: run without --check"],
        ),
    ],
)
def test_check_names_the_offender(stored: Sequence[Row], problems: list[str]) -> None:
    assert check([WORSE], stored) == [WHERE + problem for problem in problems]


def test_check_looks_at_every_row() -> None:
    other = {**CLEAN, "case": "decoder-300"}
    assert check([CLEAN, other], [CLEAN, other]) == []
    assert check([CLEAN, {**other, "spill_bytes": 8}], [CLEAN, other]) == [
        "forward_kernel decoder-300 bfloat16 sm_90: spills 8 bytes per thread"
    ]
