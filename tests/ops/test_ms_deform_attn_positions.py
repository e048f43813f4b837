"""`splat_kernel` leaves samples out by their positions, and `rest_kernel` adds them by the same
positions: both must compute identical bits. The interpreter does not fuse multiply and add, so the
generated code is checked.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """\
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from msdetr.kernels.ms_deform_attn.plan import as_constants
from msdetr.kernels.ms_deform_attn.sampling import (
    Level,
    Rows,
    Sizes,
    load_reference,
    load_samples,
)


@triton.jit
def kernel(points, weights, reference, out, height, width, sizes: tl.constexpr):
    row = tl.arange(0, 32)
    one = tl.full((32,), 1.0, tl.float32)
    rows = Rows(
        (points + row * 2)[:, None], (weights + row)[:, None], reference + row * sizes.R, one, one
    )
    level = Level(height, width, height, width)
    origin = load_reference(rows, 0, level, sizes)
    samples = load_samples(rows, origin, 0, level, 0, sizes, True)
    tl.store(out + row, samples.x[0] - samples.y[0])


def count_fused(r: int, fusion: bool) -> int:
    pointers = dict.fromkeys(("points", "weights", "reference", "out"), "*fp32")
    signature = {**pointers, "height": "i32", "width": "i32", "sizes": "constexpr"}
    sizes = as_constants(Sizes(M=1, D=1, L=1, P=1, R=r, WIDE=False, GROUP=1, PADDED_LP=1))
    code = triton.compile(
        ASTSource(kernel, signature, {"sizes": sizes}),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 1, "enable_fp_fusion": fusion},
    )
    return code.asm["ptx"].count("fma.rn")


for r in (2, 4):
    print(count_fused(r, fusion=False), count_fused(r, fusion=True))
"""


def test_positions_do_not_depend_on_fusion_by_the_compiler(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    path = tmp_path / "positions.py"
    path.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # One per coordinate of the reference, and with boxes one more per offset.
    assert done.stdout.split() == ["2", "2", "4", "4"]
