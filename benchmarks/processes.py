"""Worker processes: each implementation has its own imports and memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Worker(contextlib.AbstractContextManager["Worker"]):
    """One implementation in a process of its own, which ends with the context.

    The process gets the environment of this one, updated with `environment`.
    """

    def __init__(self, implementation: str, environment: Mapping[str, str] | None = None) -> None:
        self.implementation = implementation
        self._process = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))
        with _environment(environment or {}):
            self.call(os.getpid)  # starts the process

    def __exit__(self, *error: object) -> None:
        self._process.shutdown()

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in the process and return its result."""
        return self._process.submit(function, *args, **kwargs).result()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
