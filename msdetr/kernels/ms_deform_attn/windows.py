"""Gradient of `value` where the queries are the pixels of the levels: sums over windows.

Maths. If each sample of an encoder layer is added separately, it sends four rows to global memory.
But the queries of one cell of the image (CELL x CELL pixels of level 0, a quarter of them at
level 1, and so on) sample mostly the same few pixels. With the hat function
h(t) = max(0, 1 - |t|), the sums over a window of pixels are

    W[pixel, query] = sum over points of a * h(y - pixel y) * h(x - pixel x)
    window = W @ g        (tensor cores, float32 sums)

Mapping. A program of `splat_kernel` serves one cell and one head. At each level it places a window
around the mean position of the samples of level 0's queries, computes the sums, and adds them to
global memory once. A sample that reaches beyond the window is left out of W. `rest_kernel` (module
`rest`) adds these samples one by one. The result is exact for all positions of samples; the number
of samples outside affects only the speed.

Traffic. Inputs are read once. A window is at most SIDE * SIDE rows of float32 reductions, instead
of four rows per sample.

Precision. g is exact in its own type. For bfloat16 g, W is the sum of two bfloat16 numbers (2^-17
relative). For other types, the product is computed in three tf32 parts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from msdetr.kernels.ms_deform_attn.cells import (
    Window,
    coarse_queries,
    fine_queries,
    fits_window,
    is_left_out,
    program_cell,
)
from msdetr.kernels.ms_deform_attn.sampling import (
    load_level,
    load_reference,
    load_rows,
    load_samples,
    output_pointers,
    within,
)


class _Share(NamedTuple):
    """Queries of a cell, with the samples of one level."""

    grad: Any  # [ROWS, PADDED_D] gradients of the output, in their own type
    inside: Any  # [ROWS] mask
    samples: Any


@triton.jit
def _add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _join_bounds(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    x_min = tl.minimum(a0, b0)
    y_min = tl.minimum(a1, b1)
    x_max = tl.maximum(a2, b2)
    y_max = tl.maximum(a3, b3)
    return x_min, y_min, x_max, y_max, a4 | b4


@triton.jit
def _place_window(share, count, sizes, SIDE: tl.constexpr):
    """A window around the mean position of the samples of `count` queries."""
    sum_x = tl.zeros_like(share.samples.x[0])
    sum_y = tl.zeros_like(share.samples.x[0])
    for i in tl.static_range(sizes.P):
        sum_x += tl.where(share.inside, share.samples.x[i], 0.0)
        sum_y += tl.where(share.inside, share.samples.y[i], 0.0)
    # Warps beyond the queries hold copies of the sums, and store the same values to shared memory.
    sum_x, sum_y = tl.reduce((sum_x, sum_y), 0, _add_pairs)
    x = tl.floor(sum_x / (count * sizes.P)) - (SIDE // 2 - 1)
    y = tl.floor(sum_y / (count * sizes.P)) - (SIDE // 2 - 1)
    return Window(x, y)


@triton.jit
def _find_bounds(share, window, side, level, sizes):
    """Minima of x and y and maxima of x and y of the positions that fit a window, and 1 if a sample
    was left out."""
    far = 1e9
    x_min = tl.full(share.inside.shape, far, tl.float32)
    y_min, x_max, y_max = x_min, -x_min, -x_min
    rest = tl.zeros(share.inside.shape, tl.int32)
    for i in tl.static_range(sizes.P):
        x = share.samples.x[i]
        y = share.samples.y[i]
        fits = share.inside & fits_window(x, y, window, side)
        x_min = tl.minimum(x_min, tl.where(fits, x, far))
        y_min = tl.minimum(y_min, tl.where(fits, y, far))
        x_max = tl.maximum(x_max, tl.where(fits, x, -far))
        y_max = tl.maximum(y_max, tl.where(fits, y, -far))
        rest = rest | is_left_out(x, y, share.inside, window, side, level).to(tl.int32)
    return tl.reduce((x_min, y_min, x_max, y_max, rest), 0, _join_bounds)


@triton.jit
def _add_product(acc, share, window, first_row, sizes, windows, SIDE: tl.constexpr):
    """acc + W @ g for BLOCK_Y rows of a window: [BLOCK_Y * side, PADDED_D]."""
    BLOCK_Y: tl.constexpr = windows.BLOCK_Y
    ROWS: tl.constexpr = share.inside.shape[0]
    pixel_x = tl.arange(0, SIDE).to(tl.float32)[:, None]
    pixel_y = (first_row + tl.arange(0, BLOCK_Y)).to(tl.float32)[:, None]
    weights = tl.zeros((BLOCK_Y, SIDE, ROWS), tl.float32)
    for i in tl.static_range(sizes.P):
        x = share.samples.x[i]
        y = share.samples.y[i]
        fits = share.inside & fits_window(x, y, window, SIDE)
        weight = tl.where(fits, share.samples.weight[i], 0.0)[None, :]
        near_x = tl.maximum(1.0 - tl.abs((x - window.x)[None, :] - pixel_x), 0.0)
        near_y = tl.maximum(weight - weight * tl.abs((y - window.y)[None, :] - pixel_y), 0.0)
        weights += near_y[:, None, :] * near_x[None, :, :]
    weights = tl.reshape(weights, (BLOCK_Y * SIDE, ROWS))
    grad = share.grad
    if grad.dtype == tl.bfloat16:
        high = weights.to(tl.bfloat16)
        low = (weights - high.to(tl.float32)).to(tl.bfloat16)
        if windows.INTERPRET:  # The bfloat16 products of the interpreter are wrong.
            acc = tl.dot(high.to(tl.float32), grad.to(tl.float32), acc)
            acc = tl.dot(low.to(tl.float32), grad.to(tl.float32), acc)
        else:
            acc = tl.dot(high, grad, acc)
            acc = tl.dot(low, grad, acc)
    else:
        acc = tl.dot(weights, grad.to(tl.float32), acc, input_precision="tf32x3")
    return acc


@triton.jit
def _splat_level(
    fine, coarse, count, level_base, window_ptr, level, sizes, windows, SIDE: tl.constexpr
):
    """Sum the contributions of a cell to one level, and add the sums to global memory.

    `fine` and `coarse` are the shares of level 0's queries and of the others. Stores the origin of
    the window, and whether any sample was left out.
    """
    BLOCK_Y: tl.constexpr = windows.BLOCK_Y
    window = _place_window(fine, count, sizes, SIDE)
    bounds = _find_bounds(fine, window, SIDE, level, sizes)
    if sizes.L > 1:
        bounds = _join_bounds(*bounds, *_find_bounds(coarse, window, SIDE, level, sizes))
    x_min, y_min, x_max, y_max, rest = bounds
    tl.store(window_ptr, window.x)
    tl.store(window_ptr + 1, window.y)
    tl.store(window_ptr + 2, rest.to(tl.float32))

    # A few rows at a time, to limit registers, and only rows that samples reach.
    for first_row in range(0, SIDE, BLOCK_Y):
        top = window.y + tl.full((), 1.0, tl.float32) * first_row
        if (y_max > top - 1.0) & (y_min < top + BLOCK_Y):
            acc = tl.zeros((BLOCK_Y * SIDE, windows.PADDED_D), tl.float32)
            acc = _add_product(acc, fine, window, first_row, sizes, windows, SIDE)
            if sizes.L > 1:
                acc = _add_product(acc, coarse, window, first_row, sizes, windows, SIDE)
            # The pixels of these rows that samples reach and that are within the map.
            pixel = tl.arange(0, BLOCK_Y * SIDE)
            pixel_x = window.x + (pixel % SIDE).to(tl.float32)
            pixel_y = top + (pixel // SIDE).to(tl.float32)
            used = (pixel_x > x_min - 1.0) & (pixel_x < x_max + 1.0)
            used = used & (pixel_y > y_min - 1.0) & (pixel_y < y_max + 1.0)
            pixel_x = pixel_x.to(tl.int32)
            pixel_y = pixel_y.to(tl.int32)
            used = used & within(pixel_x, level.valid_width) & within(pixel_y, level.valid_height)
            offset = (pixel_y * level.width + pixel_x) * (sizes.M * sizes.D)
            channel, mask = _channels(used, sizes, windows)
            tl.atomic_add(level_base + offset[:, None] + channel, acc, mask=mask, sem="relaxed")


@triton.jit
def _channels(rows, sizes, windows):
    """The channels [1, PADDED_D] of a head, and the mask of those of some rows [ROWS]."""
    channel = tl.arange(0, windows.PADDED_D)[None, :]
    mask = rows[:, None]
    if windows.PADDED_D > sizes.D:
        mask = mask & (channel < sizes.D)
    return channel, mask


@triton.jit
def _load_gradient(grad_output_ptr, group, sizes, windows):
    """Gradients of the output [ROWS, PADDED_D], in their own type."""
    channel, mask = _channels(group.inside, sizes, windows)
    pointers = output_pointers(grad_output_ptr, group, group.head * sizes.D + channel, sizes)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _load_share(grad, rows, group, index, level, sizes):
    """The share of a group, given its gradients and inputs."""
    reference = load_reference(rows, index, level, sizes)
    samples = load_samples(rows, reference, index, level, 0, sizes, True)
    return _Share(grad, group.inside, samples)


@triton.jit(do_not_specialize=["maps", "num_queries", "cells_across"])
def splat_kernel(
    grad_output_ptr,  # [B, Q, M, D]
    queries,  # Queries
    maps,  # Maps
    grad_value_ptr,  # [B, S, M, D] float32; holds zeros
    windows_ptr,  # [B, cells, M, L, 3] float32: origin of a window (x, y), 1 if samples are left
    num_queries,
    cells_across,
    sizes: tl.constexpr,  # Sizes
    windows: tl.constexpr,  # WindowSizes
):
    """Gradient of `value` from all samples that fit the windows."""
    cell = program_cell(num_queries, cells_across, sizes)
    level_base = grad_value_ptr + cell.batch * num_queries * (sizes.M * sizes.D)
    level_base += cell.head * sizes.D
    windows_ptr += (cell.batch * tl.num_programs(0) + tl.program_id(0)) * (sizes.L * 3)

    group = fine_queries(cell, maps)
    count = tl.maximum(tl.sum(group.inside.to(tl.int32), 0), 1).to(tl.float32)
    grad = _load_gradient(grad_output_ptr, group, sizes, windows)
    rows = load_rows(queries, group, sizes)
    if sizes.L > 1:
        coarse_group = coarse_queries(cell, maps, sizes)
        coarse_grad = _load_gradient(grad_output_ptr, coarse_group, sizes, windows)
        coarse_rows = load_rows(queries, coarse_group, sizes)
    # One loop per window size, to limit the code and its compilation time.
    for loop in tl.static_range(2 if sizes.L > 2 else 1):
        for index in range(2 * loop, sizes.L if loop == 1 or sizes.L < 2 else 2):
            level = load_level(index, maps, cell.batch, sizes)
            fine = _load_share(grad, rows, group, index, level, sizes)
            coarse = fine
            if sizes.L > 1:
                coarse = _load_share(coarse_grad, coarse_rows, coarse_group, index, level, sizes)
            _splat_level(
                fine,
                coarse,
                count,
                level_base,
                windows_ptr + index * 3,
                level,
                sizes,
                windows,
                windows.SIDE if loop == 0 else windows.COARSE_SIDE,
            )
            level_base += (level.height * level.width).to(tl.int64) * (sizes.M * sizes.D)
