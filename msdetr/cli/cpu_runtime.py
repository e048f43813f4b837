"""Settings of a process that computes on a CPU: waiting threads and freed memory.

`docs/design/cpu.md` has the measurements. This module does not import torch, which reads the
environment when it is imported.
"""

from __future__ import annotations

import ctypes
import os
import sys

ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}
"""Environment variables that `tune_cpu_environment` sets."""

# Users who set one of these configure the allocator themselves (mallopt(3), ld.so(8)).
_ALLOCATOR_VARIABLES = (
    "LD_PRELOAD",
    "GLIBC_TUNABLES",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)
_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_MAX = -4


def tune_cpu_environment() -> None:
    """Let waiting OpenMP threads sleep early, unless the user has set their behaviour.

    By default they spin for a long time, which slows down a run on shared cores several times over.
    Call it before torch is imported. It also applies to processes that are started later.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)


def keep_freed_memory() -> bool:
    """Let this process reuse the memory of freed tensors. Returns whether it does.

    By default glibc returns every large block to the system at once, so that each step faults in
    and clears its activations again. Images of many sizes fragment the memory that is kept: 7 GB
    instead of 4 GB in one run.

    Changes nothing with other C libraries, or where the environment chooses an allocator or its
    thresholds.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # No block by mmap, which `free` would unmap, and no trimming of the heap. 1 means success.
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
