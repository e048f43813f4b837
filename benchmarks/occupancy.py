"""How much of a kernel fits a multiprocessor at the same time."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.offline_compiler import Architecture


@dataclass(frozen=True)
class _Limits:
    shared_bytes: int
    """Of a multiprocessor."""
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


def warps_per_sm(
    architecture: Architecture,
    *,
    registers: int,
    shared_bytes: int,
    num_warps: int,
    tensor_columns: int = 0,
) -> int:
    """Warps of a kernel that fit a multiprocessor at the same time (the occupancy, times 64)."""
    limits = _LIMITS[architecture]
    # Registers are given out by 256 to a warp, whose home is one of four partitions; shared memory
    # by 128 bytes to a program, of which CUDA takes another KiB.
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
