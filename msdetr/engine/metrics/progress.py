"""Progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

from msdetr.engine.distributed import Worker

T = TypeVar("T")


def progress(iterable: Iterable[T], description: str, worker: Worker, **options: Any) -> tqdm[T]:
    """`iterable` with a progress bar on the terminal of rank 0, and without one elsewhere."""
    return tqdm(
        iterable,
        desc=description,
        disable=not (worker.is_main and sys.stderr.isatty()),
        dynamic_ncols=True,
        leave=False,
        **options,
    )
