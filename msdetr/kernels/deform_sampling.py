"""Device functions that the deformable attention kernels share: the queries of a program, the
positions and weights of samples, and masks.

Tiles. A program serves BLOCK_Q queries of one head. Its D channels are split into SPLITS tiles
[BLOCK_Q, SPLIT_D], held in a tuple. A warp then covers more queries, and fewer threads repeat the
arithmetic on coordinates, which is the same for all threads of a row.

Levels are launch arguments, one 64-bit integer each (height << 32 | width). This needs no table on
the device and no copy; a rolled loop over levels selects a level with a few instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def level_size(level, levels, NUM_LEVELS: tl.constexpr):
    """(height, width) of a level whose index is known only at run time."""
    packed = levels[0]
    for i in tl.static_range(1, NUM_LEVELS):
        packed = tl.where(level == i, levels[i], packed)
    return (packed >> 32).to(tl.int32), packed.to(tl.int32)


@triton.jit
def level_sizes(level, levels, valid_ptr, batch, L: tl.constexpr, HAS_VALID_SIZES: tl.constexpr):
    """(height, width, valid height, valid width) of a level of image `batch`."""
    height, width = level_size(level, levels, L)
    valid_height = height
    valid_width = width
    if HAS_VALID_SIZES:
        pointer = valid_ptr + (batch * L + level) * 2  # [B, L, 2]
        valid_height = tl.load(pointer).to(tl.int32)
        valid_width = tl.load(pointer + 1).to(tl.int32)
    return height, width, valid_height, valid_width


@triton.jit
def tile_queries(
    tile,
    num_queries,
    levels,
    NUM_LEVELS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_X: tl.constexpr,
):
    """Queries of a tile: indices [BLOCK_Q] (a valid index where there is no query), and a mask.

    With TILE_X = 0, a tile is BLOCK_Q consecutive queries. Otherwise queries are the pixels of the
    levels, and a tile is TILE_X pixels wide: neighbours in both directions sample the same rows of
    `value`, which are then in the cache.
    """
    i = tl.arange(0, BLOCK_Q)
    if TILE_X == 0:
        query = tile * BLOCK_Q + i
        inside = query < num_queries
        query = tl.minimum(query, num_queries - 1)
    else:
        TILE_Y: tl.constexpr = BLOCK_Q // TILE_X
        height, width = level_size(0, levels, 1)
        across = tl.cdiv(width, TILE_X)
        local = tile  # index of the tile in its level
        start = tl.zeros((), tl.int32)  # of the level
        next_tile = across * tl.cdiv(height, TILE_Y)
        next_start = height * width
        for level in tl.static_range(1, NUM_LEVELS):
            h = (levels[level] >> 32).to(tl.int32)
            w = levels[level].to(tl.int32)
            reached = tile >= next_tile
            height = tl.where(reached, h, height)
            width = tl.where(reached, w, width)
            local = tl.where(reached, tile - next_tile, local)
            start = tl.where(reached, next_start, start)
            across = tl.where(reached, tl.cdiv(w, TILE_X), across)
            next_tile += tl.cdiv(w, TILE_X) * tl.cdiv(h, TILE_Y)
            next_start += h * w
        y = local // across * TILE_Y + i // TILE_X
        x = local % across * TILE_X + i % TILE_X
        inside = (y < height) & (x < width)
        query = tl.where(inside, start + y * width + x, start)
    return query, inside


@triton.jit
def columns(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The 1, 2 or 4 columns of a tile [ROWS, COLUMNS], each [ROWS]. Needs no shared memory."""
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
def from_columns(tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Inverse of `columns`."""
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
def load_reference(pointers, width, height, ROWS: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    """Reference points in pixels: (x, y) of an offset of zero, and pixels per unit of offset.

    `pointers` [ROWS] to R = 2 coordinates (offsets are in pixels) or R = 4 (cxcywh, offsets are in
    box sides divided by 2 P), as fractions of the map. R = 0: "offsets" are locations, fractions
    of the map. Multiply and add are fused explicitly, because kernels that share out samples by
    position must compute identical bits.
    """
    if R == 0:
        result = (-0.5, -0.5, width, height)
    else:
        row = tl.load(pointers[:, None] + tl.arange(0, R)[None, :]).to(tl.float32)
        if R == 2:
            x, y = tl.split(row)
            step_x = tl.full((ROWS,), 1.0, tl.float32)
            step_y = step_x
        else:
            x, y, box_width, box_height = columns(row, ROWS, 4)
            step_x = box_width * (width * (0.5 / P))
            step_y = box_height * (height * (0.5 / P))
        result = (tl.fma(x, width, -0.5), tl.fma(y, height, -0.5), step_x, step_y)
    return result


@triton.jit
def load_points(pointers, point, ROWS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr):
    """x and y of GROUP points starting at `point`, each a tuple of [ROWS]; 0 beyond P.

    `pointers` [ROWS, 1] to the coordinates of point 0.
    """
    k = tl.arange(0, 2 * GROUP)[None, :]
    if point + GROUP <= P:
        pairs = tl.load(pointers + point * 2 + k)
    else:
        pairs = tl.load(pointers + point * 2 + k, mask=point * 2 + k < P * 2, other=0.0)
    x, y = tl.split(tl.reshape(pairs.to(tl.float32), (ROWS, GROUP, 2)))
    return columns(x, ROWS, GROUP), columns(y, ROWS, GROUP)


@triton.jit
def load_logits(pointers, point, GROUP: tl.constexpr, P: tl.constexpr, OTHER: tl.constexpr):
    """[ROWS, GROUP] attention weights or logits starting at `point`; OTHER beyond P.

    `pointers` [ROWS, 1] to the weights of point 0.
    """
    k = tl.arange(0, GROUP)[None, :]
    if point + GROUP <= P:
        loaded = tl.load(pointers + point + k)
    else:
        loaded = tl.load(pointers + point + k, mask=point + k < P, other=OTHER)
    return loaded.to(tl.float32)


@triton.jit
def softmax_of_rows(pointers, COUNT: tl.constexpr, PADDED: tl.constexpr):
    """Maximum and 1 / sum of exp2, each [ROWS], of COUNT logits multiplied by log2(e)."""
    k = tl.arange(0, PADDED)[None, :]
    if PADDED == COUNT:
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
def clamp_position(x, size):
    """`x` in pixels, between -2 and `size` + 1; NaN becomes -2."""
    # Not `tl.maximum`, whose result for NaN depends on the hardware.
    return tl.minimum(tl.where(x > -2.0, x, -2.0), size + 1.0)


@triton.jit
def split_pixel(x, y, height, width):
    """Pixel at the upper left of a position in pixels, and the fractions to the right and down.

    Positions that are far outside, infinite or NaN are moved just outside: integers remain in
    range, fractions remain finite, and none of their pixels is within the map.
    """
    x = clamp_position(x, width.to(tl.float32))
    y = clamp_position(y, height.to(tl.float32))
    left = tl.floor(x)
    top = tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top


@triton.jit
def within(index, size):
    """0 <= index < size, with one comparison."""
    return index.to(tl.uint32, bitcast=True) < size.to(tl.uint32)


@triton.jit
def channel_mask(rows, split, D: tl.constexpr, SPLIT_D: tl.constexpr):
    """[ROWS, SPLIT_D or 1] mask of rows [ROWS, 1] and of the valid channels of a split."""
    if split * SPLIT_D + SPLIT_D > D:
        mask = rows & ((split * SPLIT_D + tl.arange(0, SPLIT_D)) < D)[None, :]
    else:
        mask = rows
    return mask


@triton.jit
def load_gradient(
    grad_output_ptr,
    row,
    channel,
    in_tile,
    D: tl.constexpr,
    SPLIT_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Gradient of the output, as float32 tiles; 0 where there is no query or channel."""
    pointers = grad_output_ptr + row[:, None] + channel
    rows = in_tile[:, None]
    tiles = ()
    for i in tl.static_range(SPLITS):
        mask = channel_mask(rows, i, D, SPLIT_D)
        tile = tl.load(pointers + i * SPLIT_D, mask=mask, other=0.0).to(tl.float32)
        tiles = tiles + (tile,)
    return tiles
