"""Runs implementations of a detector against each other, each in a process of its own.

On a CPU those of a case live side by side and take turns call by call, so that what else the
machine does hits all. On a GPU they follow each other, so that each has its memory to itself, and
the calls of one follow each other without the host waiting in between. One that fails there does
not keep the others from being measured.

Before anything is timed, implementations of one function must agree in value: in float32 to
`TOLERANCES`, without TF32. Bfloat16 differs by more than its rounding where a proposal or an
assignment changes, so its tolerance only finds what is broken.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch

from benchmarks.common import (
    Row,
    environment,
    peak_memory_mb,
    percentiles,
    print_table,
    write_rows,
)
from benchmarks.detector_cases import Case, Dtype
from benchmarks.detector_flops import detector_flops, peak_flops
from benchmarks.detector_implementations import (
    COMPILED,
    Implementation,
    choose_implementations,
    is_ours,
    is_tuned,
    why_not,
)
from benchmarks.gpu_counts import device_work, host_waits
from benchmarks.processes import Worker
from msdetr.cli.cpu_runtime import ENVIRONMENT, keep_freed_memory
from msdetr.engine.compile import CompileError, num_graphs
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
    num_targets: int = 7
    """Boxes per image (COCO has 7.3 on average); inference does not look at them."""
    warmup: int = 2
    """Calls before the measured ones; a recorded step is fully recorded after two."""
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

    @property
    def cases(self) -> list[Case]:
        """What is measured, in this order."""
        return [
            Case(
                preset=preset,
                batch=batch,
                dtype=dtype,
                height=self.height,
                width=self.width,
                num_targets=self.num_targets,
                seed=self.seed,
            )
            for preset, batch, dtype in itertools.product(self.presets, self.batches, self.dtypes)
        ]

    def __post_init__(self) -> None:
        self.cases  # noqa: B018 # they check what they hold
        if self.warmup < 0:
            raise ValueError(f"warmup must not be negative, got {self.warmup}")
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
    """An implementation at work on a case: calls that are each a step or a pass."""

    training: ClassVar[bool]
    """Whether a call computes gradients."""

    def __init__(self, setup: Setup) -> None:
        """Take what all have in common."""
        self.setup = setup
        self._graphs_when_warm = 0

    @abstractmethod
    def values(self) -> dict[str, float] | None:
        """What has to agree between implementations, before the first `run`; None if nothing."""

    @abstractmethod
    def call(self) -> object:
        """One call, which is not waited for."""

    @abstractmethod
    def run(self, repetitions: int) -> list[Durations]:
        """Durations of calls that follow each other."""

    def end_warm_up(self) -> None:
        """From here on, nothing should compile."""
        self._graphs_when_warm = num_graphs()

    def facts(self, seconds: float) -> Row:
        """Fields of its row besides durations, after the last `run`; a call took `seconds`."""
        implementation, case, device, *_ = self.setup
        compiles = implementation in COMPILED
        on_gpu = device.type == "cuda"
        work = device_work(self.call) if on_gpu else None
        same_model = implementation != "huggingface"
        flops = detector_flops(case, training=self.training) if same_model else None
        where = environment(device)
        peak = peak_flops(where["device"], case.dtype)
        return {
            "kernels": work and work.kernels,
            "gpu_idle_share": work and max(0.0, 1.0 - work.busy_seconds / seconds),
            "host_reads": host_waits(self.call) if on_gpu else None,
            "graph_breaks": _num_graph_breaks() if compiles else None,
            "recompiles": num_graphs() - self._graphs_when_warm if compiles else None,
            "model_flops": flops,
            "model_flops_per_second": flops and flops / seconds,
            "model_flops_utilisation": flops and peak and flops / seconds / peak,
            "tuned_process": device.type == "cpu" and is_tuned(implementation),
            **where,
        }


Build = Callable[[Setup], Subject]

_subject: Subject
"""That of a worker's process."""


def _build(build: Build, setup: Setup) -> None:
    global _subject
    if setup.device.type == "cpu" and is_tuned(setup.implementation):
        keep_freed_memory()
    _subject = build(setup)


def _values() -> dict[str, float] | None:
    with without_tf32():
        return _subject.values()


def _run(repetitions: int) -> list[Durations]:
    return _subject.run(repetitions)


def _end_warm_up() -> None:
    _subject.end_warm_up()


def _facts(seconds: float) -> Row:
    # What profiling takes is not the implementation's.
    peak = {"peak_memory_mb": peak_memory_mb(_subject.setup.device)}
    return peak | _subject.facts(seconds)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Let convolutions of a GPU compute in full float32; matrix products do by default."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


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


def _num_graph_breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


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
    parts: Sequence[str] = (),
    repetitions: int,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Row]:
    """A row per case and implementation.

    Args:
        cases: in this order.
        options: implementations, device and time.
        build: makes a subject, in its process.
        benchmark: its name, for the rows.
        parts: of a call, each with a field of its median; None where it is not known.
        repetitions: measured calls of each.
        clock: for the time budget.

    Raises:
        ValueError: an implementation cannot run here, or computes something else than the first.
            On a GPU it is raised after all others were measured, for errors of any kind.
    """
    failed: list[str] = []
    yield from _rows(cases, options, build, benchmark, parts, repetitions, clock, failed)
    if failed:
        raise ValueError("; ".join(failed))


def _rows(
    cases: Iterable[Case],
    options: ComparisonOptions,
    build: Build,
    benchmark: str,
    parts: Sequence[str],
    repetitions: int,
    clock: Callable[[], float],
    failed: list[str],
) -> Iterator[Row]:
    """As `compare`, which passes its arguments on. Appends what fails on a GPU to `failed`."""
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
                try:
                    rows = _measure(setups, build, agreement, options, repetitions, parts)
                except torch.OutOfMemoryError:
                    print(f"left out, as memory ran out: {', '.join(group)} of {case}")
                    continue
                except Exception as error:
                    if device.type == "cpu":
                        raise
                    traceback.print_exception(error)
                    failed.append(f"{', '.join(group)} of {case}: {error}")
                    continue
                yield from ({"benchmark": benchmark, **row} for row in rows)


def _measure(
    setups: Sequence[Setup],
    build: Build,
    agreement: _Agreement,
    options: ComparisonOptions,
    repetitions: int,
    parts: Sequence[str],
) -> list[Row]:
    """Rows of implementations that live side by side."""
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_start(setup.implementation)) for setup in setups]
        for worker, setup in zip(workers, setups, strict=True):
            worker.call(_build, build, setup)
            agreement.check(worker.implementation, worker.call(_values))
        _take_turns(workers, options.warmup)
        for worker in workers:
            worker.call(_end_warm_up)
        durations = _take_turns(workers, repetitions)
        return [
            _row(worker, setup.case, found, parts)
            for worker, setup, found in zip(workers, setups, durations, strict=True)
        ]


def _start(implementation: str) -> Worker:
    return Worker(implementation, ENVIRONMENT if is_tuned(implementation) else None)


def _take_turns(workers: Sequence[Worker], calls: int) -> list[list[Durations]]:
    """Durations of each worker's calls. A turn is one call; alone, a worker has all in one turn."""
    durations: list[list[Durations]] = [[] for _ in workers]
    turns = calls if len(workers) > 1 else min(calls, 1)
    for _ in range(turns):
        for worker, found in zip(workers, durations, strict=True):
            found += worker.call(_run, calls // turns)
    return durations


def _row(worker: Worker, case: Case, durations: Sequence[Durations], parts: Sequence[str]) -> Row:
    p50, p80 = percentiles([duration["total"] for duration in durations])
    row: Row = {
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
    for part in parts:
        known = part in durations[0]
        row[f"{part}_seconds"] = percentiles([d[part] for d in durations])[0] if known else None
    return row | worker.call(_facts, p50)


def collect(rows: Iterable[Row], output: Path | None) -> list[Row]:
    """All rows, with their speedups; written to `output` as they come.

    Raises:
        ValueError: a model cannot be compiled.
    """
    found: list[Row] = []
    try:
        for row in rows:
            found.append(row)
            add_speedups(found)
            what = " ".join(str(row[name]) for name in ("preset", "implementation", "dtype"))
            print(f"{what} batch {row['batch']}: {row['seconds_p50']:.4f} s", flush=True)
            if output is not None:
                write_rows(output, found)
    except CompileError as error:
        raise ValueError(str(error)) from error
    return found


def print_rows(rows: Sequence[Row], parts: Sequence[str] = ()) -> None:
    """Print the columns in which some row has a value; `parts` as for `compare`."""
    columns = {
        **dict.fromkeys(("preset", "implementation", "dtype", "batch"), ""),
        **dict.fromkeys(("seconds_p50", "seconds_p80"), ".4f"),
        **{f"{part}_seconds": ".4f" for part in parts},
        "images_per_second": ".3f",
        "speedup_over_published": ".2f",
        "speedup_over_eager": ".2f",
        "gpu_idle_share": ".3f",
        "kernels": ".0f",
        "host_reads": "",
        "recompiles": "",
        "peak_memory_mb": ".0f",
        "model_flops_utilisation": ".3f",
    }
    used = {name for name in columns if any(row[name] is not None for row in rows)}
    print_table(rows, {name: spec for name, spec in columns.items() if name in used})


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
