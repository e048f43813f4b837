"""Gradient of `value` where the queries are the pixels of the levels: sums over windows.

Maths. If each sample of an encoder layer is added separately, it sends four rows to global memory.
But the queries of one cell of the image (CELL x CELL pixels of level 0, a quarter of them at
level 1, and so on) sample mostly the same few pixels. With the hat function
h(t) = max(0, 1 - |t|), the sums over a window of pixels are

    W[pixel, query] = sum over points of a * h(y - pixel y) * h(x - pixel x)
    window = W @ g        (tensor cores, float32 sums)

Mapping. A program of `splat_kernel` serves one cell and one head. At each level it places a window
around the mean position of the samples of level 0's queries, computes the sums, and adds them to
global memory once. A sample that reaches beyond the window is left out of W. `rest_kernel` adds
these samples one by one, in the cells and levels that have any. The result is exact for all
positions of samples; the number of samples outside affects only the speed.

Traffic. `splat_kernel` reads its inputs once; `rest_kernel` reads them again only where samples
were left out. A window is at most SIDE * SIDE rows of float32 reductions, instead of four rows per
sample.

Precision. g is exact in its own type. For bfloat16 g, W is the sum of two bfloat16 numbers (2^-17
relative). For other types, the product is computed in three tf32 parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from msdetr.kernels.deform_cells import (
    coarse_queries,
    fine_queries,
    fits_window,
    is_left_out,
    load_queries,
    load_samples,
)
from msdetr.kernels.deform_sampling import level_size, level_sizes, load_gradient, within
from msdetr.kernels.ms_deform_attn_value import scatter_sample


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
def _window_weights(
    samples,
    inside,
    origin_x,
    origin_y,
    first_row,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):
    """BLOCK_Y rows of W, [BLOCK_Y, SIDE, ROWS]: the weight of each query at each pixel."""
    xs, ys, ws = samples
    pixel_x = tl.arange(0, SIDE).to(tl.float32)[:, None]
    pixel_y = (first_row + tl.arange(0, BLOCK_Y)).to(tl.float32)[:, None]
    window = tl.zeros((BLOCK_Y, SIDE, ROWS), tl.float32)
    for i in tl.static_range(P):
        fits = inside & fits_window(xs[i], ys[i], origin_x, origin_y, SIDE)
        weight = tl.where(fits, ws[i], 0.0)[None, :]
        near_x = tl.maximum(1.0 - tl.abs((xs[i] - origin_x)[None, :] - pixel_x), 0.0)
        near_y = tl.maximum(weight - weight * tl.abs((ys[i] - origin_y)[None, :] - pixel_y), 0.0)
        window += near_y[:, None, :] * near_x[None, :, :]
    return window


@triton.jit
def _add_product(
    acc, window, grad, PIXELS: tl.constexpr, ROWS: tl.constexpr, INTERPRET: tl.constexpr
):
    """acc + W @ g, with W [SIDE, SIDE, ROWS] float32."""
    window = tl.reshape(window, (PIXELS, ROWS))
    if grad.dtype == tl.bfloat16:
        high = window.to(tl.bfloat16)
        low = (window - high.to(tl.float32)).to(tl.bfloat16)
        if INTERPRET:  # The bfloat16 products of the interpreter are wrong.
            acc = tl.dot(high.to(tl.float32), grad.to(tl.float32), acc)
            acc = tl.dot(low.to(tl.float32), grad.to(tl.float32), acc)
        else:
            acc = tl.dot(high, grad, acc)
            acc = tl.dot(low, grad, acc)
    else:
        acc = tl.dot(window, grad.to(tl.float32), acc, input_precision="tf32x3")
    return acc


@triton.jit
def _bounds_and_rest(
    samples,
    inside,
    origin_x,
    origin_y,
    valid_height,
    valid_width,
    P: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Minimum and maximum position that fits, x and y, and 1 if any sample was left out."""
    xs, ys, _ws = samples
    far = 1e9
    x_min = tl.where(inside, far, far)
    y_min = x_min
    x_max = -x_min
    y_max = -x_min
    rest = tl.where(inside, 0, 0)
    for i in tl.static_range(P):
        x = xs[i]
        y = ys[i]
        fits = inside & fits_window(x, y, origin_x, origin_y, SIDE)
        x_min = tl.minimum(x_min, tl.where(fits, x, far))
        y_min = tl.minimum(y_min, tl.where(fits, y, far))
        x_max = tl.maximum(x_max, tl.where(fits, x, -far))
        y_max = tl.maximum(y_max, tl.where(fits, y, -far))
        out = is_left_out(x, y, inside, origin_x, origin_y, valid_height, valid_width, SIDE)
        rest = rest | out.to(tl.int32)
    return tl.reduce((x_min, y_min, x_max, y_max, rest), 0, _join_bounds)


@triton.jit
def _splat_level(
    fine,
    coarse,
    count,
    level_base,
    window_ptr,
    sizes,
    L: tl.constexpr,
    P: tl.constexpr,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    FINE: tl.constexpr,
    COARSE: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Sum the contributions of a cell to one level, and add the sums to global memory.

    `fine` (queries of level 0) and `coarse` (of the other levels) are (gradient rows, mask,
    samples). Stores the origin of the window, and whether any sample was left out.
    """
    fine_grad, fine_inside, fine_samples = fine
    coarse_grad, coarse_inside, coarse_samples = coarse
    fine_xs, fine_ys, _fine_ws = fine_samples
    _height, width, valid_height, valid_width = sizes
    sum_x = tl.zeros((FINE,), tl.float32)
    sum_y = tl.zeros((FINE,), tl.float32)
    for i in tl.static_range(P):
        sum_x += tl.where(fine_inside, fine_xs[i], 0.0)
        sum_y += tl.where(fine_inside, fine_ys[i], 0.0)
    sum_x, sum_y = tl.reduce((sum_x, sum_y), 0, _add_pairs)
    origin_x = tl.floor(sum_x / (count * P)) - (SIDE // 2 - 1)
    origin_y = tl.floor(sum_y / (count * P)) - (SIDE // 2 - 1)

    x_min, y_min, x_max, y_max, rest = _bounds_and_rest(
        fine_samples, fine_inside, origin_x, origin_y, valid_height, valid_width, P, SIDE
    )
    if L > 1:
        bounds = _bounds_and_rest(
            coarse_samples, coarse_inside, origin_x, origin_y, valid_height, valid_width, P, SIDE
        )
        x_min = tl.minimum(x_min, bounds[0])
        y_min = tl.minimum(y_min, bounds[1])
        x_max = tl.maximum(x_max, bounds[2])
        y_max = tl.maximum(y_max, bounds[3])
        rest = rest | bounds[4]
    tl.store(window_ptr, origin_x)
    tl.store(window_ptr + 1, origin_y)
    tl.store(window_ptr + 2, rest.to(tl.float32))

    # A few rows at a time, to limit registers, and only rows that samples reach.
    for first_row in range(0, SIDE, BLOCK_Y):
        top = origin_y + tl.full((), 1.0, tl.float32) * first_row
        if (y_max > top - 1.0) & (y_min < top + BLOCK_Y):
            window = _window_weights(
                fine_samples, fine_inside, origin_x, origin_y, first_row, P, FINE, SIDE, BLOCK_Y
            )
            acc = tl.zeros((BLOCK_Y * SIDE, PADDED_D), tl.float32)
            acc = _add_product(acc, window, fine_grad, BLOCK_Y * SIDE, FINE, INTERPRET)
            if L > 1:
                window = _window_weights(
                    coarse_samples,
                    coarse_inside,
                    origin_x,
                    origin_y,
                    first_row,
                    P,
                    COARSE,
                    SIDE,
                    BLOCK_Y,
                )
                acc = _add_product(acc, window, coarse_grad, BLOCK_Y * SIDE, COARSE, INTERPRET)
            # The pixels of these rows that samples reach and that are within the map.
            pixel = tl.arange(0, BLOCK_Y * SIDE)
            pixel_x = origin_x + (pixel % SIDE).to(tl.float32)
            pixel_y = top + (pixel // SIDE).to(tl.float32)
            used = (pixel_x > x_min - 1.0) & (pixel_x < x_max + 1.0)
            used = used & (pixel_y > y_min - 1.0) & (pixel_y < y_max + 1.0)
            pixel_x = pixel_x.to(tl.int32)
            pixel_y = pixel_y.to(tl.int32)
            used = used & within(pixel_x, valid_width) & within(pixel_y, valid_height)
            offset = (pixel_y * width + pixel_x) * STRIDE
            channel = tl.arange(0, PADDED_D)[None, :]
            mask = used[:, None]
            if PADDED_D > D:
                mask = mask & (channel < D)
            tl.atomic_add(level_base + offset[:, None] + channel, acc, mask=mask, sem="relaxed")


@triton.jit
def _load_rows(
    grad_output_ptr, query, inside, STRIDE: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr
):
    """Output gradients of queries, [ROWS, PADDED_D] in their own type."""
    channel = tl.arange(0, PADDED_D)[None, :]
    mask = inside[:, None]
    if PADDED_D > D:
        mask = mask & (channel < D)
    return tl.load(grad_output_ptr + (query * STRIDE)[:, None] + channel, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["levels"])
def splat_kernel(
    grad_output_ptr,  # [B, Q, M, D]
    points_ptr,  # offsets: per (image, query) [M, L, P, 2]
    weights_ptr,  # logits: per (image, query) [M, L, P]
    reference_ptr,  # [B, Q, L, R]
    valid_ptr,  # [B, L, 2] (height, width) where HAS_VALID_SIZES
    grad_value_ptr,  # [B, S, M, D] float32; holds zeros
    windows_ptr,  # [B, cells, M, L, 3] float32: origin of a window (x, y), 1 if samples are left
    num_queries,
    stride_pb,
    stride_pq,
    stride_wb,
    stride_wq,
    cells_across,
    levels,
    M: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    HAS_VALID_SIZES: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_LP: tl.constexpr,
    PADDED_D: tl.constexpr,
    SIDE: tl.constexpr,
    COARSE_SIDE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Gradient of `value` from all samples that fit the windows.

    Windows are SIDE pixels wide at levels 0 and 1, and COARSE_SIDE at the others.
    """
    FINE: tl.constexpr = 64
    COARSE: tl.constexpr = 32
    program = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    head = program % M
    cell = program // M
    points_ptr += batch * stride_pb + head * (L * P * 2)
    weights_ptr += batch * stride_wb + head * (L * P)
    grad_output_ptr += batch * num_queries * (M * D) + head * D
    reference_ptr += batch * num_queries * (L * R)
    valid_ptr += batch * (L * 2)
    windows_ptr += (batch * tl.num_programs(0) + program) * (L * 3)
    level_base = grad_value_ptr + batch * num_queries * (M * D) + head * D

    query, inside = fine_queries(cell // cells_across, cell % cells_across, levels)
    count = tl.maximum(tl.sum(inside.to(tl.int32), 0), 1).to(tl.float32)
    grad = _load_rows(grad_output_ptr, query, inside, M * D, D, PADDED_D)
    fine_inputs = load_queries(
        points_ptr, weights_ptr, reference_ptr, query, stride_pq, stride_wq, L, P, R, PADDED_LP
    )
    if L > 1:
        query, coarse_inside = coarse_queries(
            cell // cells_across, cell % cells_across, levels, L, COARSE
        )
        coarse_grad = _load_rows(grad_output_ptr, query, coarse_inside, M * D, D, PADDED_D)
        coarse_inputs = load_queries(
            points_ptr, weights_ptr, reference_ptr, query, stride_pq, stride_wq, L, P, R, PADDED_LP
        )
    # One loop per window size, to limit the code and its compilation time.
    for loop in tl.static_range(2 if L > 2 else 1):
        for level in range(2 * loop, L if loop == 1 or L < 2 else 2):
            sizes = level_sizes(level, levels, valid_ptr, 0, L, HAS_VALID_SIZES)
            height, width, _valid_height, _valid_width = sizes
            samples = load_samples(fine_inputs, level, height, width, P, R, FINE, GROUP)
            fine = (grad, inside, samples)
            if L > 1:
                samples = load_samples(coarse_inputs, level, height, width, P, R, COARSE, GROUP)
                coarse = (coarse_grad, coarse_inside, samples)
            else:
                coarse = fine
            _splat_level(
                fine,
                coarse,
                count,
                level_base,
                windows_ptr + level * 3,
                sizes,
                L,
                P,
                M * D,
                D,
                PADDED_D,
                FINE,
                COARSE,
                SIDE if loop == 0 else COARSE_SIDE,
                BLOCK_Y,
                INTERPRET,
            )
            level_base += (height * width).to(tl.int64) * (M * D)


@triton.jit
def _scatter_rest(
    queries,
    grad_output_ptr,
    query,
    inside,
    level_base,
    level,
    window,
    sizes,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Add the samples of some queries that were left out of a window (origin x, origin y, side)."""
    origin_x, origin_y, side = window
    height, width, valid_height, valid_width = sizes
    xs, ys, ws = load_samples(queries, level, height, width, P, R, ROWS, GROUP)
    channel = tl.arange(0, SPLIT_D)[None, :]
    grad = load_gradient(grad_output_ptr, query * STRIDE, channel, inside, D, SPLIT_D, SPLITS)
    for i in tl.static_range(P):
        rows = is_left_out(
            xs[i], ys[i], inside, origin_x, origin_y, valid_height, valid_width, side
        )
        scatter_sample(
            grad,
            level_base + channel,
            xs[i],
            ys[i],
            ws[i],
            rows,
            sizes,
            1.0,
            STRIDE,
            D,
            SPLIT_D,
            SPLITS,
            False,
            False,
        )


@triton.jit(do_not_specialize=["levels"])
def rest_kernel(
    grad_output_ptr,
    points_ptr,
    weights_ptr,
    reference_ptr,
    valid_ptr,
    grad_value_ptr,
    windows_ptr,
    num_queries,
    stride_pb,
    stride_pq,
    stride_wb,
    stride_wq,
    cells_across,
    levels,
    M: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    HAS_VALID_SIZES: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_LP: tl.constexpr,
    SPLIT_D: tl.constexpr,
    SPLITS: tl.constexpr,
    SIDE: tl.constexpr,
    COARSE_SIDE: tl.constexpr,
):
    """Add the samples that `splat_kernel` left out. Arguments are those of `splat_kernel`."""
    FINE: tl.constexpr = 64
    COARSE: tl.constexpr = 32
    program = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    head = program % M
    cell = program // M
    points_ptr += batch * stride_pb + head * (L * P * 2)
    weights_ptr += batch * stride_wb + head * (L * P)
    grad_output_ptr += batch * num_queries * (M * D) + head * D
    reference_ptr += batch * num_queries * (L * R)
    valid_ptr += batch * (L * 2)
    windows_ptr += (batch * tl.num_programs(0) + program) * (L * 3)
    level_base = grad_value_ptr + batch * num_queries * (M * D) + head * D
    for level in range(L):
        height, width = level_size(level, levels, L)
        if tl.load(windows_ptr + level * 3 + 2) > 0.0:
            sizes = level_sizes(level, levels, valid_ptr, 0, L, HAS_VALID_SIZES)
            origin_x = tl.load(windows_ptr + level * 3)
            origin_y = tl.load(windows_ptr + level * 3 + 1)
            window = (origin_x, origin_y, tl.where(level < 2, SIDE, COARSE_SIDE))
            for group in tl.static_range(2 if L > 1 else 1):
                if group == 0:
                    query, inside = fine_queries(cell // cells_across, cell % cells_across, levels)
                else:
                    query, inside = coarse_queries(
                        cell // cells_across, cell % cells_across, levels, L, COARSE
                    )
                queries = load_queries(
                    points_ptr,
                    weights_ptr,
                    reference_ptr,
                    query,
                    stride_pq,
                    stride_wq,
                    L,
                    P,
                    R,
                    PADDED_LP,
                )
                _scatter_rest(
                    queries,
                    grad_output_ptr,
                    query,
                    inside,
                    level_base,
                    level,
                    window,
                    sizes,
                    M * D,
                    D,
                    P,
                    R,
                    FINE if group == 0 else COARSE,
                    GROUP,
                    SPLIT_D,
                    SPLITS,
                )
        level_base += (height * width).to(tl.int64) * (M * D)
