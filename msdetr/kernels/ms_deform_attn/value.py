"""Backward kernel of multi-scale deformable attention for `value`, for queries of any kind.

Maths. Locations and weights are recomputed from the inputs. The gradient of `value` at a pixel is
the sum over samples of the weight times the bilinear weight of the pixel times g, the gradient of
the output. The order of the additions, and so the rounding of the result, varies between runs.

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
def _add_to_corner(grad, pointers, share, rows, sizes, tile):
    """Add `share` [ROWS] times g to the rows at `pointers` [ROWS, SPLIT_D]."""
    for i in tl.static_range(tile.SPLITS):
        product = grad[i] * share[:, None]
        mask = split_mask(rows, i, sizes, tile)
        # The default semantics would add a fence and invalidate the cache at every sample.
        tl.atomic_add(pointers + i * tile.SPLIT_D, product, mask=mask, sem="relaxed")


@triton.jit
def scatter_sample(grad, pointers, samples, i: tl.constexpr, rows, level, sizes, tile):
    """Add sample `i` of each row, where `rows` [ROWS] is True, to the gradient of `value`."""
    STRIDE: tl.constexpr = sizes.M * sizes.D
    at = find_corners(samples.x[i], samples.y[i], level, STRIDE, sizes)
    lower = at.down * samples.weight[i]
    upper = samples.weight[i] - lower
    for row in tl.static_range(2):
        if row == 0:
            share, inside, offset = upper, at.in_y0 & rows, at.upper
        else:
            share, inside, offset = lower, at.in_y1 & rows, at.lower
        corner = pointers + offset[:, None]
        right = share * at.right
        _add_to_corner(grad, corner, share - right, inside & at.in_x0, sizes, tile)
        _add_to_corner(grad, corner + STRIDE, right, inside & at.in_x1, sizes, tile)


@triton.jit(do_not_specialize=["maps", "num_queries", "num_tokens"])
def value_kernel(
    grad_output_ptr,  # [B, Q, M, D]
    queries,  # Queries
    maps,  # Maps
    grad_value_ptr,  # [B, S, M, D] float32; holds zeros
    num_queries,
    num_tokens,
    sizes: tl.constexpr,  # Sizes
    tile: tl.constexpr,  # Tile
):
    """Gradient of `value`: each sample is added separately."""
    group = program_queries(num_queries, maps, sizes, tile)
    rows = load_rows(queries, group, sizes)
    grad = load_gradient(grad_output_ptr, group, sizes, tile)
    pointers = grad_value_ptr + group.batch * num_tokens * (sizes.M * sizes.D)
    pointers += split_channels(group.head, sizes, tile)
    for index in range(sizes.L):
        level = load_level(index, maps, group.batch, sizes)
        reference = load_reference(rows, index, level, sizes)
        for point in tl.static_range(0, sizes.P, sizes.GROUP):
            samples = load_samples(rows, reference, index, level, point, sizes, True)
            for i in tl.static_range(sizes.GROUP):
                if point + i < sizes.P:
                    scatter_sample(grad, pointers, samples, i, group.inside, level, sizes, tile)
        pointers += (level.height * level.width).to(tl.int64) * (sizes.M * sizes.D)
