"""Device functions on cells: their queries, the samples of these queries, and which samples fit in
a window. Shared by the two kernels of `ms_deform_attn_splat`.

A cell is a square of the image: CELL x CELL pixels of level 0, and the pixels of the other levels
at the same place. It holds 64 fine queries (level 0) and up to 32 coarse queries (other levels).
"""

from __future__ import annotations

import triton
import triton.language as tl

from msdetr.kernels.deform_sampling import (
    clamp_position,
    columns,
    level_size,
    load_logits,
    load_points,
    load_reference,
    softmax_of_rows,
    weight_of_logit,
)

CELL = 8
"""Pixels along the side of a cell, at level 0."""


@triton.jit
def _queries_of_level(
    slot, cell_y, cell_x, start, height, width, FIRST: tl.constexpr, SIDE: tl.constexpr
):
    """Queries of one level in a cell, in the slots from FIRST, and their mask."""
    local = slot - FIRST
    y = cell_y * SIDE + local // SIDE
    x = cell_x * SIDE + local % SIDE
    inside = (local >= 0) & (local < SIDE * SIDE) & (y < height) & (x < width)
    return start + y * width + x, inside


@triton.jit
def fine_queries(cell_y, cell_x, levels):
    """Queries of level 0 in a cell, and their mask: [64]."""
    height, width = level_size(0, levels, 1)
    query, inside = _queries_of_level(tl.arange(0, 64), cell_y, cell_x, 0, height, width, 0, 8)
    return tl.where(inside, query, 0), inside


@triton.jit
def coarse_queries(cell_y, cell_x, levels, L: tl.constexpr, COUNT: tl.constexpr):
    """Queries of the other levels in a cell, and their mask: [COUNT]."""
    slot = tl.arange(0, COUNT)
    query = tl.zeros((COUNT,), tl.int32)
    inside = slot < 0
    height, width = level_size(0, levels, 1)
    start = height * width
    for level in tl.static_range(1, L):
        height = (levels[level] >> 32).to(tl.int32)
        width = levels[level].to(tl.int32)
        pixel, mask = _queries_of_level(
            slot,
            cell_y,
            cell_x,
            start,
            height,
            width,
            0 if level == 1 else 16 if level == 2 else 17 + level,
            8 >> level if level < 3 else 1,
        )
        query = tl.where(mask, pixel, query)
        inside = inside | mask
        start += height * width
    return query, inside


@triton.jit
def load_queries(
    points_ptr,
    weights_ptr,
    reference_ptr,
    query,
    stride_pq,
    stride_wq,
    L: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    PADDED_LP: tl.constexpr,
):
    """Pointers to points, weights and references of queries; maximum and scale of their softmax."""
    weights = weights_ptr + (query * stride_wq)[:, None]
    highest, scale = softmax_of_rows(weights, L * P, PADDED_LP)
    points = points_ptr + (query * stride_pq)[:, None]
    return points, weights, reference_ptr + query * (L * R), highest, scale


@triton.jit
def load_samples(
    queries,
    level,
    height,
    width,
    P: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """(xs, ys, ws) of a level's points: positions in pixels, clamped just outside of the map, and
    weights. `queries` is the result of `load_queries`.

    `splat_kernel` leaves samples out by these positions, and `rest_kernel` adds them by the same
    positions. Hence the explicit fused multiply-add: the compiler could fuse differently in the two
    kernels.
    """
    points, weights, reference, highest, scale = queries
    float_height = height.to(tl.float32)
    float_width = width.to(tl.float32)
    x0, y0, step_x, step_y = load_reference(
        reference + level * R, float_width, float_height, ROWS, R, P
    )
    xs, ys = load_points(points + level * (P * 2), 0, ROWS, GROUP, P)
    ws = load_logits(weights + level * P, 0, GROUP, P, -float("inf"))
    ws = columns(weight_of_logit(ws, highest) * scale[:, None], ROWS, GROUP)
    xs_in = ()
    ys_in = ()
    for i in tl.static_range(P):
        x = tl.fma(xs[i], step_x, x0)
        y = tl.fma(ys[i], step_y, y0)
        xs_in = xs_in + (clamp_position(x, float_width),)
        ys_in = ys_in + (clamp_position(y, float_height),)
    return xs_in, ys_in, ws


@triton.jit
def fits_window(x, y, origin_x, origin_y, side):
    """Whether all four pixels around a position are in the window."""
    right = origin_x + (side - 1)
    below = origin_y + (side - 1)
    return (x >= origin_x) & (x < right) & (y >= origin_y) & (y < below)


@triton.jit
def is_left_out(x, y, inside, origin_x, origin_y, valid_height, valid_width, side):
    """Samples that touch the map and do not fit in the window."""
    touches = (x > -1.0) & (x < valid_width) & (y > -1.0) & (y < valid_height)
    return inside & touches & (fits_window(x, y, origin_x, origin_y, side) == 0)
