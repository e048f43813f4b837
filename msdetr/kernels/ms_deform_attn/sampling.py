"""Bundles of arguments, and device functions that the kernels share: the queries of a program, the
positions and weights of their samples, the corners of a sample, and masks.

Tiles. A program serves BLOCK_Q queries of one head. Its D channels are split into SPLITS tiles
[BLOCK_Q, SPLIT_D], held in a tuple. A warp then covers more queries, and fewer threads repeat the
arithmetic on coordinates, which is the same for all threads of a row.

Levels are launch arguments, one 64-bit integer each (height << 32 | width). This needs no table on
the device and no copy; a rolled loop over levels selects a level with a few instructions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Sizes(NamedTuple):
    """Sizes of a call. In a launch, the fields are compile-time constants."""

    M: int  # heads
    D: int  # channels of a head
    L: int  # levels
    P: int  # points of a level
    R: int  # coordinates of a reference point; 0: points are locations, and weights are given
    WIDE: bool  # offsets within a level, or within the queries of an image, need 64 bits
    GROUP: int  # points that are loaded and stored together
    PADDED_LP: int  # length of a row of all weights, with points padded to whole groups


class Tile(NamedTuple):
    """What a program of a direct kernel takes; compile-time constants."""

    BLOCK_Q: int  # queries
    TILE_X: int  # width of a tile of pixels, if queries are pixels; 0: consecutive queries
    SPLIT_D: int  # channels of a split
    SPLITS: int  # splits of D


class Value(NamedTuple):
    """`value` or its gradient, [B, S, M, D]; heads and channels are contiguous."""

    pointer: Any
    stride_b: Any
    stride_s: Any


class Queries(NamedTuple):
    """Points and weights of queries, or their gradients; the last dimension is contiguous."""

    points: Any  # [B, Q, M * L * P * 2]: offsets, or locations
    weights: Any  # [B, Q, M * L * P]: logits, or attention weights
    # [B, Q, L, R], contiguous, or None where R = 0. The gradient has a term per head,
    # [B, M, Q, L, R] float32, and is None where it is not needed.
    reference: Any
    points_b: Any  # strides of images and queries
    points_q: Any
    weights_b: Any
    weights_q: Any


class Maps(NamedTuple):
    """The feature maps. Launches do not specialise on them: image sizes share compiled code."""

    levels: Any  # height << 32 | width of each
    valid_sizes: Any  # [B, L, 2] (height, width), contiguous; None: every pixel is valid


class Level(NamedTuple):
    """Sizes of a level in pixels."""

    height: Any
    width: Any
    valid_height: Any
    valid_width: Any


class Group(NamedTuple):
    """Queries of one head and image. A row is one of them."""

    batch: Any
    num_queries: Any  # Q
    head: Any
    query: Any  # [ROWS], 64-bit if WIDE; a valid index where there is no query
    inside: Any  # [ROWS] mask of queries that exist


class Rows(NamedTuple):
    """Inputs of a group. The last three need R > 0."""

    points: Any  # [ROWS, 1] pointers to the first point
    weights: Any  # [ROWS, 1] pointers to the first weight
    reference: Any  # [ROWS] pointers to the reference point of level 0
    highest: Any  # [ROWS] maximum of the logits, multiplied by log2(e)
    scale: Any  # [ROWS] 1 / sum over the row of exp2(logit * log2(e) - highest)


class Samples(NamedTuple):
    """The samples of GROUP points of each row. A field is a tuple, by point, of [ROWS]."""

    x: Any  # pixels, clamped just outside of the map
    y: Any
    weight: Any
    point_x: Any  # offset or location, as given
    point_y: Any


class Corners(NamedTuple):
    """The four pixels around a position, each field [ROWS]."""

    upper: Any  # offset of the upper left pixel in elements
    lower: Any  # offset of the lower left pixel
    in_x0: Any  # whether the left pixels are within the valid width
    in_x1: Any
    in_y0: Any
    in_y1: Any
    right: Any  # fractions to the right of and below the upper left pixel
    down: Any


@triton.jit
def unpack_size(packed):
    """(height, width) of a packed level."""
    return (packed >> 32).to(tl.int32), packed.to(tl.int32)


@triton.jit
def level_size(index, maps, sizes):
    """(height, width) of a level whose index is known only at run time."""
    packed = maps.levels[0]
    for i in tl.static_range(1, sizes.L):
        packed = tl.where(index == i, maps.levels[i], packed)
    return unpack_size(packed)


@triton.jit
def load_level(index, maps, batch, sizes):
    """The level with an index that is known only at run time, for image `batch`."""
    height, width = level_size(index, maps, sizes)
    valid_height = height
    valid_width = width
    if maps.valid_sizes is not None:
        pointer = maps.valid_sizes + (batch * sizes.L + index) * 2
        valid_height = tl.load(pointer).to(tl.int32)
        valid_width = tl.load(pointer + 1).to(tl.int32)
    return Level(height, width, valid_height, valid_width)


@triton.jit
def locate_program(sizes):
    """Image, place in the image, and head of this program: heads vary fastest, images slowest."""
    program = tl.program_id(0)
    return tl.program_id(1).to(tl.int64), program // sizes.M, program % sizes.M


@triton.jit
def program_queries(num_queries, maps, sizes, tile):
    """The group of queries that this program of a direct kernel serves."""
    batch, index, head = locate_program(sizes)
    query, inside = _tile_queries(index, num_queries, maps, sizes, tile)
    return Group(batch, num_queries, head, query, inside)


@triton.jit
def _tile_queries(index, num_queries, maps, sizes, tile):
    """Queries of a tile: indices [BLOCK_Q] (a valid index where there is no query), and a mask.

    With TILE_X = 0, a tile is BLOCK_Q consecutive queries. Otherwise queries are the pixels of the
    levels, and a tile is TILE_X pixels wide: neighbours in both directions sample the same rows of
    `value`, which are then in the cache.
    """
    i = tl.arange(0, tile.BLOCK_Q)
    if tile.TILE_X == 0:
        query = index * tile.BLOCK_Q + i
        inside = query < num_queries
        query = tl.minimum(query, num_queries - 1)
    else:
        TILE_X: tl.constexpr = tile.TILE_X
        TILE_Y: tl.constexpr = tile.BLOCK_Q // tile.TILE_X
        height, width = unpack_size(maps.levels[0])
        across = tl.cdiv(width, TILE_X)
        local = index  # of the tile in its level
        start = tl.zeros((), tl.int32)  # of the level
        next_tile = across * tl.cdiv(height, TILE_Y)
        next_start = height * width
        for level in tl.static_range(1, sizes.L):
            h, w = unpack_size(maps.levels[level])
            reached = index >= next_tile
            height = tl.where(reached, h, height)
            width = tl.where(reached, w, width)
            local = tl.where(reached, index - next_tile, local)
            start = tl.where(reached, next_start, start)
            across = tl.where(reached, tl.cdiv(w, TILE_X), across)
            next_tile += tl.cdiv(w, TILE_X) * tl.cdiv(h, TILE_Y)
            next_start += h * w
        y = local // across * TILE_Y + i // TILE_X
        x = local % across * TILE_X + i % TILE_X
        inside = (y < height) & (x < width)
        query = tl.where(inside, start + y * width + x, start)
    if sizes.WIDE:
        query = query.to(tl.int64)
    return query, inside


@triton.jit
def point_pointers(queries, group, sizes):
    """Pointers [ROWS, 1] to the first point and the first weight of rows."""
    LP: tl.constexpr = sizes.L * sizes.P
    points = queries.points + group.batch * queries.points_b
    weights = queries.weights + group.batch * queries.weights_b
    points += (group.query * queries.points_q + group.head * (2 * LP))[:, None]
    weights += (group.query * queries.weights_q + group.head * LP)[:, None]
    return points, weights


@triton.jit
def load_rows(queries, group, sizes):
    """The inputs of a group; reads its logits."""
    points, weights = point_pointers(queries, group, sizes)
    reference = 0
    highest = 0.0
    scale = 1.0
    if sizes.R > 0:
        reference = queries.reference + group.batch * group.num_queries * (sizes.L * sizes.R)
        reference += group.query * (sizes.L * sizes.R)
        highest, scale = _softmax_of_rows(weights, sizes)
    return Rows(points, weights, reference, highest, scale)


@triton.jit
def _softmax_of_rows(pointers, sizes):
    """Maximum and 1 / sum of exp2, each [ROWS], of logits multiplied by log2(e)."""
    COUNT: tl.constexpr = sizes.L * sizes.P
    k = tl.arange(0, sizes.PADDED_LP)[None, :]
    if sizes.PADDED_LP == COUNT:
        logits = tl.load(pointers + k).to(tl.float32)
    else:
        logits = tl.load(pointers + k, mask=k < COUNT, other=-float("inf")).to(tl.float32)
    logits *= 1.4426950408889634
    highest = tl.max(logits, 1)
    return highest, 1.0 / tl.sum(tl.exp2(logits - highest[:, None]), 1)


@triton.jit
def weight_of_logit(logits, highest):
    """exp2 of logits [ROWS, N] multiplied by log2(e), minus the row's maximum [ROWS]."""
    return tl.exp2(logits * 1.4426950408889634 - highest[:, None])


@triton.jit
def load_reference(rows, index, level, sizes):
    """Reference points of a level in pixels: (x, y) of an offset of zero, and pixels per unit of
    offset, each [ROWS].

    With R = 2 coordinates, offsets are in pixels. With R = 4 (cxcywh), they are in box sides
    divided by 2 P. Coordinates are fractions of the map, and so are locations (R = 0).
    """
    ROWS: tl.constexpr = rows.points.shape[0]
    width = level.width.to(tl.float32)
    height = level.height.to(tl.float32)
    if sizes.R == 0:
        x = tl.full((ROWS,), -0.5, tl.float32)
        y = x
        step_x = tl.zeros((ROWS,), tl.float32) + width
        step_y = tl.zeros((ROWS,), tl.float32) + height
    else:
        pointers = rows.reference + index * sizes.R
        row = tl.load(pointers[:, None] + tl.arange(0, sizes.R)[None, :]).to(tl.float32)
        if sizes.R == 2:
            x, y = tl.split(row)
            step_x = tl.full((ROWS,), 1.0, tl.float32)
            step_y = step_x
        else:
            x, y, box_width, box_height = columns(row)
            step_x = box_width * (width * (0.5 / sizes.P))
            step_y = box_height * (height * (0.5 / sizes.P))
        x = tl.fma(x, width, -0.5)
        y = tl.fma(y, height, -0.5)
    return x, y, step_x, step_y


@triton.jit
def load_samples(rows, reference, index, level, point, sizes, SCALED: tl.constexpr):
    """The samples of GROUP points of a level, from `point`; weights beyond P are 0.

    `reference` is the result of `load_reference`. Weights of a softmax are multiplied by the row's
    scale if SCALED. Multiply and add are fused explicitly, because kernels that share out samples
    by position must compute identical bits.
    """
    GROUP: tl.constexpr = sizes.GROUP
    x0, y0, step_x, step_y = reference
    first = index * sizes.P + point
    pairs = _load_group(rows.points + first * 2, (sizes.P - point) * 2, 2 * GROUP, 0.0)
    x, y = tl.split(tl.reshape(pairs, (pairs.shape[0], GROUP, 2)))
    if sizes.R > 0:
        logits = _load_group(rows.weights + first, sizes.P - point, GROUP, -float("inf"))
        weights = weight_of_logit(logits, rows.highest)
        if SCALED:
            weights *= rows.scale[:, None]
    else:
        weights = _load_group(rows.weights + first, sizes.P - point, GROUP, 0.0)
    point_x = columns(x)
    point_y = columns(y)
    xs = ()
    ys = ()
    for i in tl.static_range(GROUP):
        xs = xs + (_clamp_position(tl.fma(point_x[i], step_x, x0), level.width),)
        ys = ys + (_clamp_position(tl.fma(point_y[i], step_y, y0), level.height),)
    return Samples(xs, ys, columns(weights), point_x, point_y)


@triton.jit
def _load_group(pointers, left, COUNT: tl.constexpr, OTHER: tl.constexpr):
    """[ROWS, COUNT] float32 from pointers [ROWS, 1]; OTHER from column `left`, a constant."""
    k = tl.arange(0, COUNT)[None, :]
    if left >= COUNT:
        loaded = tl.load(pointers + k)
    else:
        loaded = tl.load(pointers + k, mask=k < left, other=OTHER)
    return loaded.to(tl.float32)


@triton.jit
def _clamp_position(x, size):
    """`x` in pixels, between -2 and `size` + 1; NaN becomes -2.

    Positions that are far outside, infinite or NaN are moved just outside: integers remain in
    range, fractions remain finite, and none of their pixels is within the map.
    """
    # Not `tl.maximum`, whose result for NaN depends on the hardware.
    return tl.minimum(tl.where(x > -2.0, x, -2.0), size.to(tl.float32) + 1.0)


@triton.jit
def find_corners(x, y, level, stride_s, sizes):
    """The corners of clamped positions in pixels, in a map with `stride_s` elements per pixel."""
    left = tl.floor(x)
    top = tl.floor(y)
    x0 = left.to(tl.int32)
    y0 = top.to(tl.int32)
    width = level.width
    pixel = y0 * width + x0
    if sizes.WIDE:
        pixel = pixel.to(tl.int64)
        width = width.to(tl.int64)
    upper = pixel * stride_s
    return Corners(
        upper,
        upper + width * stride_s,
        within(x0, level.valid_width),
        within(x0 + 1, level.valid_width),
        within(y0, level.valid_height),
        within(y0 + 1, level.valid_height),
        x - left,
        y - top,
    )


@triton.jit
def columns(tile):
    """The 1, 2 or 4 columns of a tile [ROWS, COLUMNS], each [ROWS]. Needs no shared memory."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    if COLUMNS == 1:
        result = (tl.reshape(tile, (ROWS,)),)
    elif COLUMNS == 2:
        result = tl.split(tile)
    else:
        even, odd = tl.split(tl.reshape(tile, (ROWS, 2, 2)))
        column0, column2 = tl.split(even)
        column1, column3 = tl.split(odd)
        result = (column0, column1, column2, column3)
    return result


@triton.jit
def from_columns(tiles, COLUMNS: tl.constexpr):
    """Inverse of `columns`."""
    ROWS: tl.constexpr = tiles[0].shape[0]
    if COLUMNS == 1:
        result = tl.reshape(tiles[0], (ROWS, 1))
    elif COLUMNS == 2:
        result = tl.join(tiles[0], tiles[1])
    else:
        even = tl.join(tiles[0], tiles[2])
        odd = tl.join(tiles[1], tiles[3])
        result = tl.reshape(tl.join(even, odd), (ROWS, 4))
    return result


@triton.jit
def within(index, size):
    """0 <= index < size, with one comparison."""
    return index.to(tl.uint32, bitcast=True) < size.to(tl.uint32)


@triton.jit
def split_mask(rows, split, sizes, tile):
    """[ROWS, SPLIT_D or 1] mask of rows [ROWS] and of the valid channels of a split."""
    SPLIT_D: tl.constexpr = tile.SPLIT_D
    mask = rows[:, None]
    if split * SPLIT_D + SPLIT_D > sizes.D:
        mask = mask & ((split * SPLIT_D + tl.arange(0, SPLIT_D)) < sizes.D)[None, :]
    return mask


@triton.jit
def output_pointers(output_ptr, group, channel, sizes):
    """Pointers [ROWS, channels] to rows of the output, or of its gradient; `channel` [1, channels]
    among those of all heads."""
    STRIDE: tl.constexpr = sizes.M * sizes.D
    image = output_ptr + group.batch * group.num_queries * STRIDE
    return image + (group.query * STRIDE)[:, None] + channel


@triton.jit
def split_channels(head, sizes, tile):
    """Channels [1, SPLIT_D] of the first split of a head, among those of all heads."""
    return head * sizes.D + tl.arange(0, tile.SPLIT_D)[None, :]


@triton.jit
def load_gradient(grad_output_ptr, group, sizes, tile):
    """Gradient of the output, as float32 splits; 0 where there is no query or channel."""
    channel = split_channels(group.head, sizes, tile)
    pointers = output_pointers(grad_output_ptr, group, channel, sizes)
    tiles = ()
    for i in tl.static_range(tile.SPLITS):
        mask = split_mask(group.inside, i, sizes, tile)
        split = tl.load(pointers + i * tile.SPLIT_D, mask=mask, other=0.0).to(tl.float32)
        tiles = tiles + (split,)
    return tiles
