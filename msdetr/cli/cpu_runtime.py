"""How a process computes on a CPU: waiting threads, huge pages, freed memory.

Imports no torch, which reads its share of this when it is imported.
"""

from __future__ import annotations

import ctypes
import os
import sys

ENVIRONMENT = {"GOMP_SPINCOUNT": "1000", "THP_MEM_ALLOC_ENABLE": "1"}
"""What `tune_cpu_environment` sets."""

# What a user who has a mind of their own about memory sets (see mallopt(3), ld.so(8)).
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
    """Set what torch reads from the environment for runs on a CPU, unless the user has set it.

    Threads of OpenMP that wait soon sleep: by default they spin for long, and a run that shares
    its cores with anything else slows down several times over. Large tensors on Linux ask for huge
    pages (where the system's setting is `madvise`): each small page of fresh memory costs a fault.
    Only has an effect before torch is imported, and on processes that are started afterwards.
    """
    for name, value in ENVIRONMENT.items():
        if name != "GOMP_SPINCOUNT" or "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault(name, value)


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for the next ones; whether it now does.

    By default glibc returns every large block to the system at once, and the activations of the
    next step are fresh pages again, each a fault to be zeroed. With huge pages, the published
    code's training step of 23.5 s became one of 13.2 s (docs/design.md). Images of many sizes leave
    holes in what is kept: 7 GB instead of 4 GB in one such run.

    Nothing is changed on other C libraries, or where the environment chooses an allocator or its
    thresholds.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # No block by mmap, which free would unmap; no trimming of the heap. Each returns 1 on success.
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
