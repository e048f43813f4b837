"""The codegen check: finds code that is wrong, or worse than in the stored rows."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.codegen.point_loops import POINT_LOOPS
from benchmarks.codegen.sass import is_wide_fence
from benchmarks.common import Row

TOLERANCE = 1.03
"""Maximum of a kernel's instructions, relative to the stored row."""
MAX_SPILL_BYTES = 16
"""Tolerated spills per thread: a register or two, as versions of Triton differ in."""


def row_key(row: Row) -> tuple[str, str, str, str]:
    """The fields that identify a row."""
    return row["kernel"], row["case"], row["dtype"], row["architecture"]


def find_faults(row: Row) -> list[str]:
    """Faults of a kernel's code, independent of stored rows. Encoder loops must not spill."""
    faults = []
    if row["spill_bytes"] > MAX_SPILL_BYTES:
        faults.append(f"spills {row['spill_bytes']} bytes per thread, maximum {MAX_SPILL_BYTES}")
    if row["case"].startswith("encoder") and row["loop_spills"]:
        faults.append(f"has {row['loop_spills']} spills in its loop over points")
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
    """How a row is worse than the stored row of the same Triton version."""
    worse = []
    size = "instructions" if row["instructions_per_unit"] is None else "instructions_per_unit"
    for name, tolerance in ((size, TOLERANCE), ("spill_bytes", 1.0), ("loop_spills", 1.0)):
        if (row[name] or 0) > tolerance * (stored[name] or 0):
            worse.append(f"{name} rose from {stored[name]} to {row[name]}")
    if row["warps_per_sm"] < stored["warps_per_sm"]:
        worse.append(
            f"warps_per_sm fell from {stored['warps_per_sm']} to {row['warps_per_sm']} "
            f"(registers: from {stored['registers']} to {row['registers']})"
        )
    return worse


def check(rows: Sequence[Row], stored: Sequence[Row]) -> list[str]:
    """All faults and regressions, one line each.

    Args:
        rows: measured.
        stored: of the same version of Triton; empty: only faults are looked for.
    """
    before = {row_key(row): row for row in stored}
    lines = []
    for row in rows:
        problems = find_faults(row)
        if row_key(row) in before:
            problems += find_regressions(row, before[row_key(row)])
        elif stored:
            problems.append("is not stored: run without --check")
        lines += [f"{' '.join(row_key(row))}: {problem}" for problem in problems]
    return lines
