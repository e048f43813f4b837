"""Backward kernel of multi-scale deformable attention for `value`, for queries of any kind.

Maths. Locations and weights are recomputed from the inputs. The gradient of `value` at a pixel is
the sum over samples of the weight times the bilinear weight of the pixel times g, the gradient of
the output. In float32 the order of the additions, and so the result, varies between runs; in fixed
point (64-bit integers) the result does not depend on the order.

Mapping. As in the forward kernel.

Traffic. Points, weights, references and g are read once. A sample adds four rows of D numbers to
global memory, by reductions of 16 bytes per thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from msdetr.kernels.deform_sampling import (
    channel_mask,
    columns,
    level_sizes,
    load_gradient,
    load_logits,
    load_points,
    load_reference,
    softmax_of_rows,
    split_pixel,
    tile_queries,
    weight_of_logit,
    within,
)


@triton.jit
def _add_to_corner(
    grad,
    pointers,
    share,
    rows,
    fixed_point,
    D: tl.constexpr,
    SPLIT_D: tl.constexpr,
    SPLITS: tl.constexpr,
    FIXED_POINT: tl.constexpr,
):
    """Add `share` [ROWS] times g to the rows at `pointers` [ROWS, SPLIT_D]."""
    for i in tl.static_range(SPLITS):
        product = grad[i] * share[:, None]
        if FIXED_POINT:
            product = (product * fixed_point).to(tl.int64)
        mask = channel_mask(rows[:, None], i, D, SPLIT_D)
        # The default semantics would add a fence and invalidate the cache at every sample.
        tl.atomic_add(pointers + i * SPLIT_D, product, mask=mask, sem="relaxed")


@triton.jit
def scatter_sample(
    grad,
    level_pointers,
    x,
    y,
    weight,
    rows,
    sizes,
    fixed_point,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    SPLIT_D: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
    FIXED_POINT: tl.constexpr,
):
    """Add one sample per row, where `rows` [ROWS] is True, to the gradient of `value`."""
    height, width, valid_height, valid_width = sizes
    x0, y0, right, down = split_pixel(x, y, height, width)
    in_x0 = within(x0, valid_width)
    in_x1 = within(x0 + 1, valid_width)
    in_y0 = within(y0, valid_height) & rows
    in_y1 = within(y0 + 1, valid_height) & rows
    lower = down * weight
    upper = weight - lower
    pixel = y0 * width + x0
    if WIDE:
        pixel = pixel.to(tl.int64)
    offset = pixel * STRIDE
    for row in tl.static_range(2):
        if row == 0:
            share = upper
            inside = in_y0
            pointers = level_pointers + offset[:, None]
        else:
            share = lower
            inside = in_y1
            pointers = level_pointers + (offset + width * STRIDE)[:, None]
        share1 = share * right
        _add_to_corner(
            grad,
            pointers,
            share - share1,
            inside & in_x0,
            fixed_point,
            D,
            SPLIT_D,
            SPLITS,
            FIXED_POINT,
        )
        _add_to_corner(
            grad,
            pointers + STRIDE,
            share1,
            inside & in_x1,
            fixed_point,
            D,
            SPLIT_D,
            SPLITS,
            FIXED_POINT,
        )


@triton.jit(do_not_specialize=["levels"])
def value_kernel(
    grad_output_ptr,  # [B, Q, M, D]
    points_ptr,  # offsets or sampling locations: per (image, query) [M, L, P, 2]
    weights_ptr,  # logits or attention weights: per (image, query) [M, L, P]
    reference_ptr,  # [B, Q, L, R] where R > 0
    valid_ptr,  # [B, L, 2] (height, width) where HAS_VALID_SIZES
    grad_value_ptr,  # [B, S, M, D] float32, or int64 where FIXED_POINT; holds zeros
    fixed_point_ptr,  # [] float32, units per 1 where FIXED_POINT
    num_queries,
    num_tokens,
    stride_pb,
    stride_pq,
    stride_wb,
    stride_wq,
    levels,
    M: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    HAS_VALID_SIZES: tl.constexpr,
    WIDE: tl.constexpr,
    FIXED_POINT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_X: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_LP: tl.constexpr,
    SPLIT_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Gradient of `value`: each sample is added separately."""
    program = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    head = program % M
    query, in_tile = tile_queries(program // M, num_queries, levels, L, BLOCK_Q, TILE_X)
    row = query.to(tl.int64) if WIDE else query
    points = points_ptr + batch * stride_pb + (row * stride_pq + head * (L * P * 2))[:, None]
    weights = weights_ptr + batch * stride_wb + (row * stride_wq + head * (L * P))[:, None]
    image_query = batch * num_queries + query
    reference = reference_ptr + image_query * (L * R)
    channel = tl.arange(0, SPLIT_D)[None, :]
    grad = load_gradient(
        grad_output_ptr, image_query * (M * D) + head * D, channel, in_tile, D, SPLIT_D, SPLITS
    )
    fixed_point = tl.load(fixed_point_ptr) if FIXED_POINT else 1.0
    if R > 0:
        highest, scale = softmax_of_rows(weights, L * P, PADDED_LP)
    level_pointers = grad_value_ptr + batch * num_tokens * (M * D) + head * D + channel
    for level in range(L):
        sizes = level_sizes(level, levels, valid_ptr, batch, L, HAS_VALID_SIZES)
        height, width, _valid_height, _valid_width = sizes
        float_height = height.to(tl.float32)
        float_width = width.to(tl.float32)
        x0, y0, step_x, step_y = load_reference(
            reference + level * R, float_width, float_height, BLOCK_Q, R, P
        )
        for point in tl.static_range(0, P, GROUP):
            xs, ys = load_points(points + level * (P * 2), point, BLOCK_Q, GROUP, P)
            if R > 0:
                ws = load_logits(weights + level * P, point, GROUP, P, -float("inf"))
                ws = weight_of_logit(ws, highest) * scale[:, None]
            else:
                ws = load_logits(weights + level * P, point, GROUP, P, 0.0)
            ws = columns(ws, BLOCK_Q, GROUP)
            for i in tl.static_range(GROUP):
                x = xs[i] * step_x + x0
                y = ys[i] * step_y + y0
                rows = in_tile
                if point + i >= P:
                    rows = rows & False
                scatter_sample(
                    grad,
                    level_pointers,
                    x,
                    y,
                    ws[i],
                    rows,
                    sizes,
                    fixed_point,
                    M * D,
                    D,
                    SPLIT_D,
                    SPLITS,
                    WIDE,
                    FIXED_POINT,
                )
        level_pointers += (height * width).to(tl.int64) * (M * D)
