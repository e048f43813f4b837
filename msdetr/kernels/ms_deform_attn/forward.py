"""Forward kernel of multi-scale deformable attention.

Maths. The output of a query and head is the sum over levels and points of the weight times the
bilinear sample of `value`, accumulated in float32. Weights are a softmax of logits over levels and
points, whose division is applied once, to the sum.

Mapping. A program serves one tile of queries, one head and one image. Heads vary fastest, so that
programs that run at the same time read neighbouring channels of the same rows of `value`. Images
vary slowest.

Traffic. Points, weights and references are read once, the output is written once. A sample reads
four rows of D channels of `value`, mostly from the caches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from msdetr.kernels.ms_deform_attn.sampling import (
    find_corners,
    load_level,
    load_reference,
    load_rows,
    load_samples,
    output_pointers,
    program_queries,
    split_channels,
    split_mask,
)


@triton.jit
def _zeros(tile):
    splits = ()
    for _ in tl.static_range(tile.SPLITS):
        splits = splits + (tl.zeros((tile.BLOCK_Q, tile.SPLIT_D), tl.float32),)
    return splits


@triton.jit
def _add_sample(acc, pointers, stride_s, samples, i: tl.constexpr, level, sizes, tile):
    """`acc` plus the weight of sample `i` of each row times its bilinear sample of `value`."""
    at = find_corners(samples.x[i], samples.y[i], level, stride_s, sizes)
    lower = at.down * samples.weight[i]
    upper = samples.weight[i] - lower
    weight01 = upper * at.right
    weight00 = (upper - weight01)[:, None]
    weight01 = weight01[:, None]
    weight11 = lower * at.right
    weight10 = (lower - weight11)[:, None]
    weight11 = weight11[:, None]
    pointers00 = pointers + at.upper[:, None]
    pointers10 = pointers + at.lower[:, None]
    result = ()
    for split in tl.static_range(tile.SPLITS):
        mask00 = split_mask(at.in_x0 & at.in_y0, split, sizes, tile)
        mask01 = split_mask(at.in_x1 & at.in_y0, split, sizes, tile)
        mask10 = split_mask(at.in_x0 & at.in_y1, split, sizes, tile)
        mask11 = split_mask(at.in_x1 & at.in_y1, split, sizes, tile)
        first = split * tile.SPLIT_D
        value00 = tl.load(pointers00 + first, mask=mask00, other=0.0)
        value01 = tl.load(pointers00 + stride_s + first, mask=mask01, other=0.0)
        value10 = tl.load(pointers10 + first, mask=mask10, other=0.0)
        value11 = tl.load(pointers10 + stride_s + first, mask=mask11, other=0.0)
        # One corner at a time: four fused multiply-adds instead of products and sums.
        total = acc[split]
        total += value00.to(tl.float32) * weight00
        total += value01.to(tl.float32) * weight01
        total += value10.to(tl.float32) * weight10
        total += value11.to(tl.float32) * weight11
        result = result + (total,)
    return result


@triton.jit(do_not_specialize=["maps", "num_queries"])
def forward_kernel(
    value,  # Value
    queries,  # Queries
    maps,  # Maps
    output_ptr,  # [B, Q, M, D]
    num_queries,
    sizes: tl.constexpr,  # Sizes
    tile: tl.constexpr,  # Tile
):
    """Weighted sum of bilinear samples; see `msdetr.ops.ms_deform_attn`."""
    group = program_queries(num_queries, maps, sizes, tile)
    rows = load_rows(queries, group, sizes)
    channel = split_channels(group.head, sizes, tile)
    pointers = value.pointer + group.batch * value.stride_b + channel
    acc = _zeros(tile)
    for index in range(sizes.L):
        level = load_level(index, maps, group.batch, sizes)
        reference = load_reference(rows, index, level, sizes)
        for point in tl.static_range(0, sizes.P, sizes.GROUP):
            samples = load_samples(rows, reference, index, level, point, sizes, False)
            for i in tl.static_range(sizes.GROUP):
                acc = _add_sample(acc, pointers, value.stride_s, samples, i, level, sizes, tile)
        pointers += (level.height * level.width).to(tl.int64) * value.stride_s
    output = output_pointers(output_ptr, group, channel, sizes)
    for i in tl.static_range(tile.SPLITS):
        total = acc[i]
        if sizes.R > 0:
            total = total * rows.scale[:, None]
        mask = split_mask(group.inside, i, sizes, tile)
        tl.store(output + i * tile.SPLIT_D, total.to(output_ptr.dtype.element_ty), mask=mask)
