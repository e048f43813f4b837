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

from msdetr.kernels.ms_deform_attn.sampling import (
    find_corners,
    load_gradient,
    load_level,
    load_reference,
    load_rows,
    load_samples,
    program_queries,
    split_channels,
    split_mask,
)


@triton.jit
def _add_to_corner(grad, pointers, share, rows, fixed_point, sizes, tile):
    """Add `share` [ROWS] times g to the rows at `pointers` [ROWS, SPLIT_D]."""
    for i in tl.static_range(tile.SPLITS):
        product = grad[i] * share[:, None]
        if fixed_point is not None:
            product = (product * fixed_point).to(tl.int64)
        mask = split_mask(rows, i, sizes, tile)
        # The default semantics would add a fence and invalidate the cache at every sample.
        tl.atomic_add(pointers + i * tile.SPLIT_D, product, mask=mask, sem="relaxed")


@triton.jit
def scatter_sample(grad, pointers, x, y, weight, rows, level, fixed_point, sizes, tile):
    """Add one sample per row, where `rows` [ROWS] is True, to the gradient of `value`.

    `fixed_point` is the number of units per 1, or None to add in float32.
    """
    STRIDE: tl.constexpr = sizes.M * sizes.D
    at = find_corners(x, y, level, STRIDE, sizes)
    in_y0 = at.in_y0 & rows
    in_y1 = at.in_y1 & rows
    lower = at.down * weight
    upper = weight - lower
    right = upper * at.right
    left = upper - right
    row = pointers + at.upper[:, None]
    _add_to_corner(grad, row, left, in_y0 & at.in_x0, fixed_point, sizes, tile)
    _add_to_corner(grad, row + STRIDE, right, in_y0 & at.in_x1, fixed_point, sizes, tile)
    right = lower * at.right
    left = lower - right
    row = pointers + at.lower[:, None]
    _add_to_corner(grad, row, left, in_y1 & at.in_x0, fixed_point, sizes, tile)
    _add_to_corner(grad, row + STRIDE, right, in_y1 & at.in_x1, fixed_point, sizes, tile)


@triton.jit(do_not_specialize=["maps", "num_queries", "num_tokens"])
def value_kernel(
    grad_output_ptr,  # [B, Q, M, D]
    queries,  # Queries
    maps,  # Maps
    grad_value_ptr,  # [B, S, M, D] float32, or int64 with `fixed_point_ptr`; holds zeros
    fixed_point_ptr,  # [] float32, units per 1; None: add in float32
    num_queries,
    num_tokens,
    sizes: tl.constexpr,  # Sizes
    tile: tl.constexpr,  # Tile
):
    """Gradient of `value`: each sample is added separately."""
    group = program_queries(num_queries, maps, sizes, tile)
    rows = load_rows(queries, group, sizes)
    grad = load_gradient(grad_output_ptr, group, sizes, tile)
    fixed_point = None
    if fixed_point_ptr is not None:
        fixed_point = tl.load(fixed_point_ptr)
    pointers = grad_value_ptr + group.batch * num_tokens * (sizes.M * sizes.D)
    pointers += split_channels(group.head, sizes, tile)
    for index in range(sizes.L):
        level = load_level(index, maps, group.batch, sizes)
        reference = load_reference(rows, index, level, sizes)
        for point in tl.static_range(0, sizes.P, sizes.GROUP):
            samples = load_samples(rows, reference, index, level, point, sizes, True)
            for i in tl.static_range(sizes.GROUP):
                if point + i < sizes.P:
                    x = samples.x[i]
                    y = samples.y[i]
                    weight = samples.weight[i]
                    scatter_sample(
                        grad, pointers, x, y, weight, group.inside, level, fixed_point, sizes, tile
                    )
        pointers += (level.height * level.width).to(tl.int64) * (sizes.M * sizes.D)
