"""Options and fixtures of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tensors are small. Threads would cost more time than they save, compete with other test workers,
# and make rounding depend on the number of cores. Set before OpenMP starts, and for subprocesses.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

# Without a GPU, kernels run in Triton's interpreter. It is chosen when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["ptx"]

# What tests compare in float32 is float32: by default a GPU's convolutions round to TF32.
torch.backends.cudnn.allow_tf32 = False

ROOT = Path(__file__).resolve().parents[1]

# Longest first: workers of pytest-xdist take files in this order, and end at about the same time.
LONG_FILES = (
    "engine/test_compile.py",
    "engine/test_distributed.py",
    "ops/test_ms_deform_attn_kernel.py",
    "ops/test_assignment_kernels.py",
    "cli/test_train.py",
    "engine/test_trainer.py",
    "benchmarks/test_detector.py",
    "supervision/test_criterion.py",
    "parity/test_models.py",
    "model/test_detector.py",
    "ops/test_ms_deform_attn_library.py",
    "benchmarks/test_attention.py",
    "benchmarks/test_codegen.py",
    "benchmarks/test_syncs.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=ROOT / "tests" / "golden",
        help="folder of golden cases for tests/parity",
    )
    parser.addoption(
        "--impl",
        choices=("reference", "triton"),
        default="reference",
        help="implementation of the ops that tests/parity checks",
    )
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        ranks = {ROOT / "tests" / name: rank for rank, name in enumerate(LONG_FILES)}
        items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
    reasons = {}
    if not config.getoption("--slow"):
        reasons["slow"] = "takes minutes: give --slow"
    if not config.getoption("--ptx"):
        reasons["compiled"] = "runs compiled code on the CPU: give --ptx"
    if config.getoption("--ptx") or not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device"
    if config.getoption("--ptx") or torch.cuda.is_available():
        reasons["interpreted"] = "needs Triton's interpreter"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images in COCO layout (`coco64/`, `bccd/`), kept beside the project."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}")
    return folder


@pytest.fixture(scope="session")
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton's kernels run: the GPU, or the CPU in Triton's interpreter or with `--ptx`."""
    pytest.importorskip("triton")
    on_gpu = torch.cuda.is_available() and not request.config.getoption("--ptx")
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
