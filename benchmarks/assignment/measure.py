"""Assignment of predictions to targets: `python -m benchmarks.assignment`.

One-to-many and one-to-one assignment of six decoder layers, one-to-one assignment of Hybrid DETR's
extra queries (`hybrid`: a target gets several), and of the encoder's anchors, by all
`implementations`. Half of the predictions lie near a target (`cases`).
`published` restates the published algorithm (`published`).

Before an implementation is timed, its assignment of two images is compared with the reference's
(`comparison`): the same number of queries per target, and the same scores or total cost. One that
is wrong or fails is reported and not timed. Then implementations take turns call by call, so that
other load on the machine affects all of them; `speedup` is over `published` in the same run. A
duration is from the call to its end on the device. `device_us`, on a GPU, is the device's share of
it, where a call can be captured.

`launches` are kernels, fills and copies, on a CPU as in `benchmarks.launches`. `host_waits` are
reads and blocking copies, counted by torch on a GPU, and on a CPU as in `benchmarks.pretended`.
Neither is counted of `chunked`, which runs on CPUs only.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.assignment.cases import Case, Task, make_inputs
from benchmarks.assignment.comparison import find_difference
from benchmarks.assignment.implementations import (
    CHUNKED,
    IMPLEMENTATIONS,
    PUBLISHED,
    Implementation,
)
from benchmarks.cli import choose_available, require_at_least, require_known, within_budget
from benchmarks.common import Row, collect_rows, environment, failure, print_table
from benchmarks.device_time import Call, graph_seconds, percentiles_us, time_in_turns, work_on
from benchmarks.launches import device_work, host_waits
from benchmarks.pretended import pretended_device, pretending
from benchmarks.processes import Worker
from msdetr.cli.options import parse_options, user_errors
from msdetr.config import ModelConfig
from msdetr.engine.device import resolve_device

GPU_ANCHORS = 22223
"""Tokens of an image of 800 x 1333 pixels on four levels."""
CPU_ANCHORS = 2223
MIN_SPEEDUP = 10.0
"""Required speedup of one-to-many on a CPU over the published loop, for `--check`."""

_MEASURED = ("p20_us", "p50_us", "p80_us", "device_us", "launches", "host_waits", "speedup")
"""Fields that are None in the row of an implementation that was not timed."""

_COLUMNS = (
    "task implementation batch queries targets p20_us:.0f p50_us:.0f p80_us:.0f device_us:.1f "
    "launches host_waits speedup:.2f status"
)


def count_on_pretended_device(case: Case, name: str) -> tuple[int, int]:
    """Launches and waits of a call on a pretended device, which stays in this process."""
    with pretending():
        inputs = make_inputs(case).to(pretended_device())
    with pretending() as tally:
        IMPLEMENTATIONS[name].runs[case.task](inputs)
    return tally.operations + tally.launches, tally.waits.total()


def count_on_gpu(call: Call) -> tuple[int, int]:
    """Launches and waits of a call on a GPU."""
    call()
    return round(device_work(call).kernels), host_waits(call)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time assignment: ours, the reference, the published algorithm, and installed peers."""

    tasks: tuple[Task, ...] = ("one_to_many", "one_to_one", "hybrid", "encoder")
    """Tasks to measure."""
    batches: tuple[int, ...] = (2, 8, 16, 32)
    """Images per call."""
    queries: tuple[int, ...] = (300, 900)
    """Queries per image, in the decoder's tasks."""
    hybrid_queries: int = ModelConfig().num_hybrid_queries
    """Extra queries per image, in the task `hybrid`."""
    targets: tuple[int, ...] = (7, 20, 60, 100)
    """Targets per image."""
    anchors: int | None = None
    """Predictions per image in the encoder's task; by default those of 800 x 1333 pixels on a GPU,
    and a tenth on a CPU."""
    implementations: tuple[str, ...] = ()
    """By name; empty: all that can run here."""
    repetitions: int = 10
    """Durations taken of each call."""
    memory: float | None = None
    """Maximum memory of a call in GiB, estimated; larger ones are left out. By default 4 on a CPU,
    and 24 on a GPU."""
    time_budget: float | None = None
    """Seconds after which no further case begins; the most typical cases come first."""
    check: bool = False
    """Only compare one-to-many on a CPU with the published loop, at batch 16, 300 queries and 7
    targets (COCO has 7.3 on average); exit with 1 if it is not 10 times as fast, uncompiled."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where there is one."""
    output: Path | None = None
    """JSON file for the rows, written after every case."""

    def __post_init__(self) -> None:
        require_known("implementation", self.implementations, IMPLEMENTATIONS)
        require_at_least(self, 1, "batches", "queries", "hybrid_queries", "anchors")
        require_at_least(self, 0, "targets")
        require_at_least(self, 2, "repetitions")


CHECKED = Case("one_to_many", 16, 300, 7)


def plan(options: Options, device: torch.device) -> list[Case]:
    """All cases, the most typical first."""
    if options.check:
        return [CHECKED]
    anchors = options.anchors or (GPU_ANCHORS if device.type == "cuda" else CPU_ANCHORS)
    own_queries: dict[Task, tuple[int, ...]] = {
        "encoder": (anchors,),
        "hybrid": (options.hybrid_queries,),
    }
    cases = [
        Case(task, batch, queries, targets)
        for task in options.tasks
        for batch, queries, targets in itertools.product(
            options.batches, own_queries.get(task, options.queries), options.targets
        )
    ]
    return sorted(
        cases,
        key=lambda case: (case.batch != 16) + (case.queries == 900) + (case.targets != 20),
    )


def choose_implementations(options: Options, device: torch.device) -> list[Implementation]:
    """The implementations that the options name, or all that can run here.

    Raises:
        ValueError: one that is named cannot run here.
    """
    names = choose_available(
        (CHUNKED, PUBLISHED) if options.check else options.implementations,
        tuple(IMPLEMENTATIONS),
        lambda name: IMPLEMENTATIONS[name].unavailable(device),
    )
    return [IMPLEMENTATIONS[name] for name in names]


def find_status(
    case: Case, implementations: Sequence[Implementation], memory: float, device: torch.device
) -> dict[str, str]:
    """`ok`, or the reason for not timing it, of each implementation of the task.

    Args:
        case: to be timed.
        implementations: those to compare with the reference.
        memory: maximum of a call, in GiB.
        device: where they compute.
    """
    status = {}
    small = make_inputs(case.small()).to(device)
    for implementation in implementations:
        if case.task not in implementation.runs:
            continue
        needed = implementation.gigabytes(case)
        if needed > memory:
            status[implementation.name] = f"left out: needs about {needed:.1f} GiB"
            continue
        try:
            wrong = find_difference(implementation.runs[case.task](small), small)
            status[implementation.name] = "ok" if wrong is None else f"wrong: {wrong}"
        except Exception as error:  # of any kind: the others still run
            status[implementation.name] = failure(error)
    return status


def measure_case(
    case: Case,
    implementations: Sequence[Implementation],
    options: Options,
    device: torch.device,
    counter: Callable[[Case, str], tuple[int, int]] | None,
) -> list[Row]:
    """A row per implementation, without the environment.

    `counter` counts launches and waits on a CPU; None leaves them out.
    """
    memory = options.memory or (24.0 if device.type == "cuda" else 4.0)
    status = find_status(case, implementations, memory, device)
    inputs = make_inputs(case).to(device)
    calls: dict[str, Call] = {
        name: functools.partial(IMPLEMENTATIONS[name].runs[case.task], inputs)
        for name, state in status.items()
        if state == "ok"
    }
    durations = time_in_turns(calls, device, options.repetitions)
    medians = {name: statistics.median(seconds) for name, seconds in durations.items()}
    rows = []
    for name, state in status.items():
        row: Row = {
            "benchmark": "assignment",
            "implementation": name,
            "task": case.task,
            "batch": case.batch,
            "queries": case.queries,
            "targets": case.targets,
            "layers": case.layers,
            **dict.fromkeys(_MEASURED),
            "repetitions": options.repetitions,
            "status": state,
        }
        if state == "ok":
            row |= percentiles_us(durations[name])
            if PUBLISHED in medians:
                row["speedup"] = medians[PUBLISHED] / medians[name]
            if device.type == "cuda":
                row["launches"], row["host_waits"] = count_on_gpu(calls[name])
                row["device_us"] = _device_us(calls[name]) if not row["host_waits"] else None
            elif counter is not None and name != CHUNKED:
                row["launches"], row["host_waits"] = counter(case, name)
        rows.append(row)
    return rows


def _device_us(call: Call) -> float | None:
    try:
        return statistics.median(graph_seconds([call], replays=10)) * 1e6
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None


def measure(
    options: Options, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[list[Row]]:
    """The rows of each case, after each measurement."""
    device = resolve_device(options.device)
    # A pretended device stays with its process.
    with work_on(device), torch.no_grad(), Worker("counter") as worker:

        def counter(case: Case, name: str) -> tuple[int, int]:
            return worker.call(count_on_pretended_device, case, name)

        implementations = choose_implementations(options, device)
        for case in within_budget(plan(options, device), options.time_budget, clock):
            rows = measure_case(
                case, implementations, options, device, None if options.check else counter
            )
            yield [{**row, **environment(device)} for row in rows]


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; the exit status is 1 if one is wrong or failed, or is slow."""
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.assignment")
        rows = collect_rows(measure(options), options.output)
    print_table(rows, _COLUMNS)
    failed = [row for row in rows if row["status"].startswith(("wrong", "failed"))]
    if options.check:
        slow = [
            row
            for row in rows
            if row["implementation"] == CHUNKED and not (row["speedup"] or 0.0) >= MIN_SPEEDUP
        ]
        print(
            f"required: one-to-many at batch {CHECKED.batch}, {CHECKED.queries} queries and "
            f"{CHECKED.targets} targets, `{CHUNKED}` (eager) at least {MIN_SPEEDUP:g} times "
            f"as fast as the published loop, by medians of {options.repetitions} calls in turn"
        )
        for row in slow:
            print(f"`{CHUNKED}` is {row['speedup']:.1f} times as fast, not {MIN_SPEEDUP:g}")
        failed += slow
    return 1 if failed else 0
