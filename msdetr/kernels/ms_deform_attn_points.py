"""Backward kernel of multi-scale deformable attention for points, weights and reference points.

Maths. Locations and weights are recomputed from the inputs. Let g be the gradient of the output, a
the weight of a sample, (r, d) the fractions to the right and down of its pixel, and
c_ij = <g, value of corner ij>, 0 for corners outside. The gradients are functions of the c_ij:

    weight        (1 - d) ((1 - r) c_00 + r c_01) + d ((1 - r) c_10 + r c_11)
    x (pixels)    a ((1 - d) (c_01 - c_00) + d (c_11 - c_10))
    y (pixels)    a ((1 - r) (c_10 - c_00) + r (c_11 - c_01))

The gradient of a logit is that of the softmax, a_k (gw_k - sum_j a_j gw_j). All gw of a row are
kept in registers.

Mapping. As in the forward kernel.

Traffic. The reads of the forward kernel, and g once. Every gradient is written once, without
atomics; the gradient of a reference point has a term per head, which PyTorch sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from msdetr.kernels.deform_sampling import (
    channel_mask,
    columns,
    from_columns,
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
def _dot_with_corner(
    grad,
    pointers,
    mask,
    D: tl.constexpr,
    SPLIT_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """<g, value> of one corner of each row: [ROWS]."""
    value = tl.load(pointers, mask=channel_mask(mask, 0, D, SPLIT_D), other=0.0)
    if SPLITS == 1 and value.dtype == tl.float32:
        # Rounded. Where a lane holds one channel, the compiler would contract only its own product
        # into the sum over lanes, and lanes would hold sums that differ.
        product = tl.fma(grad[0], value, 0.0)
    else:
        product = grad[0] * value.to(tl.float32)
    for i in tl.static_range(1, SPLITS):
        rows = channel_mask(mask, i, D, SPLIT_D)
        value = tl.load(pointers + i * SPLIT_D, mask=rows, other=0.0)
        product += grad[i] * value.to(tl.float32)
    return tl.sum(product, 1)


@triton.jit
def _sample_gradients(
    grad,
    level_pointers,
    x,
    y,
    weight,
    sizes,
    stride_s,
    D: tl.constexpr,
    SPLIT_D: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gradients [ROWS] of x and y (pixels) and of the weight of one sample per row."""
    height, width, valid_height, valid_width = sizes
    x0, y0, right, down = split_pixel(x, y, height, width)
    in_x0 = within(x0, valid_width)
    in_x1 = within(x0 + 1, valid_width)
    in_y0 = within(y0, valid_height)
    in_y1 = within(y0 + 1, valid_height)
    pixel = y0 * width + x0
    if WIDE:
        pixel = pixel.to(tl.int64)
    offset = pixel * stride_s
    upper = level_pointers + offset[:, None]
    lower = level_pointers + (offset + width * stride_s)[:, None]
    dot00 = _dot_with_corner(grad, upper, (in_x0 & in_y0)[:, None], D, SPLIT_D, SPLITS)
    dot01 = _dot_with_corner(grad, upper + stride_s, (in_x1 & in_y0)[:, None], D, SPLIT_D, SPLITS)
    dot10 = _dot_with_corner(grad, lower, (in_x0 & in_y1)[:, None], D, SPLIT_D, SPLITS)
    dot11 = _dot_with_corner(grad, lower + stride_s, (in_x1 & in_y1)[:, None], D, SPLIT_D, SPLITS)
    across_top = dot01 - dot00
    across_bottom = dot11 - dot10
    top = dot00 + right * across_top
    bottom = dot10 + right * across_bottom
    grad_x = weight * (across_top + down * (across_bottom - across_top))
    return grad_x, weight * (bottom - top), top + down * (bottom - top)


@triton.jit(do_not_specialize=["levels"])
def points_kernel(
    grad_output_ptr,  # [B, Q, M, D]
    value_ptr,  # [B, S, M, D]
    points_ptr,  # offsets or sampling locations: per (image, query) [M, L, P, 2]
    weights_ptr,  # logits or attention weights: per (image, query) [M, L, P]
    reference_ptr,  # [B, Q, L, R] where R > 0
    valid_ptr,  # [B, L, 2] (height, width) where HAS_VALID_SIZES
    grad_points_ptr,  # as points_ptr
    grad_weights_ptr,  # as weights_ptr
    grad_reference_ptr,  # [B, M, Q, L, R] float32, one term per head, where NEED_REFERENCE
    num_queries,
    stride_vb,
    stride_vs,
    stride_pb,
    stride_pq,
    stride_wb,
    stride_wq,
    stride_gpb,
    stride_gpq,
    stride_gwb,
    stride_gwq,
    levels,
    M: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    HAS_VALID_SIZES: tl.constexpr,
    WIDE: tl.constexpr,
    NEED_REFERENCE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_X: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_LP: tl.constexpr,
    SPLIT_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Gradients of points, weights (or logits) and reference points, without atomics."""
    GROUPS: tl.constexpr = (P + GROUP - 1) // GROUP
    program = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    head = program % M
    query, in_tile = tile_queries(program // M, num_queries, levels, L, BLOCK_Q, TILE_X)
    row = query.to(tl.int64) if WIDE else query
    points = points_ptr + batch * stride_pb + (row * stride_pq + head * (L * P * 2))[:, None]
    weights = weights_ptr + batch * stride_wb + (row * stride_wq + head * (L * P))[:, None]
    grad_points = grad_points_ptr + batch * stride_gpb
    grad_points += (row * stride_gpq + head * (L * P * 2))[:, None]
    grad_weights = grad_weights_ptr + batch * stride_gwb
    grad_weights += (row * stride_gwq + head * (L * P))[:, None]
    image_query = batch * num_queries + query
    reference = reference_ptr + image_query * (L * R)
    channel = tl.arange(0, SPLIT_D)[None, :]
    grad = load_gradient(
        grad_output_ptr, image_query * (M * D) + head * D, channel, in_tile, D, SPLIT_D, SPLITS
    )
    level_pointers = value_ptr + batch * stride_vb + head * D + channel
    if R > 0:
        highest, scale = softmax_of_rows(weights, L * P, PADDED_LP)
        # Gradients of all weights of a row: a slot per level and group of points.
        SLOTS: tl.constexpr = PADDED_LP // GROUP
        slots = tl.arange(0, SLOTS)[None, :, None]
        grad_all = tl.zeros((BLOCK_Q, SLOTS, GROUP), tl.float32)
    for level in range(L):
        sizes = level_sizes(level, levels, valid_ptr, batch, L, HAS_VALID_SIZES)
        height, width, _valid_height, _valid_width = sizes
        float_height = height.to(tl.float32)
        float_width = width.to(tl.float32)
        x0, y0, step_x, step_y = load_reference(
            reference + level * R, float_width, float_height, BLOCK_Q, R, P
        )
        if NEED_REFERENCE:
            sum_x = tl.zeros((BLOCK_Q,), tl.float32)
            sum_y = tl.zeros((BLOCK_Q,), tl.float32)
            sum_width = tl.zeros((BLOCK_Q,), tl.float32)
            sum_height = tl.zeros((BLOCK_Q,), tl.float32)
        for point in tl.static_range(0, P, GROUP):
            xs, ys = load_points(points + level * (P * 2), point, BLOCK_Q, GROUP, P)
            if R > 0:
                ws = load_logits(weights + level * P, point, GROUP, P, -float("inf"))
                ws = weight_of_logit(ws, highest) * scale[:, None]
            else:
                ws = load_logits(weights + level * P, point, GROUP, P, 0.0)
            ws = columns(ws, BLOCK_Q, GROUP)
            grad_xs = ()
            grad_ys = ()
            grad_ws = ()
            for i in tl.static_range(GROUP):
                x = xs[i] * step_x + x0
                y = ys[i] * step_y + y0
                grad_x, grad_y, grad_w = _sample_gradients(
                    grad,
                    level_pointers,
                    x,
                    y,
                    ws[i],
                    sizes,
                    stride_vs,
                    D,
                    SPLIT_D,
                    SPLITS,
                    WIDE,
                )
                if NEED_REFERENCE:
                    sum_x += grad_x
                    sum_y += grad_y
                    if R == 4:
                        sum_width += grad_x * xs[i]
                        sum_height += grad_y * ys[i]
                if R != 2:
                    grad_x *= step_x
                    grad_y *= step_y
                grad_xs = grad_xs + (grad_x,)
                grad_ys = grad_ys + (grad_y,)
                grad_ws = grad_ws + (grad_w,)
            k = point * 2 + tl.arange(0, 2 * GROUP)[None, :]
            pairs = tl.join(
                from_columns(grad_xs, BLOCK_Q, GROUP), from_columns(grad_ys, BLOCK_Q, GROUP)
            )
            pairs = tl.reshape(pairs, (BLOCK_Q, 2 * GROUP)).to(grad_points_ptr.dtype.element_ty)
            mask = in_tile[:, None]
            if point + GROUP > P:
                mask = mask & (k < P * 2)
            tl.store(grad_points + level * (P * 2) + k, pairs, mask=mask)
            grad_w = from_columns(grad_ws, BLOCK_Q, GROUP)
            if R > 0:
                slot = level * GROUPS + point // GROUP
                grad_all = tl.where(slots == slot, grad_w[:, None, :], grad_all)
            else:
                k = point + tl.arange(0, GROUP)[None, :]
                mask = in_tile[:, None]
                if point + GROUP > P:
                    mask = mask & (k < P)
                grad_w = grad_w.to(grad_weights_ptr.dtype.element_ty)
                tl.store(grad_weights + level * P + k, grad_w, mask=mask)
        if NEED_REFERENCE:
            terms = grad_reference_ptr + (batch * M + head) * num_queries * (L * R)
            terms += (query * L + level) * R
            tl.store(terms, sum_x * float_width, mask=in_tile)
            tl.store(terms + 1, sum_y * float_height, mask=in_tile)
            if R == 4:
                tl.store(terms + 2, sum_width * (float_width * (0.5 / P)), mask=in_tile)
                tl.store(terms + 3, sum_height * (float_height * (0.5 / P)), mask=in_tile)
        level_pointers += (height * width).to(tl.int64) * stride_vs
    if R > 0:
        grad_row = tl.reshape(grad_all, (BLOCK_Q, PADDED_LP))
        column = tl.arange(0, PADDED_LP)[None, :]
        if GROUPS * GROUP == P:
            k = column
            exists = column < L * P
        else:
            point = column % (GROUPS * GROUP)
            k = column // (GROUPS * GROUP) * P + point
            exists = (point < P) & (column < L * GROUPS * GROUP)
        if PADDED_LP == L * P:
            logits = tl.load(weights + k).to(tl.float32)
            mask = in_tile[:, None]
        else:
            logits = tl.load(weights + k, mask=exists, other=-float("inf")).to(tl.float32)
            mask = in_tile[:, None] & exists
        weight = weight_of_logit(logits, highest) * scale[:, None]
        mean = tl.sum(weight * grad_row, 1)
        grad_row = weight * (grad_row - mean[:, None])
        tl.store(grad_weights + k, grad_row.to(grad_weights_ptr.dtype.element_ty), mask=mask)
