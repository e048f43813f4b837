"""Finds the loop over sampling points in a kernel's machine code, and counts its instructions.

Instructions are counted per unit: one sampling point of eight (query, head) rows, per warp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.codegen.compiler import Code
from benchmarks.codegen.sass import (
    ATOMICS,
    LOADS,
    SPILLS,
    Instruction,
    count_barriers,
    count_widths,
)
from benchmarks.common import Row

ROWS_PER_UNIT = 8

_FIELDS = (
    "loop_instructions",
    "loop_barriers",
    "loop_spills",
    "instructions_per_unit",
    "row_loads",
    "scalar_row_loads",
)


@dataclass(frozen=True, kw_only=True)
class PointLoop:
    """How to read a kernel whose inner loop visits P points of BLOCK_Q rows at a time."""

    row_function: str
    """The device function that reads rows of `value`, or adds to rows of its gradient."""
    target: float | None = None
    """Maximum of instructions per unit, in bfloat16 on sm_90."""


POINT_LOOPS = {
    "forward_kernel": PointLoop(row_function="_add_sample", target=130.0),
    "points_kernel": PointLoop(row_function="_dot_with_corner", target=160.0),
    "value_kernel": PointLoop(row_function="_add_to_corner"),
}
"""By kernel. Of other kernels all instructions are counted."""


def find_loops(code: Sequence[Instruction]) -> list[range]:
    """Positions of the instructions of each loop: from the target of a branch back to it."""
    return [
        range(instruction.target, position + 1)
        for position, instruction in enumerate(code)
        if instruction.target is not None and instruction.target < position
    ]


def inner_loop(code: Sequence[Instruction], row_function: str, num_accesses: int) -> range:
    """The smallest loop with the most memory accesses of a function.

    Args:
        code: of a kernel.
        row_function: name of the function.
        num_accesses: minimum number of them in the loop.

    Raises:
        ValueError: there is no such loop.
    """
    accesses = [
        instruction.function == row_function and instruction.name in (*LOADS, *ATOMICS)
        for instruction in code
    ]
    loops = find_loops(code)
    if loops:
        best = max(loops, key=lambda loop: (sum(accesses[i] for i in loop), -len(loop)))
        if sum(accesses[i] for i in best) >= num_accesses:
            return best
    raise ValueError(
        f"no loop with {num_accesses} memory accesses of {row_function} "
        f"among {len(loops)}; the code has {sum(accesses)}"
    )


def loop_fields(code: Code, instructions: Sequence[Instruction]) -> Row:
    """Fields about the loop over points; all None for a kernel that `POINT_LOOPS` lacks.

    Args:
        code: the kernel.
        instructions: all of it.

    Raises:
        ValueError: the loop is not found.
    """
    if code.kernel not in POINT_LOOPS:
        return dict.fromkeys(_FIELDS)
    row_function = POINT_LOOPS[code.kernel].row_function
    points = code.constants["P"]
    # Three of a point's four corners suffice: the line table misplaces an access now and then.
    positions = inner_loop(instructions, row_function, 3 * points)
    loop = instructions[positions.start : positions.stop]
    warp_rows = code.constants["BLOCK_Q"] / code.num_warps
    row_loads = count_widths((i for i in instructions if i.function == row_function), LOADS)
    return {
        "loop_instructions": len(loop),
        "loop_barriers": count_barriers(loop),
        "loop_spills": sum(i.name in SPILLS for i in loop),
        "instructions_per_unit": round(len(loop) * ROWS_PER_UNIT / (warp_rows * points), 2),
        "row_loads": row_loads,
        "scalar_row_loads": sum(n for width, n in row_loads.items() if int(width) <= 32),
    }
