"""The measured fields of a row: what the machine code of a kernel costs."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from benchmarks.codegen.compiler import Architecture, Code
from benchmarks.codegen.point_loops import loop_fields
from benchmarks.codegen.sass import (
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
from benchmarks.common import Row


@dataclass(frozen=True)
class _Limits:
    shared_bytes: int
    """Shared memory of a multiprocessor."""
    warps: int = 64
    programs: int = 32
    registers: int = 65536
    tensor_columns: int = 512


_LIMITS: dict[Architecture, _Limits] = {
    # CUDA C++ Programming Guide, technical specifications per compute capability.
    "sm_80": _Limits(shared_bytes=164 * 1024),
    "sm_90": _Limits(shared_bytes=228 * 1024),
    "sm_100": _Limits(shared_bytes=228 * 1024),
}


def measured_fields(code: Code, sass: str, resources: Resources, architecture: Architecture) -> Row:
    """The measured fields of a row.

    Args:
        code: the kernel.
        sass: its disassembly, as for `parse_sass`.
        resources: its registers and spills.
        architecture: the one it was compiled for.

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
    """The number of each atomic instruction in PTX text."""
    return dict(Counter(re.findall(r"(?<![\w.$%])((?:red|atom)\.[\w.:]+)", ptx)))


def warps_per_sm(
    architecture: Architecture,
    *,
    registers: int,
    shared_bytes: int,
    num_warps: int,
    tensor_columns: int = 0,
) -> int:
    """Warps of a kernel that a multiprocessor runs at the same time: 64 times the occupancy."""
    limits = _LIMITS[architecture]
    # A warp gets registers in units of 256, from one of four partitions. A program gets shared
    # memory in units of 128 bytes, and CUDA reserves another KiB for it.
    warp_registers = _round_up(registers * 32, 256)
    warps = 4 * (limits.registers // 4 // warp_registers)
    programs = min(
        limits.programs,
        min(limits.warps, warps) // num_warps,
        limits.shared_bytes // _round_up(shared_bytes + 1024, 128),
    )
    if tensor_columns:
        programs = min(programs, limits.tensor_columns // tensor_columns)
    return programs * num_warps


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
