"""How many warps fit a multiprocessor."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.codegen.occupancy import warps_per_sm


@pytest.mark.parametrize(
    ("architecture", "registers", "shared_bytes", "num_warps", "warps"),
    [
        ("sm_90", 32, 0, 4, 64),
        ("sm_90", 32, 0, 1, 32),  # as many programs as there may be
        ("sm_90", 80, 0, 4, 24),
        ("sm_90", 81, 0, 4, 20),  # registers come in eights per thread
        ("sm_90", 255, 0, 4, 8),
        ("sm_90", 255, 0, 1, 8),
        ("sm_90", 64, 100 * 1024, 4, 8),
        ("sm_80", 64, 100 * 1024, 4, 4),
        ("sm_80", 64, 0, 16, 32),
    ],
)
def test_warps_that_fit(
    architecture: Any, registers: int, shared_bytes: int, num_warps: int, warps: int
) -> None:
    found = warps_per_sm(
        architecture, registers=registers, shared_bytes=shared_bytes, num_warps=num_warps
    )
    assert found == warps


def test_tensor_memory_bounds_the_programs() -> None:
    sizes = {"registers": 32, "shared_bytes": 0, "num_warps": 4}
    assert warps_per_sm("sm_100", **sizes, tensor_columns=128) == 16
    assert warps_per_sm("sm_100", **sizes, tensor_columns=512) == 4
