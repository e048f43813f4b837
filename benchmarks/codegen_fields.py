"""What a row says about the code of a kernel, whatever the kernel."""

from __future__ import annotations

import re
from collections import Counter

from benchmarks.common import Row
from benchmarks.occupancy import warps_per_sm
from benchmarks.offline_compiler import Architecture, Code
from benchmarks.point_loops import loop_fields
from benchmarks.sass import (
    ATOMICS,
    FENCES,
    LOADS,
    STORES,
    Resources,
    count_barriers,
    count_opcodes,
    count_widths,
    function_at,
    is_retried,
    parse_sass,
)


def measured_fields(code: Code, sass: str, resources: Resources, architecture: Architecture) -> Row:
    """The measured fields of a row.

    Args:
        code: the kernel.
        sass: its disassembly, as for `parse_sass`.
        resources: what it occupies.
        architecture: that it was compiled for.

    Raises:
        ValueError: the code is not understood.
    """
    instructions = parse_sass(sass, function_at)
    atomics = count_opcodes(instructions, ATOMICS)
    return {
        "num_warps": code.num_warps,
        "registers": resources.registers,
        "spill_bytes": resources.spill_bytes,
        "shared_bytes": code.shared_bytes,
        "warps_per_sm": warps_per_sm(
            architecture,
            registers=resources.registers,
            shared_bytes=code.shared_bytes,
            num_warps=code.num_warps,
            tensor_columns=code.tensor_columns,
        ),
        "instructions": len(instructions),
        **loop_fields(code, instructions),
        "loads": count_widths(instructions, LOADS),
        "stores": count_widths(instructions, STORES),
        "atomics": atomics,
        "ptx_atomics": ptx_atomics(code.ptx),
        "retried_atomics": sum(count for opcode, count in atomics.items() if is_retried(opcode)),
        "fences": count_opcodes(instructions, FENCES),
        "barriers": count_barriers(instructions),
    }


def ptx_atomics(ptx: str) -> dict[str, int]:
    """How often each atomic instruction is in PTX text."""
    return dict(Counter(re.findall(r"(?<![\w.$%])((?:red|atom)\.[\w.:]+)", ptx)))
