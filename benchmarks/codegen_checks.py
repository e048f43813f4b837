"""What the codegen benchmark objects to: code that is wrong, or worse than in the stored rows."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common import Row
from benchmarks.point_loops import POINT_LOOPS
from benchmarks.sass import is_wide_fence

TOLERANCE = 1.03
"""Instructions that a kernel may have, relative to the stored row."""


def row_key(row: Row) -> tuple[str, str, str, str]:
    """What a row is about."""
    return row["kernel"], row["case"], row["dtype"], row["architecture"]


def find_faults(row: Row) -> list[str]:
    """What is wrong with code, whatever it was before."""
    faults = []
    if row["spill_bytes"]:
        faults.append(f"spills {row['spill_bytes']} bytes per thread")
    if row["architecture"] != "sm_80":
        if row["retried_atomics"]:
            faults.append(f"has {row['retried_atomics']} compare-and-swap atomics")
        wide = [opcode for opcode in row["fences"] if is_wide_fence(opcode)]
        if wide:
            faults.append(f"has fences of the whole GPU: {', '.join(wide)}")
    if row["scalar_row_loads"]:
        faults.append(f"reads value by {row['scalar_row_loads']} loads of at most 32 bits")
    target = POINT_LOOPS[row["kernel"]].target if row["kernel"] in POINT_LOOPS else None
    if (
        target is not None
        and (row["architecture"], row["dtype"]) == ("sm_90", "bfloat16")
        and row["instructions_per_unit"] > target
    ):
        faults.append(f"{row['instructions_per_unit']} instructions per unit, target {target:.0f}")
    return faults


def find_regressions(row: Row, stored: Row) -> list[str]:
    """What is worse than in the stored row."""
    worse = []
    name = "instructions" if row["instructions_per_unit"] is None else "instructions_per_unit"
    if row[name] > TOLERANCE * stored[name]:
        worse.append(f"{name} rose from {stored[name]} to {row[name]}")
    if row["warps_per_sm"] < stored["warps_per_sm"]:
        worse.append(
            f"warps_per_sm fell from {stored['warps_per_sm']} to {row['warps_per_sm']} "
            f"(registers: from {stored['registers']} to {row['registers']})"
        )
    return worse


def check(rows: Sequence[Row], stored: Sequence[Row]) -> list[str]:
    """Everything that is wrong, one line each.

    Stored rows count where they are of the same version of Triton.
    """
    before = {row_key(row): row for row in stored}
    versions = {row["triton"] for row in stored}
    lines = []
    for row in rows:
        problems = find_faults(row)
        old = before.get(row_key(row))
        if old is not None and old["triton"] == row["triton"]:
            problems += find_regressions(row, old)
        elif old is None and row["triton"] in versions:
            problems.append("is not stored: run without --check")
        lines += [f"{' '.join(row_key(row))}: {problem}" for problem in problems]
    return lines
