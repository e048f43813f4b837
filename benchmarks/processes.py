"""Processes that hold what is measured, each its own imports and memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Worker(contextlib.AbstractContextManager["Worker"]):
    """One implementation in a process of its own, which ends with the context."""

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation
        self._process = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))

    def __exit__(self, *error: object) -> None:
        self._process.shutdown()

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a function, called there."""
        return self._process.submit(function, *args, **kwargs).result()
