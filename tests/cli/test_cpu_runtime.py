from __future__ import annotations

import os
import subprocess
import sys

import pytest

from msdetr.cli import cpu_runtime
from msdetr.cli.cpu_runtime import keep_freed_memory, tune_cpu_environment

CHURN = """
import ctypes
import resource
import sys
import torch
from msdetr.cli.cpu_runtime import keep_freed_memory

ctypes.CDLL("libc.so.6").prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: small pages only.
assert keep_freed_memory() == (sys.argv[1] == "keep")
for _ in range(10):
    torch.ones(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Prints the page faults of allocating 64 MiB, after it has been allocated and freed ten times."""


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("OMP_WAIT_POLICY", *cpu_runtime.ENVIRONMENT, *cpu_runtime._ALLOCATOR_VARIABLES)
    for name in names:
        monkeypatch.setenv(name, "")  # So that the end of the test restores it.
        monkeypatch.delenv(name)


def test_environment() -> None:
    tune_cpu_environment()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


def test_the_user_s_wait_policy_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    tune_cpu_environment()
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_taken_again() -> None:
    faults = {
        mode: int(
            subprocess.run(
                [sys.executable, "-c", CHURN, mode],
                env=os.environ | environment,
                capture_output=True,
                check=True,
                text=True,
            ).stdout
        )
        for mode, environment in {"keep": {}, "leave": {"MALLOC_MMAP_MAX_": "65536"}}.items()
    }
    assert faults["keep"] < 100
    assert faults["leave"] > 10_000  # 16,384 pages of 4 KiB


@pytest.mark.parametrize("name", cpu_runtime._ALLOCATOR_VARIABLES)
def test_the_user_s_allocator_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "something")
    monkeypatch.setattr(cpu_runtime.ctypes, "CDLL", pytest.fail)
    assert not keep_freed_memory()


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_left_alone(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(cpu_runtime.ctypes, "CDLL", pytest.fail)
    assert not keep_freed_memory()


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(cpu_runtime.ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
