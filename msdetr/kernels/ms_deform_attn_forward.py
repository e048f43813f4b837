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

from msdetr.kernels.deform_sampling import (
    channel_mask,
    columns,
    level_sizes,
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
def _zeros(ROWS: tl.constexpr, SPLIT_D: tl.constexpr, SPLITS: tl.constexpr):
    tiles = (tl.zeros((ROWS, SPLIT_D), tl.float32),)
    for _ in tl.static_range(1, SPLITS):
        tiles = tiles + (tl.zeros((ROWS, SPLIT_D), tl.float32),)
    return tiles


@triton.jit
def _add_sample(
    acc,
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
    """`acc` plus `weight` times the bilinear sample at pixel (x, y), all [ROWS]."""
    height, width, valid_height, valid_width = sizes
    x0, y0, right, down = split_pixel(x, y, height, width)
    in_x0 = within(x0, valid_width)
    in_x1 = within(x0 + 1, valid_width)
    in_y0 = within(y0, valid_height)
    in_y1 = within(y0 + 1, valid_height)
    mask00 = (in_x0 & in_y0)[:, None]
    mask01 = (in_x1 & in_y0)[:, None]
    mask10 = (in_x0 & in_y1)[:, None]
    mask11 = (in_x1 & in_y1)[:, None]
    lower = down * weight
    upper = weight - lower
    weight01 = upper * right
    weight00 = (upper - weight01)[:, None]
    weight01 = weight01[:, None]
    weight11 = lower * right
    weight10 = (lower - weight11)[:, None]
    weight11 = weight11[:, None]
    pixel = y0 * width + x0
    if WIDE:
        pixel = pixel.to(tl.int64)
    offset = pixel * stride_s
    pointers00 = level_pointers + offset[:, None]
    pointers01 = pointers00 + stride_s
    pointers10 = level_pointers + (offset + width * stride_s)[:, None]
    pointers11 = pointers10 + stride_s
    result = ()
    for i in tl.static_range(SPLITS):
        at = i * SPLIT_D
        value00 = tl.load(pointers00 + at, mask=channel_mask(mask00, i, D, SPLIT_D), other=0.0)
        value01 = tl.load(pointers01 + at, mask=channel_mask(mask01, i, D, SPLIT_D), other=0.0)
        value10 = tl.load(pointers10 + at, mask=channel_mask(mask10, i, D, SPLIT_D), other=0.0)
        value11 = tl.load(pointers11 + at, mask=channel_mask(mask11, i, D, SPLIT_D), other=0.0)
        # One corner at a time: four fused multiply-adds instead of products and sums.
        tile = acc[i]
        tile += value00.to(tl.float32) * weight00
        tile += value01.to(tl.float32) * weight01
        tile += value10.to(tl.float32) * weight10
        tile += value11.to(tl.float32) * weight11
        result = result + (tile,)
    return result


@triton.jit(do_not_specialize=["levels"])
def forward_kernel(
    value_ptr,  # [B, S, M, D]
    points_ptr,  # offsets or sampling locations: per (image, query) [M, L, P, 2]
    weights_ptr,  # logits or attention weights: per (image, query) [M, L, P]
    reference_ptr,  # [B, Q, L, R] where R > 0
    valid_ptr,  # [B, L, 2] (height, width) where HAS_VALID_SIZES
    output_ptr,  # [B, Q, M, D]
    num_queries,
    stride_vb,
    stride_vs,
    stride_pb,
    stride_pq,
    stride_wb,
    stride_wq,
    levels,
    M: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,  # 0: sampling locations and attention weights are given
    HAS_VALID_SIZES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_X: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_LP: tl.constexpr,
    SPLIT_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Weighted sum of bilinear samples; see `msdetr.ops.ms_deform_attn`."""
    program = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    head = program % M
    query, in_tile = tile_queries(program // M, num_queries, levels, L, BLOCK_Q, TILE_X)
    row = query.to(tl.int64) if WIDE else query
    points = points_ptr + batch * stride_pb + (row * stride_pq + head * (L * P * 2))[:, None]
    weights = weights_ptr + batch * stride_wb + (row * stride_wq + head * (L * P))[:, None]
    reference = reference_ptr + (batch * num_queries + query) * (L * R)
    if R > 0:
        highest, scale = softmax_of_rows(weights, L * P, PADDED_LP)
    channel = tl.arange(0, SPLIT_D)[None, :]
    level_pointers = value_ptr + batch * stride_vb + head * D + channel
    acc = _zeros(BLOCK_Q, SPLIT_D, SPLITS)
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
                ws = weight_of_logit(ws, highest)
            else:
                ws = load_logits(weights + level * P, point, GROUP, P, 0.0)
            ws = columns(ws, BLOCK_Q, GROUP)
            for i in tl.static_range(GROUP):
                x = xs[i] * step_x + x0
                y = ys[i] * step_y + y0
                acc = _add_sample(
                    acc,
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
        level_pointers += (height * width).to(tl.int64) * stride_vs
    output = output_ptr + ((batch * num_queries + query) * (M * D))[:, None] + head * D + channel
    for i in tl.static_range(SPLITS):
        tile = acc[i]
        if R > 0:
            tile = tile * scale[:, None]
        mask = channel_mask(in_tile[:, None], i, D, SPLIT_D)
        tl.store(output + i * SPLIT_D, tile.to(output_ptr.dtype.element_ty), mask=mask)
