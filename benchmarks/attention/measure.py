"""Durations of deformable attention, ours and the peers': `python -m benchmarks.attention`.

Every implementation computes the same function of value, offsets, logits and reference points, and
the same gradients of the first three (libreyolo has none). Before it is timed, it is compared with
the reference in float64 on a small case of the same kind; one that is wrong is reported as wrong,
with its errors.

On a GPU a duration is device time, by replay of CUDA graphs that go through several sets of inputs.
An implementation that waits for the GPU cannot be captured and is reported as failed.
`roofline_share` is the time that the compulsory bytes of the pass take at the bandwidth of a copy,
measured in the same run, over the time that the pass took. `host_us` is the host's time to enqueue
a call. `peak_memory_mb` is the maximum memory of forward + backward, in addition to their inputs.
On a CPU durations are wall time, and the last two are not measured.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.attention.bench import Bench, BenchApart
from benchmarks.attention.cases import DTYPES, SHAPES, Case
from benchmarks.attention.implementations import (
    IMPLEMENTATIONS,
    OURS,
    Implementation,
    external_op,
)
from benchmarks.cli import choose_available, require_at_least, require_known, within_budget
from benchmarks.common import Row, collect_rows, print_table
from benchmarks.device_time import Timer, time_calls, work_on
from msdetr.cli.options import parse_options, user_errors
from msdetr.engine.device import resolve_device

_FIRST = ("msdetr-fused", "deformops", "reference")
_LAST = ("reference-compiled",)
"""Takes seconds to compile for each case."""

_COLUMNS = (
    "implementation pass shape batch dtype spread p20_us:.1f p50_us:.1f p80_us:.1f "
    "gigabytes_per_second:.1f roofline_share:.3f peak_memory_mb:.1f host_us:.1f status"
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time deformable attention: ours, the reference, and what else is installed."""

    shapes: tuple[str, ...] = ("encoder", "decoder-300", "decoder-900")
    """From encoder, decoder-300, decoder-900, tiny and tiny-decoder."""
    batches: tuple[int, ...] = (2, 8)
    """Images per call."""
    dtypes: tuple[Literal["bfloat16", "float32", "float16"], ...] = (
        "bfloat16",
        "float32",
        "float16",
    )
    """Types of value and projection."""
    spreads: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0)
    """Standard deviations of what is added to the initial offsets."""
    implementations: tuple[str, ...] = ()
    """By name; empty: all that can run here."""
    ops: tuple[str, ...] = ()
    """Further ops as module:function, called with value, spatial shapes [L, 2], sampling locations
    and attention weights."""
    repetitions: int = 20
    """Durations taken of each pass."""
    time_budget: float | None = None
    """Seconds after which no further case begins; the most interesting cases come first."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where there is one."""
    output: Path | None = None
    """JSON file for the rows, written after every case."""

    def __post_init__(self) -> None:
        require_known("shape", self.shapes, SHAPES)
        require_known("implementation", self.implementations, IMPLEMENTATIONS)
        for op in self.ops:
            if not all(op.partition(":")):
                raise ValueError(f"op {op!r} must be module:function")
        require_at_least(self, 1, "batches")
        require_at_least(self, 2, "repetitions")
        require_at_least(self, 0, "spreads")


def choose_implementations(options: Options, device: torch.device) -> list[Implementation]:
    """The implementations that the options name, or all that can run here, and further ops.

    Raises:
        ValueError: one that is named cannot run here.
    """
    external = [external_op(path) for path in options.ops]
    for implementation in external:
        implementation.build()
    names = choose_available(
        options.implementations,
        tuple(IMPLEMENTATIONS),
        lambda name: IMPLEMENTATIONS[name].unavailable(device),
    )
    return [*(IMPLEMENTATIONS[name] for name in names), *external]


def plan(
    options: Options, implementations: Sequence[Implementation]
) -> list[tuple[Case, Implementation]]:
    """All cases and implementations, the most interesting first.

    Those are of the first type and spread: ours, deformops, the reference and ops given by path.
    Compiled code comes last.
    """
    pairs = [
        (Case(shape, SHAPES[shape], batch, DTYPES[dtype], spread), implementation)
        for dtype, spread, shape, batch, implementation in itertools.product(
            options.dtypes, options.spreads, options.shapes, options.batches, implementations
        )
    ]

    def tier(pair: tuple[Case, Implementation]) -> int:
        case, implementation = pair
        is_first = (case.dtype == DTYPES[options.dtypes[0]], case.spread == options.spreads[0])
        # Ops given by path are as interesting as the first.
        is_later = implementation.name in IMPLEMENTATIONS and implementation.name not in _FIRST
        return is_later + is_first.count(False) + 3 * (implementation.name in _LAST)

    return sorted(pairs, key=tier)


def measure(
    options: Options,
    *,
    timer: Timer | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[list[Row]]:
    """The rows of each case and implementation, after each measurement."""
    device = resolve_device(options.device)
    pairs = plan(options, choose_implementations(options, device))
    with contextlib.ExitStack() as stack:
        bench: Bench | BenchApart
        if device.type == "cuda" and timer is None:
            bench = BenchApart(device, options.repetitions)
            stack.callback(bench.close)
        else:
            stack.enter_context(work_on(device))
            default = functools.partial(time_calls, device=device, repetitions=options.repetitions)
            bench = Bench(device, timer or default)
        for case, implementation in within_budget(pairs, options.time_budget, clock):
            rows = bench.rows(case, implementation)
            for row in rows:
                print(_describe(row), flush=True)
            yield rows


def _describe(row: Row) -> str:
    name = " ".join(str(row[name]) for name in ("implementation", "pass", "shape"))
    case = f"batch {row['batch']} {row['dtype']} spread {row['spread']:g}"
    figure = row["status"] if row["p50_us"] is None else f"{row['p50_us']:.1f} us"
    return f"{name} {case}: {figure}"


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; the exit status is 1 if an implementation of ours is not ok."""
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.attention")
        rows = collect_rows(measure(options), options.output)
    print_table(rows, _COLUMNS)
    ours_fail = any(row["implementation"] in OURS and row["status"] != "ok" for row in rows)
    return 1 if ours_fail else 0
