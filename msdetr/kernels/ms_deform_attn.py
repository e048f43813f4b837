"""Launchers of the multi-scale deformable attention kernels.

Both public ops use the same kernels. They differ in the points and weights of a query (R):

    R = 0     sampling locations [B, Q, M, L, P, 2] and attention weights [B, Q, M, L, P]
    R = 2, 4  offsets and logits, both slices of one projection, with reference points [B, Q, L, R]

Forward is one kernel. Backward is one kernel for points, weights and reference points, and one for
`value`: window sums if the queries are the pixels of the levels, otherwise a plain reduction. Every
kernel recomputes locations and weights, so only the inputs are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from msdetr.kernels.deform_cells import CELL
from msdetr.kernels.ms_deform_attn_configs import (
    DirectConfig,
    Kernel,
    WindowConfig,
    tile_config,
    value_config,
)
from msdetr.kernels.ms_deform_attn_forward import forward_kernel
from msdetr.kernels.ms_deform_attn_points import points_kernel
from msdetr.kernels.ms_deform_attn_splat import rest_kernel, splat_kernel
from msdetr.kernels.ms_deform_attn_value import value_kernel
from msdetr.structures import SpatialShapes

_MAX_GRID_Y = 65535  # images per launch


class Points(NamedTuple):
    """Points and weights of queries: the arguments of an op in the layout of the kernels.

    `points` is [B, Q, M * L * P * 2] and `weights` [B, Q, M * L * P], each contiguous in its last
    dimension. `reference` is [B, Q, L, R] and contiguous; if it is None, points are locations.
    """

    points: Tensor
    weights: Tensor
    reference: Tensor | None
    num_points: int

    @property
    def reference_dim(self) -> int:
        """R of the module's docstring."""
        return 0 if self.reference is None else self.reference.shape[-1]

    def strides(self) -> tuple[int, ...]:
        """Strides of images and queries, of points and of weights."""
        return (*self.points.stride()[:2], *self.weights.stride()[:2])


class Sizes(NamedTuple):
    """Compile-time constants of a call."""

    M: int
    D: int
    L: int
    P: int
    R: int
    HAS_VALID_SIZES: bool


@functools.lru_cache(maxsize=1024)
def pack_levels(spatial_shapes: SpatialShapes) -> tuple[int, ...]:
    """height << 32 | width of each level."""
    return tuple(height << 32 | width for height, width in spatial_shapes)


@functools.lru_cache(maxsize=1024)
def count_tiles(spatial_shapes: SpatialShapes, num_queries: int, block_q: int, tile_x: int) -> int:
    """Programs per head and image: rows of queries, or rectangles of pixels if tile_x > 0."""
    if tile_x == 0:
        return int(triton.cdiv(num_queries, block_q))
    tile_y = block_q // tile_x
    return sum(triton.cdiv(h, tile_y) * triton.cdiv(w, tile_x) for h, w in spatial_shapes)


@functools.lru_cache(maxsize=1024)
def count_cells(spatial_shapes: SpatialShapes) -> tuple[int, int]:
    """(down, across): number of cells that cover every pixel of every level."""
    sides = [max(CELL >> level, 1) for level in range(len(spatial_shapes))]
    return (
        max(triton.cdiv(h, side) for (h, _), side in zip(spatial_shapes, sides, strict=True)),
        max(triton.cdiv(w, side) for (_, w), side in zip(spatial_shapes, sides, strict=True)),
    )


def needs_wide_offsets(spatial_shapes: SpatialShapes, num_queries: int, *strides: int) -> bool:
    """Whether an offset within one level, or within the queries of an image, can exceed 2^31 - 1.

    Offsets of images and levels are always 64-bit. `strides` are elements per token or query.
    Includes corners outside of the map, whose offsets are computed but not used.
    """
    rows = max((height + 3) * (width + 3) for height, width in spatial_shapes)
    return max(rows, num_queries) * max(strides) >= 2**31


class Plan(NamedTuple):
    """Launch of a direct kernel. Depends only on sizes, and is cached."""

    programs: int
    """Per image."""
    constants: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def plan_direct(
    kernel: Kernel,
    dtype: torch.dtype,
    spatial_shapes: SpatialShapes,
    batch: int,
    queries: int,
    sizes: Sizes,
    wide: bool,
    need_reference: bool = False,
) -> Plan:
    """Number of programs and compile-time constants of a direct kernel."""
    is_grid = queries == sum(height * width for height, width in spatial_shapes)
    config = tile_config(
        kernel,
        dtype,
        sizes.D,
        batch * sizes.M * queries,
        is_grid=is_grid,
        need_reference=need_reference,
    )
    programs = sizes.M * count_tiles(spatial_shapes, queries, config.block_q, config.tile_x)
    return Plan(programs, {**sizes._asdict(), "WIDE": wide, **tile_constants(config, sizes)})


def forward(
    value: Tensor, spatial_shapes: SpatialShapes, points: Points, valid_sizes: Tensor | None
) -> Tensor:
    """[B, Q, M * D] from value [B, S, M, D], whose heads and channels are contiguous."""
    batch, _, heads, head_dim = value.shape
    queries = points.points.shape[1]
    output = value.new_empty(batch, queries, heads * head_dim)
    if not output.numel():
        return output
    programs, constants = plan_direct(
        "forward",
        value.dtype,
        spatial_shapes,
        batch,
        queries,
        _sizes(value, spatial_shapes, points, valid_sizes),
        _is_wide(value, spatial_shapes, points),
    )
    tensors = (value, points.points, points.weights, points.reference, valid_sizes, output)
    for chunk in _launches(batch, tensors):
        forward_kernel[(programs, len(chunk[0]))](
            *chunk,
            queries,
            value.stride(0),
            value.stride(1),
            *points.strides(),
            pack_levels(spatial_shapes),
            **constants,
        )
    return output


def backward_points(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: SpatialShapes,
    points: Points,
    valid_sizes: Tensor | None,
    grad_points: Tensor,
    grad_weights: Tensor,
    *,
    need_reference: bool,
) -> Tensor | None:
    """Write the gradients of points and weights; return that of reference points if needed.

    `grad_points` and `grad_weights` have the shapes of `points`; `grad_output` is contiguous.
    """
    batch, _, heads, _ = value.shape
    queries = points.points.shape[1]
    sizes = _sizes(value, spatial_shapes, points, valid_sizes)
    grad_reference = None
    if need_reference:
        # A term per head. Images are the first dimension, so that launches can split them.
        shape = (batch, heads, queries, sizes.L, sizes.R)
        grad_reference = value.new_empty(shape, dtype=torch.float32)
    if grad_points.numel():
        programs, constants = plan_direct(
            "points",
            value.dtype,
            spatial_shapes,
            batch,
            queries,
            sizes,
            _is_wide(value, spatial_shapes, points),
            need_reference,
        )
        tensors = (
            grad_output,
            value,
            points.points,
            points.weights,
            points.reference,
            valid_sizes,
            grad_points,
            grad_weights,
            grad_reference,
        )
        for chunk in _launches(batch, tensors):
            points_kernel[(programs, len(chunk[0]))](
                *chunk,
                queries,
                value.stride(0),
                value.stride(1),
                *points.strides(),
                *grad_points.stride()[:2],
                *grad_weights.stride()[:2],
                pack_levels(spatial_shapes),
                **constants,
                NEED_REFERENCE=need_reference,
            )
    return None if grad_reference is None else grad_reference.sum(1)


def backward_value(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: SpatialShapes,
    points: Points,
    valid_sizes: Tensor | None,
    *,
    deterministic: bool,
) -> Tensor:
    """The gradient of `value`, contiguous and in its type; `grad_output` is contiguous."""
    batch, tokens, heads, head_dim = value.shape
    queries = points.points.shape[1]
    if not grad_output.numel():
        return torch.zeros_like(value, memory_format=torch.contiguous_format)
    sizes = _sizes(value, spatial_shapes, points, valid_sizes)
    wide = _is_wide(value, spatial_shapes, points)
    total = torch.zeros(
        value.shape,
        dtype=torch.int64 if deterministic else torch.float32,
        device=value.device,
    )
    tensors = (grad_output, points.points, points.weights, points.reference, valid_sizes, total)
    windows = value_config(
        value.dtype,
        head_dim,
        batch * heads * queries,
        num_points=sizes.P,
        is_grid=queries == tokens,
        can_window=sizes.R > 0 and not wide and not deterministic,
    )
    if isinstance(windows, WindowConfig):
        for chunk in _launches(batch, tensors):
            _add_windows(windows, chunk, points.strides(), spatial_shapes, sizes, queries)
        return total.to(value.dtype)

    programs, constants = plan_direct(
        "value", value.dtype, spatial_shapes, batch, queries, sizes, wide
    )
    scale = _fixed_point_scale(grad_output, points) if deterministic else None
    for chunk in _launches(batch, tensors):
        value_kernel[(programs, len(chunk[0]))](
            *chunk,
            grad_output if scale is None else scale,
            queries,
            tokens,
            *points.strides(),
            pack_levels(spatial_shapes),
            **constants,
            FIXED_POINT=deterministic,
        )
    if scale is None:
        return total.to(value.dtype)
    # A gradient that is not finite cannot be represented: its scale makes the whole result NaN.
    return (total.to(torch.float64) / scale + scale * 0.0).to(value.dtype)


def _add_windows(
    config: WindowConfig,
    arguments: tuple[Tensor, ...],
    strides: tuple[int, ...],
    spatial_shapes: SpatialShapes,
    sizes: Sizes,
    queries: int,
) -> None:
    down, across = count_cells(spatial_shapes)
    images = arguments[0].shape[0]
    grid = (down * across * sizes.M, images)
    windows = arguments[0].new_empty((*grid[::-1], sizes.L, 3), dtype=torch.float32)
    common: dict[str, Any] = {
        **sizes._asdict(),
        "GROUP": point_group(sizes.P),
        "PADDED_LP": padded_samples(sizes),
        "SIDE": config.side,
        "COARSE_SIDE": config.coarse_side,
    }
    scalars = (queries, *strides, across, pack_levels(spatial_shapes))
    splat_kernel[grid](
        *arguments,
        windows,
        *scalars,
        **common,
        PADDED_D=max(triton.next_power_of_2(sizes.D), 16),
        BLOCK_Y=config.block_y,
        INTERPRET=is_interpreted(),
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    rest_kernel[grid](
        *arguments,
        windows,
        *scalars,
        **common,
        SPLIT_D=config.rest.split_d,
        SPLITS=triton.cdiv(triton.next_power_of_2(sizes.D), config.rest.split_d),
        num_warps=config.rest.num_warps,
        enable_fp_fusion=True,
    )


def _fixed_point_scale(grad_output: Tensor, points: Points) -> Tensor:
    """[] float32, a power of two: units per 1, such that no int64 sum can overflow.

    The gradient of a pixel is at most (sum of weights of a query) x Q x max |g|. The weights of a
    softmax sum to 1.
    """
    bound = grad_output.abs().amax().to(torch.float64)
    terms = points.points.shape[1]
    if points.reference is None:
        bound = bound * points.weights.abs().amax().to(torch.float64)
        terms *= points.weights.shape[2]
    exponent = torch.frexp(bound * terms).exponent
    # Within the range of float32; it could not hold results below 2^-126 anyway.
    scale = torch.exp2((62 - exponent).clamp(-120, 120).to(torch.float64))
    return (scale + bound * 0.0).to(torch.float32)  # NaN if g is not finite


def point_group(num_points: int) -> int:
    """Number of points that are loaded and stored together."""
    return int(min(triton.next_power_of_2(num_points), 4))


def padded_samples(sizes: Sizes) -> int:
    """Length of a row of all L * P weights, with points padded to whole groups."""
    group = point_group(sizes.P)
    return int(triton.next_power_of_2(sizes.L * triton.cdiv(sizes.P, group) * group))


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def tile_constants(config: DirectConfig, sizes: Sizes) -> dict[str, Any]:
    """Constants of a direct kernel that follow from its configuration."""
    return {
        "BLOCK_Q": config.block_q,
        "TILE_X": config.tile_x,
        "GROUP": point_group(sizes.P),
        "PADDED_LP": padded_samples(sizes),
        "SPLIT_D": config.split_d,
        "SPLITS": triton.cdiv(triton.next_power_of_2(sizes.D), config.split_d),
        "num_warps": config.num_warps,
        "enable_fp_fusion": True,
    }


def _sizes(
    value: Tensor, spatial_shapes: SpatialShapes, points: Points, valid_sizes: Tensor | None
) -> Sizes:
    return Sizes(
        M=value.shape[2],
        D=value.shape[3],
        L=len(spatial_shapes),
        P=points.num_points,
        R=points.reference_dim,
        HAS_VALID_SIZES=valid_sizes is not None,
    )


def _is_wide(value: Tensor, spatial_shapes: SpatialShapes, points: Points) -> bool:
    return needs_wide_offsets(
        spatial_shapes,
        points.points.shape[1],
        value.stride(1),
        value.shape[2] * value.shape[3],
        points.points.stride(1),
        points.weights.stride(1),
    )


def _launches(batch: int, tensors: tuple[Tensor | None, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Arguments of each launch: `tensors`, [B, ...] each, split if a grid cannot hold B images.

    A missing tensor, which the kernel does not read, is replaced by the first one.
    """
    first = tensors[0]
    assert first is not None
    present = tuple(first if tensor is None else tensor for tensor in tensors)
    if batch <= _MAX_GRID_Y:
        yield present
        return
    for start in range(0, batch, _MAX_GRID_Y):
        yield tuple(tensor[start : start + _MAX_GRID_Y] for tensor in present)
