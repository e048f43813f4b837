"""The plugin of `--ptx` on kernels of its own: what it reports, runs and counts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ptx
import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parent

CONFTEST = """\
import pytest
import torch

pytest_plugins = ["ptx"]


@pytest.fixture
def kernel_device():
    return torch.device("cpu")
"""

KERNELS = """\
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl


class Terms(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


@triton.jit
def add_kernel(terms, result, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(result + i, tl.load(terms.a + i) + tl.load(terms.b + i))


@triton.jit
def reverse_kernel(x, result, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(x + i, i.to(tl.float32))
    tl.store(result + i, tl.load(x + SIZE - 1 - i))  # of other warps


def add(a, b):
    result = torch.empty_like(a)
    add_kernel[(1,)](Terms(a, b), result, SIZE=128)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right(kernel_device, dtype):
    x = torch.randn(128, dtype=dtype)
    assert torch.equal(add(x, x), x + x)


def test_race(kernel_device):
    reverse_kernel[(1,)](torch.zeros(128), torch.zeros(128), SIZE=128)


def test_bounds(kernel_device):
    add(torch.zeros(128), torch.zeros(128)[1:])


def test_unwritten(kernel_device):
    add(torch.zeros(128), torch.empty(128))


def test_caught(kernel_device):
    with pytest.raises(Exception):
        add(torch.zeros(128), torch.zeros(127))


def test_without_kernels():
    pass
"""


def run(folder: Path, plugins: Path, *options: str) -> str:
    """The report of the tests above."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_kernels.py").write_text(KERNELS)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(plugins), str(TESTS.parent))),
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "TRITON_INTERPRET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rsf", "-p", "no:cacheprovider", *options, str(folder)],
        env=environment, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.skipif(not (ptx.FOLDER / "ptxrun").is_dir(), reason=f"no ptxrun in {ptx.FOLDER}")
def test_errors_of_kernels_fail_tests(tmp_path):
    report = run(tmp_path, TESTS, "--ptx", "sm_90", "--ptx-seed", "0,1", "-n", "1")
    assert "8 failed, 4 passed" in report, report
    # Versions of Triton name other lines of an expression.
    race_at, bounds_at = (rf"PTX line \d+ \(test_kernels.py:{x}:\d+\)" for x in ("2[345]", "1[78]"))
    for test, error in (
        ("race", rf"reverse_kernel, {race_at}.*race between warps"),
        ("bounds", rf"add_kernel, {bounds_at}.*out of bounds at terms\[1\]"),
        ("unwritten", r"add_kernel.*never written at terms\[1\]"),
        ("caught", r"add_kernel.*out of bounds at terms\[1\] \+ 508"),
    ):
        assert re.search(error, report), report
        assert report.count(f"FAILED test_kernels.py::test_{test}[seed=") == 2
    assert re.search(r"add_kernel +bfloat16 +2 +\d+", report)
    assert re.search(r"add_kernel +float32 +8 +\d+", report)
    assert "3 pairs of kernel and dtype" in report


@pytest.mark.parametrize(
    ("types", "dtype"),
    [
        (["*fp32", "*bf16", "i64"], "bfloat16"),
        (["('*fp32', ('*fp16', 'i32'))", "*fp32"], "float16"),
        (["*fp32", "fp32", "*i64"], "float32"),
        (["fp32", "*i64"], "-"),
    ],
)
def test_dtype_of_a_launch(types, dtype):
    assert ptx.dtype_of(types) == dtype


def test_without_the_emulator_tests_are_skipped(tmp_path):
    plugins = tmp_path / "project" / "tests"
    plugins.mkdir(parents=True)
    shutil.copy(TESTS / "ptx.py", plugins)
    report = run(tmp_path, plugins, "--ptx", "sm_90", "-n", "0")
    assert re.search(rf"SKIPPED.*no ptxrun in {tmp_path / 'shared'}", report), report
    assert re.search(r"[56] skipped", report), report
