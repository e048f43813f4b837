"""Finds the fastest configurations of the deformable attention kernels, and writes them into their
table: `python -m benchmarks.attention tune`.

Candidates for each kernel are launched on this GPU, on the shapes of a detector. The time of a
candidate is the mean over offsets as at initialisation and spread offsets. A candidate whose result
differs from that of the current configuration is left out. The gradient of `value` of an encoder is
summed in windows or without them: the table gets the best configuration without windows, and then
the best windows, or an empty configuration if those are slower. Then lists compete with these.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.attention.cases import DTYPES, SHAPES, Case, Inputs, make_inputs
from benchmarks.common import Row, environment, print_table, write_rows
from benchmarks.device_time import Timer, num_input_sets, time_calls, work_on
from msdetr.cli.options import parse_options, user_errors
from msdetr.kernels.ms_deform_attn import configs
from msdetr.kernels.ms_deform_attn import launch as launchers
from msdetr.kernels.ms_deform_attn.configs import DirectConfig, ListConfig, WindowConfig

Kernel = Literal["forward", "points", "value", "windows", "lists"]
Queries = Literal["grid", "few", "many"]
Config = DirectConfig | WindowConfig | ListConfig | None
"""How to launch a kernel; None for windows or lists: without them."""

RESULT_TOLERANCE = 1e-2
"""Relative difference (2-norm) from the current result: sums in another order, rounded."""
_WORK: dict[Queries, tuple[str, int]] = {
    "grid": ("encoder", 2),
    "few": ("decoder-300", 2),
    "many": ("decoder-900", 16),
}
"""Shape and batch that represent a kind of queries."""
_TILES = {16: (4,), 32: (8,), 64: (0, 8, 16), 128: (8, 16)}
"""Widths of tiles of pixels, by queries per program."""
_KEY = ("architecture", "kernel", "dtype", "head_dim", "queries")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure configurations on this GPU, and write the fastest into the table."""

    dtypes: tuple[Literal["bfloat16", "float32", "float16"], ...] = (
        "bfloat16",
        "float32",
        "float16",
    )
    """Types of value and projection."""
    queries: tuple[Queries, ...] = ("grid", "few", "many")
    """Pixels of the levels, few queries, many queries."""
    kernels: tuple[Kernel, ...] = ("forward", "points", "value", "windows", "lists")
    """Kernels to tune."""
    spreads: tuple[float, ...] = (0.0, 2.0)
    """Standard deviations of what is added to the initial offsets."""
    repetitions: int = 10
    """Durations taken of each candidate."""
    time_budget: float | None = None
    """Seconds in all. Each kernel gets its share, and at least two candidates are measured."""
    table: Path = configs.TABLE
    """The table. Its rows for other cases are kept."""


class Winner(NamedTuple):
    """The fastest configuration, and its time."""

    config: Config
    seconds: float


class Work:
    """Calls of the launchers on inputs of one case, by spread of the offsets."""

    def __init__(self, cases: Sequence[Case], device: torch.device) -> None:
        self.case = cases[0]
        shape = self.case.shape
        bytes_of_value = (
            self.case.batch
            * shape.num_tokens
            * shape.num_heads
            * shape.head_dim
            * self.case.dtype.itemsize
        )
        seeds = range(num_input_sets(bytes_of_value, device))
        self._inputs = [[make_inputs(case, device, seed=seed) for seed in seeds] for case in cases]

    def calls(self, kernel: Kernel) -> list[list[Callable[[], Tensor]]]:
        """Calls that run a kernel and return its result: per spread, one per set of inputs."""
        run = {"forward": _forward, "points": _points}.get(kernel, _value)
        return [[functools.partial(run, inputs) for inputs in sets] for sets in self._inputs]


@torch.no_grad()
def _forward(inputs: Inputs) -> Tensor:
    return launchers.forward(inputs.value, inputs.levels, _as_points(inputs), None)


@torch.no_grad()
def _points(inputs: Inputs) -> Tensor:
    gradient = torch.empty_like(inputs.projection)
    num_offsets = inputs.offsets.shape[2]
    launchers.backward_points(
        inputs.grad_output,
        inputs.value,
        inputs.levels,
        _as_points(inputs),
        None,
        gradient[..., :num_offsets],
        gradient[..., num_offsets:],
        need_reference=False,
    )
    return gradient


@torch.no_grad()
def _value(inputs: Inputs) -> Tensor:
    return launchers.backward_value(
        inputs.grad_output,
        inputs.value,
        inputs.levels,
        _as_points(inputs),
        None,
        deterministic=False,
    )


def _as_points(inputs: Inputs) -> launchers.Points:
    num_offsets = inputs.offsets.shape[2]
    return launchers.Points(
        inputs.projection[..., :num_offsets],
        inputs.projection[..., num_offsets:],
        inputs.reference_points,
        num_offsets // (inputs.value.shape[2] * len(inputs.levels) * 2),
    )


def candidates(kernel: Kernel, dtype: torch.dtype, head_dim: int, queries: Queries) -> list[Config]:
    """Configurations to measure, beginning with that of the rule."""
    if kernel == "windows":
        return _window_candidates(head_dim)
    if kernel == "lists":
        others = (ListConfig(rows, num_warps) for rows, num_warps in ((8, 1), (32, 1), (64, 4)))
        return list(dict.fromkeys([configs.default_lists(head_dim), None, *others]))
    choices = [configs.default_config(kernel, dtype, head_dim, queries)]
    # Channels per load or addition of 16 bytes; a thread gets one or two of them per sample.
    vector = 4 if kernel == "value" else 16 // dtype.itemsize
    padded = 1 << (head_dim - 1).bit_length()
    splits = [width for width in (padded, padded // 2, padded // 4) if width >= vector] or [padded]
    for num_warps, split_d, vectors in product((1, 2, 4, 8), splits, (1, 2)):
        block_q = vectors * vector * 32 * num_warps // split_d
        if block_q in _TILES:
            tiles = _TILES[block_q] if queries == "grid" else (0,)
            choices += [DirectConfig(block_q, tile_x, split_d, num_warps) for tile_x in tiles]
    return list(dict.fromkeys(choices))


def _window_candidates(head_dim: int) -> list[Config]:
    choices: list[Config] = [None, configs.default_windows(head_dim)]
    rests = [
        DirectConfig(block_q=64, tile_x=8, split_d=min(head_dim, split_d), num_warps=4)
        for split_d in (8, 16)
    ]
    sides = ((16, 8), (16, 16), (8, 8), (32, 16))
    for (side, coarse_side), block_y, num_warps, rest in product(sides, (4, 8), (4, 8), rests):
        if side * block_y <= 128:  # pixels with sums in registers at a time
            choices.append(WindowConfig(side, coarse_side, block_y, num_warps, rest))
    return list(dict.fromkeys(choices))


@contextmanager
def using(kernel: Kernel, config: Config) -> Iterator[None]:
    """Launch a kernel with a configuration, independent of the table."""
    entries: dict[str, dict[str, Any]] = {kernel: _entry(config)}
    if kernel in ("value", "windows"):
        entries = {"windows": {}, "lists": {}} | entries
    with configs.override(entries):
        yield


def _entry(config: Config) -> dict[str, Any]:
    return {} if config is None else asdict(config)


def fastest(kernel: Kernel, choices: Iterable[Config], work: Work, timer: Timer) -> Winner:
    """The fastest of `choices` with the result of the current configuration.

    Raises:
        ValueError: there is none.
    """
    calls = work.calls(kernel)
    expected = [sets[0]() for sets in calls]
    best: Winner | None = None
    for config in choices:
        with using(kernel, config):
            try:
                problem = _difference([sets[0]() for sets in calls], expected)
                if problem is None:
                    times = [statistics.median(timer(sets)) for sets in calls]
            except Exception as error:  # too much shared memory, for example
                problem = f"{type(error).__name__}: {error}"
        if problem is not None:
            print(f"  {config}: {problem}", flush=True)
            continue
        seconds = statistics.mean(times)
        if best is None or seconds < best.seconds:
            best = Winner(config, seconds)
    if best is None:
        raise ValueError(f"no configuration of {kernel} works")
    return best


def _difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    for result, wanted in zip(results, expected, strict=True):
        error = float((result.float() - wanted.float()).norm() / wanted.float().norm())
        if not error <= RESULT_TOLERANCE:  # NaN is not
            return f"its result is off by {error:.1e}"
    return None


def tune(
    options: Options,
    device: torch.device,
    timer: Timer,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Row]:
    """A row of the table per kernel, queries and type."""
    begin = clock()
    where = environment(device)
    num_left = len(options.dtypes) * sum(len(_kernels(options, x)) for x in options.queries)
    for queries, dtype in product(options.queries, options.dtypes):
        shape_name, batch = _WORK[queries]
        shape = SHAPES[shape_name]
        cases = [
            Case(shape_name, shape, batch, DTYPES[dtype], spread) for spread in options.spreads
        ]
        work = Work(cases, device)
        chosen: dict[str, dict[str, Any]] = {}
        for kernel in _kernels(options, queries):
            choices: Iterable[Config]
            choices = candidates(kernel, DTYPES[dtype], shape.head_dim, queries)
            if options.time_budget is not None:
                left = begin + options.time_budget - clock()
                if left < 0:
                    print("time budget used up")
                    return
                choices = _within_share(choices, left / num_left, clock)
            num_left -= 1
            # Windows and lists compete with what was just chosen.
            with configs.override(chosen):
                winner = fastest(kernel, choices, work, timer)
            chosen[kernel] = _entry(winner.config)
            yield {
                "architecture": configs.architecture(),
                "kernel": kernel,
                "dtype": dtype,
                "head_dim": shape.head_dim,
                "queries": queries,
                "config": _entry(winner.config),
                "p50_us": winner.seconds * 1e6,
                "device": where["device"],
                "triton": where["triton"],
            }


def _kernels(options: Options, queries: Queries) -> list[Kernel]:
    """The kernels to tune that serve these queries."""
    return [kernel for kernel in options.kernels if kernel != "windows" or queries == "grid"]


def _within_share(
    choices: Sequence[Config], seconds: float, clock: Callable[[], float]
) -> Iterator[Config]:
    """The first two choices, and others while there is time."""
    end = clock() + seconds
    for place, choice in enumerate(choices):
        if place >= 2 and clock() > end:
            print(f"  no time for {len(choices) - place} of {len(choices)}", flush=True)
            return
        yield choice


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Put rows into the table, replacing those of the same cases; launchers reload it."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    table = {_key(row): row for row in before}
    table |= {_key(row): row for row in rows}
    write_rows(path, [table[key] for key in sorted(table)])
    configs.forget()


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEY)


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; the exit status."""
    rows: list[Row] = []
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.attention tune")
        if not torch.cuda.is_available():
            raise ValueError("configurations are measured on a GPU, and there is none here")
        device = torch.device("cuda", torch.cuda.current_device())
        timer = functools.partial(time_calls, device=device, repetitions=options.repetitions)
        with work_on(device):
            for row in tune(options, device, timer):
                print(f"{row['kernel']} {row['queries']} {row['dtype']}: {row['config']}")
                rows.append(row)
                write_table(options.table, rows)
    print_table(rows, "kernel queries dtype p50_us:.1f")
    return 0
