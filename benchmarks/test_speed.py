"""Quick cases to hold against earlier runs: `pytest benchmarks --benchmark-only`.

They need pytest-benchmark (extra `dev`), whose `--benchmark-save` and `--benchmark-compare` keep
and compare runs. On a CPU the reference is timed, on a GPU the kernels, too. Durations include the
wait for the device: for device time take `benchmarks.bench_ms_deform_attn`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.ms_deform_attn_cases import SHAPES, Case, make_inputs
from benchmarks.ms_deform_attn_peers import IMPLEMENTATIONS

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
NEEDS_GPU = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape_name", ["encoder", "decoder-900"])
@pytest.mark.parametrize(
    "name",
    [
        "reference",
        pytest.param("msdetr-fused", marks=NEEDS_GPU),
        pytest.param("msdetr", marks=NEEDS_GPU),
    ],
)
def test_ms_deform_attn(
    benchmark: BenchmarkFixture, name: str, shape_name: str, direction: str
) -> None:
    """One image, of few tokens."""
    implementation = IMPLEMENTATIONS[name]
    run = implementation.build()
    shape = SHAPES[shape_name].small()
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    inputs = make_inputs(Case(shape_name, shape, 1, dtype, 1.0), DEVICE)

    def call() -> None:
        output = run(inputs)
        if direction == "forward+backward":
            implementation.gradients(output, inputs)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
