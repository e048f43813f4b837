"""Processes that hold what is measured, each its own imports and memory."""

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

    The process starts with the environment of this one and `environment` over it.
    """

    def __init__(self, implementation: str, environment: Mapping[str, str] | None = None) -> None:
        self.implementation = implementation
        self._process = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))
        with _environment(environment or {}):
            self.call(os.getpid)  # It starts with its first call.

    def __exit__(self, *error: object) -> None:
        self._process.shutdown()

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a function, called there."""
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
