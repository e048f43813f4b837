"""Deformable attention on a CPU: the arithmetic of the reference, a few feature maps at a time.

The reference holds the samples of all heads at once and keeps them for the backward pass. Here the
samples of a chunk of maps stay in the cache: the forward pass sums them immediately, and the
backward pass samples again. The operator is opaque, because compiled code would decompose
`grid_sample` into scalar loads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msdetr.ops.registration import no_second_derivative, register_op


class _Maps(NamedTuple):
    """The arguments in the layout of `grid_sampler_2d`: B * M maps of D channels per level."""

    maps: Tensor
    """[B * M, D, S]"""
    grid: Tensor
    """[L, B * M, P, Q, 2] (x, y), -1 to 1 within a map."""
    weights: Tensor
    """[L, B * M, P, Q]"""


def _lay_out(value: Tensor, sampling_locations: Tensor, attention_weights: Tensor) -> _Maps:
    dtype = torch.promote_types(value.dtype, torch.float32)
    maps = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1).contiguous()
    # Clamped locations remain outside of every map, and within the integer range of grid_sampler.
    locations = torch.nan_to_num(sampling_locations.to(dtype), nan=-1.0).clamp_(-1.0, 2.0)
    grid = locations.mul_(2.0).sub_(1.0).permute(3, 0, 2, 4, 1, 5).flatten(1, 2).contiguous()
    weights = attention_weights.to(dtype).permute(3, 0, 2, 4, 1).flatten(1, 2).contiguous()
    return _Maps(maps, grid, weights)


def _chunks(count: int) -> Iterator[slice]:
    """Chunks of as many maps as there are threads: each thread samples one map."""
    size = torch.get_num_threads()
    for start in range(0, count, size):
        yield slice(start, start + size)


def _levels(maps: Tensor, spatial_shapes: Sequence[int]) -> Iterator[Tensor]:
    """Views [n, D, H, W] of `maps` [n, D, S], level by level."""
    start = 0
    for height, width in zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True):
        yield maps[..., start : start + height * width].unflatten(-1, (height, width))
        start += height * width


def _forward(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    batch, _, heads, channels = value.shape
    queries, points = sampling_locations.shape[1], attention_weights.shape[-1]
    maps, grid, weights = _lay_out(value, sampling_locations, attention_weights)
    output = maps.new_zeros(batch * heads, channels, queries)
    for chunk in _chunks(len(maps)):
        for level, level_map in enumerate(_levels(maps[chunk], spatial_shapes)):
            samples = torch.grid_sampler_2d(level_map, grid[level, chunk], 0, 0, False)
            for point in range(points):
                output[chunk].addcmul_(samples[:, :, point], weights[level, chunk, None, point])
    output = output.view(batch, heads * channels, queries).transpose(1, 2)
    return output.to(value.dtype).contiguous()


def _backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    maps, grid, weights = _lay_out(value, sampling_locations, attention_weights)
    grad = grad_output.to(maps.dtype).transpose(1, 2).reshape(len(maps), channels, 1, queries)
    grad_maps, grad_grid, grad_weights = map(torch.empty_like, (maps, grid, weights))
    for chunk in _chunks(len(maps)):
        levels = zip(
            _levels(maps[chunk], spatial_shapes),
            _levels(grad_maps[chunk], spatial_shapes),
            strict=True,
        )
        for level, (level_map, grad_level) in enumerate(levels):
            points = grid[level, chunk]
            samples = torch.grid_sampler_2d(level_map, points, 0, 0, False)
            torch.sum(samples.mul_(grad[chunk]), 1, out=grad_weights[level, chunk])
            grad_samples = grad[chunk] * weights[level, chunk, None]
            grad_map, grad_grid[level, chunk] = torch.ops.aten.grid_sampler_2d_backward(
                grad_samples, level_map, points, 0, 0, False, (True, True)
            )
            grad_level.copy_(grad_map)
    # The result does not depend on a location that was clamped.
    clamped = ~((sampling_locations >= -1.0) & (sampling_locations <= 2.0))
    grad_locations = grad_grid.unflatten(1, (batch, heads)).permute(1, 4, 2, 0, 3, 5).mul(2.0)
    return (
        grad_maps.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).to(value.dtype).contiguous(),
        grad_locations.masked_fill_(clamped, 0.0).to(sampling_locations.dtype).contiguous(),
        grad_weights.unflatten(1, (batch, heads))
        .permute(1, 4, 2, 0, 3)
        .to(attention_weights.dtype)
        .contiguous(),
    )


def _forward_fake(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, *rest: Any
) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], heads * channels)


def _backward_fake(
    grad_output: Tensor, value: Tensor, spatial_shapes: Sequence[int], *points: Tensor
) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (value, *points))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, *points = inputs
    ctx.save_for_backward(value, *points)


def _backward_formula(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, *points = ctx.saved_tensors
    grad_value, *grad_points = torch.ops.msdetr.ms_deform_attn_chunked_backward(
        grad_output, value, ctx.spatial_shapes, *points
    )
    return grad_value, None, *grad_points


register_op(
    "ms_deform_attn_chunked(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
    "Tensor attention_weights) -> Tensor",
    _forward,
    fake=_forward_fake,
    backward=_backward_formula,
    save=_save,
    devices=("CPU",),
)
register_op(
    "ms_deform_attn_chunked_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
    "Tensor sampling_locations, Tensor attention_weights) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
    backward=no_second_derivative("chunked deformable attention"),
    devices=("CPU",),
)
