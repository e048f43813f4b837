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

from msdetr.kernels.ms_deform_attn.sampling import (
    find_corners,
    from_columns,
    load_gradient,
    load_level,
    load_reference,
    load_rows,
    load_samples,
    point_pointers,
    program_queries,
    split_channels,
    split_mask,
    weight_of_logit,
)


@triton.jit
def _dot_with_corner(grad, pointers, rows, sizes, tile):
    """<g, value> of one corner of each row: [ROWS]."""
    value = tl.load(pointers, mask=split_mask(rows, 0, sizes, tile), other=0.0)
    if tile.SPLITS == 1 and value.dtype == tl.float32:
        # Rounded. Where a lane holds one channel, the compiler would contract only its own product
        # into the sum over lanes, and lanes would hold sums that differ.
        product = tl.fma(grad[0], value, 0.0)
    else:
        product = grad[0] * value.to(tl.float32)
    for i in tl.static_range(1, tile.SPLITS):
        mask = split_mask(rows, i, sizes, tile)
        value = tl.load(pointers + i * tile.SPLIT_D, mask=mask, other=0.0)
        product += grad[i] * value.to(tl.float32)
    return tl.sum(product, 1)


@triton.jit
def _sample_gradients(grad, pointers, stride_s, samples, i: tl.constexpr, level, sizes, tile):
    """Gradients [ROWS] of x and y (pixels) and of the weight of sample `i` of each row."""
    at = find_corners(samples.x[i], samples.y[i], level, stride_s, sizes)
    upper = pointers + at.upper[:, None]
    lower = pointers + at.lower[:, None]
    dot00 = _dot_with_corner(grad, upper, at.in_x0 & at.in_y0, sizes, tile)
    dot01 = _dot_with_corner(grad, upper + stride_s, at.in_x1 & at.in_y0, sizes, tile)
    dot10 = _dot_with_corner(grad, lower, at.in_x0 & at.in_y1, sizes, tile)
    dot11 = _dot_with_corner(grad, lower + stride_s, at.in_x1 & at.in_y1, sizes, tile)
    across_top = dot01 - dot00
    across_bottom = dot11 - dot10
    top = dot00 + at.right * across_top
    bottom = dot10 + at.right * across_bottom
    weight = samples.weight[i]
    grad_x = weight * (across_top + at.down * (across_bottom - across_top))
    return grad_x, weight * (bottom - top), top + at.down * (bottom - top)


@triton.jit
def _store_group(pointers, grad, left, inside):
    """Store [ROWS, COUNT], but not from column `left` (a constant), at pointers [ROWS, 1]."""
    COUNT: tl.constexpr = grad.shape[1]
    k = tl.arange(0, COUNT)[None, :]
    mask = inside[:, None]
    if left < COUNT:
        mask = mask & (k < left)
    tl.store(pointers + k, grad.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _store_logits(pointers, rows, grad_all, inside, sizes):
    """Store the gradients of all logits, from those of the weights [ROWS, slots, GROUP]."""
    P: tl.constexpr = sizes.P
    COUNT: tl.constexpr = sizes.L * P
    PADDED_P: tl.constexpr = (P + sizes.GROUP - 1) // sizes.GROUP * sizes.GROUP
    grad = tl.reshape(grad_all, (grad_all.shape[0], sizes.PADDED_LP))
    column = tl.arange(0, sizes.PADDED_LP)[None, :]
    if PADDED_P == P:
        k = column
        exists = column < COUNT
    else:
        point = column % PADDED_P
        k = column // PADDED_P * P + point
        exists = (point < P) & (column < sizes.L * PADDED_P)
    if sizes.PADDED_LP == COUNT:
        logits = tl.load(rows.weights + k).to(tl.float32)
        mask = inside[:, None]
    else:
        logits = tl.load(rows.weights + k, mask=exists, other=-float("inf")).to(tl.float32)
        mask = inside[:, None] & exists
    weight = weight_of_logit(logits, rows.highest) * rows.scale[:, None]
    mean = tl.sum(weight * grad, 1)
    grad = weight * (grad - mean[:, None])
    tl.store(pointers + k, grad.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _store_reference(pointers, sums, level, inside, sizes):
    """Store the gradients of reference points, from sums of those of x, y, and width, height."""
    width = level.width.to(tl.float32)
    height = level.height.to(tl.float32)
    tl.store(pointers, sums[0] * width, mask=inside)
    tl.store(pointers + 1, sums[1] * height, mask=inside)
    if sizes.R == 4:
        tl.store(pointers + 2, sums[2] * (width * (0.5 / sizes.P)), mask=inside)
        tl.store(pointers + 3, sums[3] * (height * (0.5 / sizes.P)), mask=inside)


@triton.jit(do_not_specialize=["maps", "num_queries"])
def points_kernel(
    grad_output_ptr,  # [B, Q, M, D]
    value,  # Value
    queries,  # Queries
    maps,  # Maps
    gradients,  # Queries
    num_queries,
    sizes: tl.constexpr,  # Sizes
    tile: tl.constexpr,  # Tile
):
    """Gradients of points, weights (or logits) and reference points, without atomics."""
    BLOCK_Q: tl.constexpr = tile.BLOCK_Q
    P: tl.constexpr = sizes.P
    GROUP: tl.constexpr = sizes.GROUP
    group = program_queries(num_queries, maps, sizes, tile)
    rows = load_rows(queries, group, sizes)
    grad_points, grad_weights = point_pointers(gradients, group, sizes)
    grad = load_gradient(grad_output_ptr, group, sizes, tile)
    pointers = value.pointer + group.batch * value.stride_b
    pointers += split_channels(group.head, sizes, tile)
    if sizes.R > 0:
        # Gradients of all weights of a row: a slot per level and group of points.
        slots = tl.arange(0, sizes.PADDED_LP // GROUP)[None, :, None]
        grad_all = tl.zeros((BLOCK_Q, sizes.PADDED_LP // GROUP, GROUP), tl.float32)
    for index in range(sizes.L):
        level = load_level(index, maps, group.batch, sizes)
        reference = load_reference(rows, index, level, sizes)
        zeros = tl.zeros((BLOCK_Q,), tl.float32)
        sum_x, sum_y, sum_width, sum_height = zeros, zeros, zeros, zeros
        for point in tl.static_range(0, P, GROUP):
            samples = load_samples(rows, reference, index, level, point, sizes, True)
            grad_xs = ()
            grad_ys = ()
            grad_ws = ()
            for i in tl.static_range(GROUP):
                grad_x, grad_y, grad_w = _sample_gradients(
                    grad, pointers, value.stride_s, samples, i, level, sizes, tile
                )
                sum_x += grad_x
                sum_y += grad_y
                if sizes.R == 4:
                    sum_width += grad_x * samples.point_x[i]
                    sum_height += grad_y * samples.point_y[i]
                if sizes.R != 2:
                    grad_x *= reference[2]
                    grad_y *= reference[3]
                grad_xs = grad_xs + (grad_x,)
                grad_ys = grad_ys + (grad_y,)
                grad_ws = grad_ws + (grad_w,)
            first = index * P + point
            # Lanes of a row hold equal gradients, and store the same values to shared memory.
            pairs = tl.join(from_columns(grad_xs, GROUP), from_columns(grad_ys, GROUP))
            pairs = tl.reshape(pairs, (BLOCK_Q, 2 * GROUP))
            _store_group(grad_points + first * 2, pairs, (P - point) * 2, group.inside)
            grad_w = from_columns(grad_ws, GROUP)
            if sizes.R > 0:
                slot = index * ((P + GROUP - 1) // GROUP) + point // GROUP
                grad_all = tl.where(slots == slot, grad_w[:, None, :], grad_all)
            else:
                _store_group(grad_weights + first, grad_w, P - point, group.inside)
        if gradients.reference is not None:
            terms = (group.batch * sizes.M + group.head) * num_queries + group.query
            _store_reference(
                gradients.reference + (terms * sizes.L + index) * sizes.R,
                (sum_x, sum_y, sum_width, sum_height),
                level,
                group.inside,
                sizes,
            )
        pointers += (level.height * level.width).to(tl.int64) * value.stride_s
    if sizes.R > 0:
        _store_logits(grad_weights, rows, grad_all, group.inside, sizes)
