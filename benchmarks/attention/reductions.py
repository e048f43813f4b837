# ruff: noqa: N803  # Triton's compile-time constants are written in capitals
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Rates of adding rows to a GPU's memory and reading them:
`python -m benchmarks.attention reductions`.

The backward pass of deformable attention adds short rows of channels to the gradient of `value`,
and its forward pass reads such rows, so these two rates bound it. Rows lie as in `value`, one per
(pixel, head), in a map 168 pixels wide. A program takes 64 queries of one head. A query has 4
points, each with 4 corners and a normal offset of 2 pixels from the query's own pixel. Orders:

    tile    a program's queries are 8 x 8 pixels
    row     a program's queries are 64 pixels in a row
    random  any row at any time

A row of `row_bytes` is added or read in pieces, one per instruction: with `piece_bytes` = 32, 2
threads share a row (16 bytes each), and with 128 bytes 8 threads. `footprint_mb` is the size of all
rows. Inputs are not rotated: a cache may keep them, as in a real step.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.cli import within_budget
from benchmarks.common import Row, collect_rows, environment, print_table
from benchmarks.device_time import Timer, percentiles_us, time_calls, work_on
from msdetr.cli.options import parse_options, user_errors

Kernel = Literal["reduction", "gather"]
Order = Literal["tile", "row", "random"]

NUM_HEADS = 8
MAP_WIDTH = 168
QUERIES = 64
"""Per program."""
NUM_POINTS = 4
SPREAD = 2.0
"""Pixels."""
STEPS = 4 * NUM_POINTS
"""Rows that a program's query visits."""
THREAD_BYTES = 16
"""Added or read by a thread per instruction."""

_COLUMNS = {
    "kernel": "",
    "order": "",
    "dtype": "",
    "row_bytes": "",
    "piece_bytes": "",
    "footprint_mb": "",
    "p50_us": ".1f",
    "gigabytes_per_second": ".0f",
    "gigarows_per_second": ".2f",
    "instruction": "",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure additions to rows in memory, and reads of them, on this GPU."""

    footprints: tuple[int, ...] = (23, 45, 91)
    """Sizes of all rows in MB."""
    repetitions: int = 10
    """Durations taken of each case."""
    time_budget: float | None = None
    """Seconds after which no further case begins."""
    output: Path | None = None
    """JSON file for the rows, written after every case."""


@dataclass(frozen=True)
class Case:
    """One measurement."""

    kernel: Kernel
    order: Order
    dtype: torch.dtype
    row_bytes: int
    piece_bytes: int
    footprint_mb: int

    @property
    def num_rows(self) -> int:
        """Rows in memory: whole strips of 8 lines of the map, for all heads."""
        strip = 8 * MAP_WIDTH * NUM_HEADS
        return max(self.footprint_mb * 10**6 // (self.row_bytes * strip), 1) * strip


@triton.jit
def reduction_kernel(
    index_ptr, rows_ptr, ROW: tl.constexpr, PIECE: tl.constexpr, STEPS: tl.constexpr
):
    """Add 1 to all elements of the rows [programs, STEPS, 64] that `index` names."""
    query = tl.arange(0, 64)
    column = tl.arange(0, PIECE)[None, :]
    ones = tl.full((64, PIECE), 1.0, rows_ptr.dtype.element_ty)
    index_ptr += tl.program_id(0) * (STEPS * 64)
    for step in range(STEPS):
        row = tl.load(index_ptr + step * 64 + query)
        pointers = rows_ptr + (row * ROW)[:, None] + column
        for piece in tl.static_range(0, ROW, PIECE):
            tl.atomic_add(pointers + piece, ones, sem="relaxed")


@triton.jit
def gather_kernel(
    index_ptr, rows_ptr, sums_ptr, ROW: tl.constexpr, PIECE: tl.constexpr, STEPS: tl.constexpr
):
    """Sums [programs, 64, PIECE] over the rows that `index` names, and over a row's pieces."""
    query = tl.arange(0, 64)
    column = tl.arange(0, PIECE)[None, :]
    total = tl.zeros((64, PIECE), tl.float32)
    index_ptr += tl.program_id(0) * (STEPS * 64)
    for step in range(STEPS):
        row = tl.load(index_ptr + step * 64 + query)
        pointers = rows_ptr + (row * ROW)[:, None] + column
        for piece in tl.static_range(0, ROW, PIECE):
            total += tl.load(pointers + piece).to(tl.float32)
    sums = sums_ptr + tl.program_id(0) * (64 * PIECE)
    tl.store(sums + query[:, None] * PIECE + column, total)


def row_index(order: Order, num_rows: int, device: torch.device) -> Tensor:
    """[programs, STEPS, 64] int32, the rows that programs visit, in their order."""
    generator = torch.Generator(device).manual_seed(0)
    height = num_rows // (MAP_WIDTH * NUM_HEADS)
    num_tiles = height * MAP_WIDTH // QUERIES
    shape = (num_tiles, NUM_HEADS, STEPS, QUERIES)
    if order == "random":
        index = torch.randint(num_rows, shape, generator=generator, device=device)
        return index.to(torch.int32).flatten(0, 1)
    pixel = torch.arange(height * MAP_WIDTH, device=device)
    if order == "tile":
        tiles = pixel.view(height // 8, 8, MAP_WIDTH // 8, 8).transpose(1, 2)
        pixel = tiles.reshape(-1)
    pixel = pixel.view(num_tiles, 1, 1, QUERIES)
    offsets = torch.randn(
        (2, num_tiles, NUM_HEADS, NUM_POINTS, QUERIES), generator=generator, device=device
    )
    left, top = (offsets * SPREAD).floor().to(torch.int64)
    corners = []
    for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
        x = (pixel % MAP_WIDTH + left + right).clamp(0, MAP_WIDTH - 1)
        y = (pixel // MAP_WIDTH + top + down).clamp(0, height - 1)
        corners.append(y * MAP_WIDTH + x)
    visited = torch.stack(corners, dim=3).flatten(2, 3)  # [tiles, heads, STEPS, 64]
    head = torch.arange(NUM_HEADS, device=device)[:, None, None]
    return (visited * NUM_HEADS + head).to(torch.int32).flatten(0, 1)


def launch(case: Case, index: Tensor, rows: Tensor, sums: Tensor) -> Any:
    """Launch the kernel of a case; the compiled kernel."""
    size = case.dtype.itemsize
    constants = {
        "ROW": case.row_bytes // size,
        "PIECE": case.piece_bytes // size,
        "STEPS": STEPS,
        # A thread has one vector per instruction.
        "num_warps": QUERIES * case.piece_bytes // THREAD_BYTES // 32,
        "enable_fp_fusion": True,
    }
    grid = (index.shape[0],)
    if case.kernel == "reduction":
        return reduction_kernel[grid](index, rows, **constants)
    return gather_kernel[grid](index, rows, sums, **constants)


def make_tensors(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Index, rows and sums of a case."""
    index = _cached_index(case.order, case.num_rows, device)
    elements = case.row_bytes // case.dtype.itemsize
    fill = 0.0 if case.kernel == "reduction" else 1.0
    rows = torch.full((case.num_rows, elements), fill, dtype=case.dtype, device=device)
    piece = case.piece_bytes // case.dtype.itemsize
    sums = torch.empty((index.shape[0], QUERIES, piece), device=device)
    return index, rows, sums


_cached_index = functools.lru_cache(maxsize=1)(row_index)


def plan(options: Options) -> list[Case]:
    """All cases: by footprint, and those of one index together."""
    orders: tuple[Order, ...] = ("tile", "row", "random")
    pieces = {64: (16, 32, 64), 128: (32, 64, 128)}
    cases = []
    for footprint in options.footprints:
        for row_bytes in pieces:
            for order in orders:
                for dtype in (torch.bfloat16, torch.float32):
                    for piece_bytes in pieces[row_bytes]:
                        sizes = (dtype, row_bytes, piece_bytes, footprint)
                        if piece_bytes >= 32:
                            cases.append(Case("reduction", order, *sizes))
                        if row_bytes == 64 and dtype == torch.bfloat16:
                            cases.append(Case("gather", order, *sizes))
    return cases


def measure_case(case: Case, device: torch.device, timer: Timer) -> Row:
    """The row of a case, without the environment."""
    index, rows, sums = make_tensors(case, device)
    compiled = launch(case, index, rows, sums)
    timing = timer([lambda: launch(case, index, rows, sums)])
    measured = percentiles_us(timing.seconds)
    rate = index.numel() / (measured["p50_us"] / 1e6)
    return {
        "benchmark": "reductions",
        "kernel": case.kernel,
        "order": case.order,
        "dtype": str(case.dtype).removeprefix("torch."),
        "row_bytes": case.row_bytes,
        "piece_bytes": case.piece_bytes,
        "footprint_mb": case.footprint_mb,
        **measured,
        "gigabytes_per_second": rate * case.row_bytes / 1e9,
        "gigarows_per_second": rate / 1e9,
        "instruction": memory_instruction(case.kernel, compiled.asm["ptx"]),
        "timer": timing.timer,
    }


def memory_instruction(kernel: Kernel, ptx: str) -> str:
    """The widest instruction that adds or reads rows."""
    pattern = r"\b(?:red|atom)\.[\w.:]+" if kernel == "reduction" else r"\bld\.global[\w.:]*"
    return max(set(re.findall(pattern, ptx)), key=_vector_width, default="none")


def _vector_width(instruction: str) -> tuple[int, str]:
    width = re.search(r"\.v(\d+)", instruction)
    return (int(width[1]) if width else 1, instruction)


def measure(
    options: Options,
    device: torch.device,
    timer: Timer,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Row]:
    """A row per case."""
    where = environment(device)
    for case in within_budget(plan(options), options.time_budget, clock):
        yield {**measure_case(case, device, timer), **where}


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; the exit status."""
    with user_errors():
        options = parse_options(
            Options, arguments, prog="python -m benchmarks.attention reductions"
        )
        if not torch.cuda.is_available():
            raise ValueError("the rates are those of a GPU, and there is none here")
        device = torch.device("cuda", torch.cuda.current_device())
        timer = functools.partial(time_calls, device=device, repetitions=options.repetitions)
        with work_on(device):
            rows = collect_rows(([row] for row in measure(options, device, timer)), options.output)
    print_table(rows, _COLUMNS)
    return 0
