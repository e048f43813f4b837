"""Device functions on cells: their queries, the samples of these queries, and which samples fit in
a window. Shared by `splat_kernel` and `rest_kernel`.

A cell is a square of the image: CELL x CELL pixels of level 0, and the pixels of the other levels
at the same place. It holds 64 fine queries (level 0) and up to 32 coarse queries (other levels).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from msdetr.kernels.ms_deform_attn.sampling import Group, locate_program, unpack_size

CELL = 8
"""Pixels along the side of a cell, at level 0."""
FINE = tl.constexpr(64)
"""Queries of level 0 in a cell."""
COARSE = tl.constexpr(32)
"""Slots for queries of the other levels in a cell."""


class WindowSizes(NamedTuple):
    """Sizes of windows. In a launch, the fields are compile-time constants."""

    SIDE: int  # side in pixels at levels 0 and 1
    COARSE_SIDE: int  # side in pixels at the other levels
    BLOCK_Y: int  # rows that are summed at a time
    PADDED_D: int
    INTERPRET: bool  # Triton's interpreter runs the kernel


class Cell(NamedTuple):
    """The cell and head that a program serves."""

    batch: Any
    num_queries: Any
    head: Any
    y: Any
    x: Any


class Window(NamedTuple):
    """Origin of a window: its upper left pixel, float32."""

    x: Any
    y: Any


@triton.jit
def program_cell(num_queries, cells_across, sizes):
    """The cell of this program."""
    batch, index, head = locate_program(sizes)
    return Cell(batch, num_queries, head, index // cells_across, index % cells_across)


@triton.jit
def _queries_of_level(local, cell, start, height, width, SIDE: tl.constexpr):
    """Queries of one level in a cell and their mask, by place in the cell's pixels of the level."""
    y = cell.y * SIDE + local // SIDE
    x = cell.x * SIDE + local % SIDE
    inside = (local >= 0) & (local < SIDE * SIDE) & (y < height) & (x < width)
    return start + y * width + x, inside


@triton.jit
def fine_queries(cell, maps):
    """The group of FINE queries of level 0 in a cell."""
    height, width = unpack_size(maps.levels[0])
    query, inside = _queries_of_level(tl.arange(0, FINE), cell, 0, height, width, 8)
    query = tl.where(inside, query, 0)
    return Group(cell.batch, cell.num_queries, cell.head, query, inside)


@triton.jit
def coarse_queries(cell, maps, sizes):
    """The group of COARSE queries of the other levels in a cell."""
    slot = tl.arange(0, COARSE)
    query = tl.zeros((COARSE,), tl.int32)
    inside = slot < 0
    height, width = unpack_size(maps.levels[0])
    start = height * width
    for level in tl.static_range(1, sizes.L):
        height, width = unpack_size(maps.levels[level])
        pixel, mask = _queries_of_level(
            slot - (0 if level == 1 else 16 if level == 2 else 17 + level),
            cell,
            start,
            height,
            width,
            8 >> level if level < 3 else 1,
        )
        query = tl.where(mask, pixel, query)
        inside = inside | mask
        start += height * width
    return Group(cell.batch, cell.num_queries, cell.head, query, inside)


@triton.jit
def fits_window(x, y, window, side):
    """Whether all four pixels around a position are in the window."""
    right = window.x + (side - 1)
    below = window.y + (side - 1)
    return (x >= window.x) & (x < right) & (y >= window.y) & (y < below)


@triton.jit
def is_left_out(x, y, inside, window, side, level):
    """Samples that touch the map and do not fit in the window."""
    touches = (x > -1.0) & (x < level.valid_width) & (y > -1.0) & (y < level.valid_height)
    return inside & touches & (fits_window(x, y, window, side) == 0)
