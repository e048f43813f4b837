"""Runs implementations of a detector against each other, each in a process of its own.

On a CPU those of a case live side by side and take turns call by call, so that what else the
machine does hits all. On a GPU they follow each other, so that each has its memory to itself, and
the calls of one follow each other without the host waiting in between.

Before anything is timed, implementations of one function must agree in value: in float32 to
`TOLERANCES`, without TF32. Bfloat16 differs by more than its rounding where a proposal or an
assignment changes, so its tolerance only finds what is broken.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from benchmarks.common import Row, asks_for_huge_pages, environment, peak_memory_mb, percentiles
from benchmarks.detector_cases import Case, Dtype
from benchmarks.detector_flops import peak_flops
from benchmarks.detector_implementations import (
    Implementation,
    choose_implementations,
    is_ours,
    why_not,
)
from benchmarks.processes import Worker
from msdetr.engine.device import resolve_device

Durations = dict[str, float]
"""Seconds of a call by part; `total` is all of it."""

TOLERANCES: dict[Dtype, float] = {"float32": 1e-3, "bfloat16": 0.1}
"""Relative difference of a value above which implementations do not compute the same."""


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """What both benchmarks of a whole detector are told."""

    presets: tuple[str, ...] = ("ms-detr-r50-300",)
    """Recipes, by name."""
    batches: tuple[int, ...] = (2,)
    """Images at once."""
    dtypes: tuple[Dtype, ...] = ("float32",)
    """`bfloat16` computes matrix products under autocast."""
    implementations: tuple[Implementation, ...] = ()
    """What to measure; by default all that can run here."""
    height: int = 480
    """Image height in pixels."""
    width: int = 640
    """Image width in pixels."""
    published: Path | None = None
    """Folder of the published code; it is then measured as well."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where there is one."""
    seed: int = 0
    """Seed of weights, images, targets and dropout."""
    time_budget: float | None = None
    """Seconds after which no further process is started."""
    output: Path | None = None
    """JSON file for the rows, written after each case, and on a GPU after each implementation."""

    def __post_init__(self) -> None:
        for name in ("presets", "batches", "dtypes"):
            if not getattr(self, name):
                raise ValueError(f"{name}: give at least one")
        if self.published is not None and not (self.published / "models").is_dir():
            raise ValueError(f"published: {self.published} has no package `models`")


class Setup(NamedTuple):
    """What a process is to build."""

    implementation: Implementation
    case: Case
    device: torch.device
    published: Path | None
    """Folder of the published code."""
    weights: Path
    """Where the published code leaves its initial weights; ours take them if they are there."""


class Subject(ABC):
    """An implementation at work on a case."""

    @abstractmethod
    def values(self) -> dict[str, float] | None:
        """What has to agree between implementations, before the first `run`; None if nothing."""

    @abstractmethod
    def run(self, repetitions: int) -> list[Durations]:
        """Durations of calls that follow each other."""

    def end_warm_up(self) -> None:
        """Hear that the next `run` counts."""
        return None

    @abstractmethod
    def facts(self, seconds: float) -> Row:
        """Fields of its row besides durations, after the last `run`, whose median was `seconds`."""


Build = Callable[[Setup], Subject]

_subject: Subject
"""That of a worker's process."""
_setup: Setup


def _build(build: Build, setup: Setup) -> None:
    global _subject, _setup
    _setup = setup
    _subject = build(setup)


def _values() -> dict[str, float] | None:
    with torch.backends.cudnn.flags(allow_tf32=False):
        return _subject.values()


def _run(repetitions: int) -> list[Durations]:
    return _subject.run(repetitions)


def _end_warm_up() -> None:
    _subject.end_warm_up()


def _facts(seconds: float) -> Row:
    device = _setup.device
    peak = peak_memory_mb(device)  # before anything is profiled
    return {
        **_subject.facts(seconds),
        "peak_memory_mb": peak,
        "huge_pages": asks_for_huge_pages(),
        **environment(device),
    }


def check_same_values(
    found: dict[str, float], expected: dict[str, float], *, tolerance: float
) -> float:
    """The largest relative difference of a value.

    Raises:
        ValueError: it is above `tolerance`, or one side has values that the other lacks.
    """
    if found.keys() != expected.keys():
        raise ValueError(f"values of one side only: {sorted(found.keys() ^ expected.keys())}")
    difference = {
        name: abs(value - expected[name]) / max(abs(expected[name]), 1e-12)
        for name, value in found.items()
    }
    # Not `<=`, which NaN would pass.
    wrong = [name for name, value in difference.items() if not value < tolerance]
    if wrong:
        raise ValueError(
            "nothing is reported, because results differ: "
            + ", ".join(f"{name} {found[name]:.6g} and {expected[name]:.6g}" for name in wrong[:10])
        )
    return max(difference.values(), default=0.0)


class _Agreement:
    """Compares what implementations of a case compute with what the first computed."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._first: tuple[str, dict[str, float]] | None = None

    def check(self, name: str, values: dict[str, float] | None) -> None:
        if values is None:
            return
        if self._first is None:
            wrong = [key for key, value in values.items() if not math.isfinite(value)]
            if wrong:
                raise ValueError(f"{name}: not finite: {', '.join(wrong)}")
            self._first = name, values
            return
        first, expected = self._first
        try:
            largest = check_same_values(values, expected, tolerance=TOLERANCES[self._case.dtype])
        except ValueError as error:
            raise ValueError(f"{name} against {first}: {error}") from error
        print(f"{name} agrees with {first} to {largest:.1e}, relative")


def compare(
    cases: Iterable[Case],
    options: ComparisonOptions,
    build: Build,
    *,
    benchmark: str,
    repetitions: int,
    warmup: int,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Row]:
    """A row per case and implementation.

    Args:
        cases: in this order.
        options: implementations, device and time.
        build: makes a subject, in its process.
        benchmark: its name, for the rows.
        repetitions: measured calls of each.
        warmup: calls before those.
        clock: for the time budget.

    Raises:
        ValueError: an implementation cannot run here, or computes something else than the first.
    """
    begin = clock()
    device = resolve_device(options.device)
    chosen = choose_implementations(options.implementations, device, options.published)
    for case in cases:
        names = []
        for name in chosen:
            reason = why_not(name, case)
            if reason is None:
                names.append(name)
            else:
                print(f"{case.preset}, {case.dtype}: without {name}: {reason}")
        # On a CPU all at once, on a GPU one after the other.
        groups = [names] if device.type == "cpu" else [[name] for name in names]
        agreement = _Agreement(case)
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "weights.pth"
            for group in groups:
                if options.time_budget is not None and clock() - begin > options.time_budget:
                    print(f"time budget used up before {', '.join(group)} of {case}")
                    return
                setups = [Setup(name, case, device, options.published, weights) for name in group]
                yield from _measure(
                    setups,
                    build,
                    agreement,
                    benchmark=benchmark,
                    repetitions=repetitions,
                    warmup=warmup,
                )


def _measure(
    setups: Sequence[Setup],
    build: Build,
    agreement: _Agreement,
    *,
    benchmark: str,
    repetitions: int,
    warmup: int,
) -> Iterator[Row]:
    """Rows of implementations that live side by side."""
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(setup.implementation)) for setup in setups]
        for worker, setup in zip(workers, setups, strict=True):
            worker.call(_build, build, setup)
            agreement.check(worker.implementation, worker.call(_values))
        _take_turns(workers, warmup)
        for worker in workers:
            worker.call(_end_warm_up)
        durations = _take_turns(workers, repetitions)
        for worker, setup, found in zip(workers, setups, durations, strict=True):
            yield _row(benchmark, worker, setup.case, found)


def _take_turns(workers: Sequence[Worker], calls: int) -> list[list[Durations]]:
    """Durations of each worker's calls. A turn is one call; alone, a worker has all in one turn."""
    durations: list[list[Durations]] = [[] for _ in workers]
    turns = calls if len(workers) > 1 else min(calls, 1)
    for _ in range(turns):
        for worker, found in zip(workers, durations, strict=True):
            found += worker.call(_run, calls // turns)
    return durations


def _row(benchmark: str, worker: Worker, case: Case, durations: Sequence[Durations]) -> Row:
    p50, p80 = percentiles([duration["total"] for duration in durations])
    row: Row = {
        "benchmark": benchmark,
        "preset": case.preset,
        "implementation": worker.implementation,
        "dtype": case.dtype,
        "batch": case.batch,
        "height": case.height,
        "width": case.width,
        "images_per_second": case.batch / p50,
        "seconds_p50": p50,
        "seconds_p80": p80,
        "repetitions": len(durations),
        "speedup_over_published": None,
        "speedup_over_eager": None,
    }
    for part in durations[0]:
        if part != "total":
            row[f"{part}_seconds"] = percentiles([duration[part] for duration in durations])[0]
    row |= worker.call(_facts, p50)
    return row


def utilisation_fields(flops: int | None, seconds: float, device: str, dtype: Dtype) -> Row:
    """Fields about the operations of a call that took `seconds`, None where unknown."""
    rate = None if flops is None else flops / seconds
    peak = peak_flops(device, dtype)
    return {
        "model_flops": flops,
        "model_flops_per_second": rate,
        "model_flops_utilisation": None if rate is None or peak is None else rate / peak,
    }


def add_speedups(rows: Sequence[Row]) -> None:
    """Fill in the ratios of images per second between rows of one run, in place.

    Over `eager` of the same case; over `published` of the same preset, batch and size, which has
    one precision, float32.
    """
    where = ("preset", "batch", "height", "width")
    published = {
        tuple(row[name] for name in where): row["images_per_second"]
        for row in rows
        if row["implementation"] == "published"
    }
    eager = {
        tuple(row[name] for name in (*where, "dtype")): row["images_per_second"]
        for row in rows
        if row["implementation"] == "eager"
    }
    for row in rows:
        slow = published.get(tuple(row[name] for name in where))
        row["speedup_over_published"] = slow and row["images_per_second"] / slow
        slow = eager.get(tuple(row[name] for name in (*where, "dtype")))
        row["speedup_over_eager"] = slow and row["images_per_second"] / slow


def too_slow(rows: Sequence[Row], least: float) -> list[str]:
    """What fails a check: cases whose fastest implementation of ours is not `least` times as fast
    as the published code, or that were not compared with it."""
    fastest: dict[tuple[object, ...], float | None] = {}
    for row in rows:
        if is_ours(row["implementation"]):
            case = (row["preset"], row["batch"], row["dtype"])
            ratio = row["speedup_over_published"]
            best = fastest.get(case)
            fastest[case] = ratio if best is None or ratio is None else max(best, ratio)
    found = []
    for (preset, batch, dtype), ratio in fastest.items():
        if ratio is None:
            found.append(f"{preset}, batch {batch}, {dtype}: not compared with the published code")
        elif ratio < least:
            found.append(f"{preset}, batch {batch}, {dtype}: {ratio:.2f} x, not {least:g} x")
    return found
