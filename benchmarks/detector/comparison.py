"""Runs implementations of a detector against each other, each in a process of its own.

On a CPU the members of a group, for instance all implementations of a case, run in parallel
processes and take turns call by call, so that other load on the machine affects all of them. On a
GPU they run one after the other, so that each has the memory to itself, and the host does not wait
between calls. There, a failure of one does not stop the others.

Before anything is timed, implementations of one function must agree in value, to `TOLERANCES`;
float32 is compared without TF32. In bfloat16 a changed proposal or assignment makes a difference
larger than rounding, so that tolerance finds gross errors only.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch

from benchmarks.cli import require_at_least
from benchmarks.common import (
    Row,
    collect_rows,
    environment,
    group_rows,
    peak_memory_mb,
    print_table,
)
from benchmarks.detector.cases import Case, Dtype
from benchmarks.detector.flops import detector_flops, peak_flops
from benchmarks.detector.implementations import (
    COMPILED,
    Implementation,
    choose_implementations,
    is_ours,
    is_tuned,
    why_not,
)
from benchmarks.launches import device_work, host_waits
from benchmarks.processes import Worker
from msdetr.cli.cpu_runtime import ENVIRONMENT, keep_freed_memory
from msdetr.engine.compile import CompileError, num_graphs
from msdetr.engine.device import resolve_device

Durations = dict[str, float]
"""Seconds of a call by phase; `total` is the whole call."""

TOLERANCES: dict[Dtype, float] = {"float32": 1e-3, "bfloat16": 0.1}
"""Maximum relative difference of a value between implementations."""


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """Options of both benchmarks of a whole detector."""

    presets: tuple[str, ...] = ("ms-detr-r50-300",)
    """Recipes, by name."""
    batches: tuple[int, ...] = (2,)
    """Images at once."""
    dtypes: tuple[Dtype, ...] = ("float32",)
    """`bfloat16` computes matrix products under autocast."""
    implementations: tuple[Implementation, ...] = ()
    """Which to measure; by default all that can run here."""
    height: int = 480
    """Image height in pixels."""
    width: int = 640
    """Image width in pixels."""
    num_targets: int = 7
    """Boxes per image (COCO has 7.3 on average); inference ignores them."""
    warmup: int = 2
    """Calls before the measured ones; a step is captured after two."""
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
        """The cases, in order of measurement."""
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
        self.cases  # noqa: B018 # cases check their values
        require_at_least(self, 0, "warmup")
        for name in ("presets", "batches", "dtypes"):
            if not getattr(self, name):
                raise ValueError(f"{name}: give at least one")
        if self.published is not None and not (self.published / "models").is_dir():
            raise ValueError(f"published: {self.published} has no package `models`")


class Setup(NamedTuple):
    """The implementation and the case that a process builds."""

    implementation: Implementation
    case: Case
    device: torch.device
    published: Path | None
    """Folder of the published code."""
    weights: Path
    """File where the published code writes its initial weights; ours load it if it exists."""


class Subject(ABC):
    """An implementation of a case. A call is a training step or an inference pass."""

    training: ClassVar[bool]
    """Whether a call computes gradients."""

    def __init__(self, setup: Setup) -> None:
        """Keep the setup."""
        self.setup = setup
        self._graphs_when_warm = 0

    @abstractmethod
    def values(self) -> dict[str, float] | None:
        """Values on which implementations must agree, before the first `run`; None: no values."""

    @abstractmethod
    def call(self) -> object:
        """One call; does not wait for the device."""

    @abstractmethod
    def run(self, repetitions: int) -> list[Durations]:
        """Durations of consecutive calls."""

    def end_warm_up(self) -> None:
        """Note the compiled graphs: later ones are recompiles."""
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
Member = tuple[Implementation, Case]
"""Of a group: what is measured together."""

_subject: Subject
"""The subject of this worker process."""


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
    # Before profiling, whose memory is not the implementation's.
    peak = {"peak_memory_mb": peak_memory_mb(_subject.setup.device)}
    return peak | _subject.facts(seconds)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Compute convolutions on a GPU in full float32, as matrix products are by default."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def check_same_values(
    values: dict[str, float], expected: dict[str, float], *, tolerance: float
) -> float:
    """The largest relative difference of a value.

    Raises:
        ValueError: it is above `tolerance`, or one side has values that the other lacks.
    """
    if values.keys() != expected.keys():
        raise ValueError(f"values of one side only: {sorted(values.keys() ^ expected.keys())}")
    difference = {
        name: abs(value - expected[name]) / max(abs(expected[name]), 1e-12)
        for name, value in values.items()
    }
    # Not `<=`, which NaN would pass.
    wrong = [name for name, value in difference.items() if not value < tolerance]
    if wrong:
        raise ValueError(
            "nothing is reported, because results differ: "
            + ", ".join(
                f"{name} {values[name]:.6g} and {expected[name]:.6g}" for name in wrong[:10]
            )
        )
    return max(difference.values(), default=0.0)


def _num_graph_breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def check_agreement(
    name: str, values: dict[str, float] | None, expected: dict[str, float], dtype: Dtype
) -> None:
    """Compare the values of an implementation with those of the first, which fill `expected`.

    Raises:
        ValueError: they differ, or are not finite.
    """
    if values is None:
        return
    if not expected:
        wrong = [key for key, value in values.items() if not math.isfinite(value)]
        if wrong:
            raise ValueError(f"{name}: not finite: {', '.join(wrong)}")
        expected.update(values)
        return
    try:
        difference = check_same_values(values, expected, tolerance=TOLERANCES[dtype])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    print(f"{name} agrees with the first to {difference:.1e}, relative")


def compare(
    cases: Iterable[Case],
    options: ComparisonOptions,
    build: Build,
    *,
    benchmark: str,
    phases: Sequence[str] = (),
    repetitions: int,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Row]:
    """A row per case and implementation.

    Args:
        cases: in this order.
        options: implementations, device and time.
        build: makes a subject, in its process.
        benchmark: its name, for the rows.
        phases: of a call. Each gets a field with its median, or None where it is not timed.
        repetitions: measured calls of each.
        clock: for the time budget.

    Raises:
        ValueError: as `measure_groups` does.
    """
    device = resolve_device(options.device)
    chosen = choose_implementations(options.implementations, device, options.published)
    groups = []
    for case in cases:
        names = []
        for name in chosen:
            reason = why_not(name, case)
            if reason is None:
                names.append(name)
            else:
                print(f"{case.preset}, {case.dtype}: without {name}: {reason}")
        groups.append([(name, case) for name in names])
    rows = measure_groups(
        groups, device, options, build, phases=phases, repetitions=repetitions, clock=clock
    )
    yield from ({"benchmark": benchmark, **row} for row in rows)


def measure_groups(
    groups: Iterable[Sequence[Member]],
    device: torch.device,
    options: ComparisonOptions,
    build: Build,
    *,
    phases: Sequence[str] = (),
    repetitions: int,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Row]:
    """A row per implementation of a case. On a CPU those of a group take turns.

    Args:
        groups: in this order.
        device: where to compute.
        options, build, phases, repetitions, clock: as for `compare`.

    Raises:
        ValueError: an implementation cannot run here, or its values differ from those of the first
            of the same case. On a GPU it is raised after all others were measured, for errors of
            any kind.
    """
    failed: list[str] = []
    begin = clock()
    if device.type != "cpu":  # one after the other
        groups = [[one] for group in groups for one in group]
    expected: defaultdict[Case, dict[str, float]] = defaultdict(dict)
    with tempfile.TemporaryDirectory() as folder:
        for group in groups:
            title = ", ".join(f"{name} of {case}" for name, case in group)
            if options.time_budget is not None and clock() - begin > options.time_budget:
                print(f"time budget used up: without {title}")
                continue
            setups = [
                Setup(
                    name,
                    case,
                    device,
                    options.published,
                    Path(folder) / f"{case.preset}-{case.batch}-{case.dtype}.pth",
                )
                for name, case in group
            ]
            try:
                rows = _measure(setups, build, expected, options.warmup, repetitions, phases)
            except torch.OutOfMemoryError:
                print(f"left out, as memory ran out: {title}")
                continue
            except Exception as error:
                if device.type == "cpu":
                    raise
                traceback.print_exception(error)
                failed.append(f"{title}: {error}")
                continue
            yield from rows
    if failed:
        raise ValueError("; ".join(failed))


def _measure(
    setups: Sequence[Setup],
    build: Build,
    expected: Mapping[Case, dict[str, float]],
    warmup: int,
    repetitions: int,
    phases: Sequence[str],
) -> list[Row]:
    """Rows of implementations that take turns."""
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_start(setup.implementation)) for setup in setups]
        for worker, setup in zip(workers, setups, strict=True):
            worker.call(_build, build, setup)
            values = worker.call(_values)
            check_agreement(setup.implementation, values, expected[setup.case], setup.case.dtype)
        _take_turns(workers, warmup)
        for worker in workers:
            worker.call(_end_warm_up)
        durations = _take_turns(workers, repetitions)
        return [
            _row(worker, setup.case, seconds, phases)
            for worker, setup, seconds in zip(workers, setups, durations, strict=True)
        ]


def _start(implementation: str) -> Worker:
    return Worker(implementation, ENVIRONMENT if is_tuned(implementation) else None)


def _take_turns(workers: Sequence[Worker], calls: int) -> list[list[Durations]]:
    """Durations of each worker's calls. A turn is one call; a single worker takes one turn."""
    durations: list[list[Durations]] = [[] for _ in workers]
    turns = calls if len(workers) > 1 else min(calls, 1)
    for _ in range(turns):
        for worker, seconds in zip(workers, durations, strict=True):
            seconds += worker.call(_run, calls // turns)
    return durations


def _row(worker: Worker, case: Case, durations: Sequence[Durations], phases: Sequence[str]) -> Row:
    p50, p80 = np.quantile([duration["total"] for duration in durations], (0.5, 0.8)).tolist()
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
    }
    for phase in phases:
        known = phase in durations[0]
        row[f"{phase}_seconds"] = median(d[phase] for d in durations) if known else None
    return row | worker.call(_facts, p50)


def collect(rows: Iterable[Row], output: Path | None) -> list[Row]:
    """All rows with their speedups, written to `output` after each of them.

    Raises:
        ValueError: a model cannot be compiled.
    """

    def with_speedups() -> Iterator[list[Row]]:
        measured: list[Row] = []
        for row in rows:
            measured.append(row)
            add_speedups(measured)
            name = " ".join(str(row[field]) for field in ("preset", "implementation", "dtype"))
            print(f"{name} batch {row['batch']}: {row['seconds_p50']:.4f} s", flush=True)
            yield [row]

    try:
        return collect_rows(with_speedups(), output)
    except CompileError as error:
        raise ValueError(str(error)) from error


def print_rows(rows: Sequence[Row], phases: Sequence[str] = ()) -> None:
    """Print the columns in which some row has a value; `phases` as for `compare`."""
    columns = [
        *("preset", "implementation", "dtype", "batch", "seconds_p50:.4f", "seconds_p80:.4f"),
        *(f"{phase}_seconds:.4f" for phase in phases),
        *("images_per_second:.3f", "speedup_over_published:.2f", "speedup_over_eager:.2f"),
        *("gpu_idle_share:.3f", "kernels:.0f", "host_reads", "recompiles"),
        *("peak_memory_mb:.0f", "model_flops_utilisation:.3f"),
    ]
    used = [c for c in columns if any(row[c.partition(":")[0]] is not None for row in rows)]
    print_table(rows, " ".join(used))


def add_speedups(rows: Sequence[Row]) -> None:
    """Set the speedups of the rows of one run, as ratios of images per second.

    Over `eager` of the same case, and over `published` of the same preset, batch and size, which
    has one precision, float32.
    """
    where = ("preset", "batch", "height", "width")
    for name, fields in (("published", where), ("eager", (*where, "dtype"))):
        rates = {
            tuple(row[field] for field in fields): row["images_per_second"]
            for row in rows
            if row["implementation"] == name
        }
        for row in rows:
            rate = rates.get(tuple(row[field] for field in fields))
            row[f"speedup_over_{name}"] = rate and row["images_per_second"] / rate


def too_slow(rows: Sequence[Row], minimum: float) -> list[str]:
    """The cases that fail the check.

    In these, the fastest implementation of this project is less than `minimum` times as fast as
    the published code, or was not compared with it.
    """
    failures = []
    ours = [row for row in rows if is_ours(row["implementation"])]
    for (preset, batch, dtype), group in group_rows(ours, "preset", "batch", "dtype"):
        ratios = [row["speedup_over_published"] for row in group]
        if None in ratios:
            failures.append(
                f"{preset}, batch {batch}, {dtype}: not compared with the published code"
            )
        elif max(ratios) < minimum:
            failures.append(
                f"{preset}, batch {batch}, {dtype}: {max(ratios):.2f} x, not {minimum:g} x"
            )
    return failures
