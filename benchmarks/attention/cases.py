"""Shapes and inputs of the deformable attention benchmarks, and their compulsory memory traffic.

The encoder's queries are the pixels of an image of 800 x 1333 at strides 8 to 64, with points as
references; the decoder's have boxes. Offsets are those of a model at initialisation, where point p
of a head lies p steps away in the head's direction. An additional normal offset of a few units
represents a trained model; a unit is a pixel for points, and a side over 2 P for boxes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from msdetr.model.attention import MSDeformAttn
from msdetr.model.geometry import cell_centers
from msdetr.structures import SpatialShapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """Sizes of a case; batch, type and offsets are its own."""

    levels: SpatialShapes
    num_queries: int | None
    """None: the pixels of the levels."""
    check_levels: SpatialShapes
    """Levels of the small case for comparing results."""
    num_heads: int = 8
    head_dim: int = 32
    num_points: int = 4

    @property
    def num_tokens(self) -> int:
        """S"""
        return sum(height * width for height, width in self.levels)

    def small(self) -> Shape:
        """The same with few tokens and queries."""
        queries = None if self.num_queries is None else min(self.num_queries, 100)
        return replace(self, levels=self.check_levels, num_queries=queries)


_LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))
# As wide as the large maps, so that coordinates of too few bits fail.
_CHECK_LEVELS = ((13, 167), (7, 84), (4, 42), (2, 21))
_TINY_LEVELS = ((3, 4), (2, 2))

SHAPES = {
    "encoder": Shape(_LEVELS, None, _CHECK_LEVELS),
    "decoder-300": Shape(_LEVELS, 300, _CHECK_LEVELS),
    "decoder-900": Shape(_LEVELS, 900, _CHECK_LEVELS),
    "tiny": Shape(_TINY_LEVELS, None, _TINY_LEVELS, num_heads=1, head_dim=16),
    "tiny-decoder": Shape(_TINY_LEVELS, 3, _TINY_LEVELS, num_heads=1, head_dim=16),
}


@dataclass(frozen=True)
class Case:
    """The inputs of a row, without their values."""

    shape_name: str
    shape: Shape
    batch: int
    dtype: torch.dtype
    spread: float
    """Standard deviation of the additional offset."""

    def small(self) -> Case:
        """The small case of the same kind, for comparing results."""
        return replace(self, shape=self.shape.small(), batch=min(self.batch, 2))


class LevelTable(NamedTuple):
    """The levels as tensors on a device, as many ops take them."""

    shapes: Tensor
    """[L, 2] int64, (height, width)"""
    starts: Tensor
    """[L] int64, first token of each level"""
    sizes: Tensor
    """[L, 2] float32, (width, height)"""


class Inputs(NamedTuple):
    """Inputs of every implementation."""

    value: Tensor
    """[B, S, M, D]"""
    projection: Tensor
    """[B, Q, M * L * P * 3]: offsets, then logits"""
    offsets: Tensor
    """[B, Q, M * L * P * 2], the first part of `projection`"""
    logits: Tensor
    """[B, Q, M * L * P], the second part of `projection`"""
    reference_points: Tensor
    """[B, Q, L, 2 or 4] float32"""
    grad_output: Tensor
    """[B, Q, M * D]"""
    levels: SpatialShapes
    table: LevelTable


def make_inputs(case: Case, device: torch.device, *, seed: int = 0) -> Inputs:
    """Random inputs of a case; value, projection, offsets and logits require gradients."""
    shape = case.shape
    heads, levels, points = shape.num_heads, len(shape.levels), shape.num_points
    generator = torch.Generator(device).manual_seed(seed)
    normal = functools.partial(torch.randn, device=device, generator=generator)
    uniform = functools.partial(torch.rand, device=device, generator=generator)
    table = level_table(shape.levels, device)

    if shape.num_queries is None:
        queries = shape.num_tokens
        reference = cell_centers(shape.levels, table.shapes[None]).expand(case.batch, -1, -1)
    else:
        queries = shape.num_queries
        sides = uniform(case.batch, queries, 2) * 0.45 + 0.05
        centers = sides / 2 + uniform(case.batch, queries, 2) * (1 - sides)
        reference = torch.cat((centers, sides), dim=-1)
    reference = reference[:, :, None].repeat(1, 1, levels, 1)

    offsets = uniform(case.batch, queries, heads, levels, points, 2) / 8 + 1 / 16
    offsets += initial_offsets(shape).to(device)
    offsets += case.spread * normal(*offsets.shape)
    offsets = _off_grid(offsets.to(case.dtype), reference, table)
    offsets = offsets.flatten(2)
    logits = normal(case.batch, queries, heads * levels * points).to(case.dtype)
    value = normal(case.batch, shape.num_tokens, heads, shape.head_dim).to(case.dtype)
    grad_output = normal(case.batch, queries, heads * shape.head_dim).to(case.dtype)
    return Inputs(
        value.requires_grad_(),
        torch.cat((offsets, logits), dim=-1).requires_grad_(),
        offsets.requires_grad_(),
        logits.requires_grad_(),
        reference,
        grad_output,
        shape.levels,
        table,
    )


@functools.lru_cache(maxsize=64)
def level_table(levels: SpatialShapes, device: torch.device) -> LevelTable:
    """The levels as tensors on `device`."""
    shapes = torch.tensor(levels, dtype=torch.int64)
    starts = shapes.prod(-1).cumsum(0) - shapes.prod(-1)
    sizes = shapes.flip(-1).to(torch.float32)
    return LevelTable(shapes.to(device), starts.to(device), sizes.to(device))


@functools.lru_cache(maxsize=64)
def initial_offsets(shape: Shape) -> Tensor:
    """[M, L, P, 2] offsets of a model at initialisation."""
    heads, levels, points = shape.num_heads, len(shape.levels), shape.num_points
    layer = MSDeformAttn(heads * shape.head_dim, levels, heads, points)
    return layer.sampling_offsets.bias.detach().view(heads, levels, points, 2)


def sampling_locations(inputs: Inputs) -> Tensor:
    """[B, Q, M, L, P, 2] float32 fractions of the maps."""
    heads, levels = inputs.value.shape[2], len(inputs.levels)
    offsets = inputs.offsets.unflatten(-1, (heads, levels, -1, 2))
    reference = inputs.reference_points[:, :, None, :, None]
    if reference.shape[-1] == 2:
        steps = 1 / inputs.table.sizes[:, None]
    else:
        steps = reference[..., 2:] * (0.5 / offsets.shape[-2])
    locations: Tensor = reference[..., :2] + offsets * steps
    return locations


def attention_weights(inputs: Inputs) -> Tensor:
    """[B, Q, M, L, P] float32, the softmax of the logits."""
    heads, levels = inputs.value.shape[2], len(inputs.levels)
    logits = inputs.logits.unflatten(-1, (heads, -1))
    weights: Tensor = logits.softmax(-1, dtype=torch.float32).unflatten(-1, (levels, -1))
    return weights


def compulsory_bytes(inputs: Inputs) -> dict[str, int]:
    """Bytes that each pass must move: every input read once, every result written once.

    Rows of `value` count if a sample touches them; rows of its gradient always count. Locations and
    weights need not be stored, and backward needs nothing but the inputs.
    """
    row = inputs.value.shape[3] * inputs.value.element_size()
    value_read = count_touched_rows(inputs) * row
    queries = _num_bytes(inputs.projection)
    output = _num_bytes(inputs.grad_output)
    reference = _num_bytes(inputs.reference_points)
    forward = value_read + queries + reference + output
    backward = output + value_read + queries + reference + _num_bytes(inputs.value) + queries
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}


@torch.no_grad()
def count_touched_rows(inputs: Inputs) -> int:
    """The number of rows (image, token, head) of `value` that any sample touches."""
    batch, tokens, heads, _ = inputs.value.shape
    locations = sampling_locations(inputs)
    total = 0
    for image in range(batch):
        # The last column takes the corners outside the maps.
        touched = locations.new_zeros((heads, tokens + 1), dtype=torch.bool)
        start = 0
        for level, (height, width) in enumerate(inputs.levels):
            position = locations[image, :, :, level] * inputs.table.sizes[level] - 0.5
            left, top = position.floor().to(torch.int64).unbind(-1)  # [Q, M, P]
            for x, y in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
                inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
                token = torch.where(inside, start + y * width + x, tokens)
                touched.scatter_(1, token.transpose(0, 1).flatten(1), True)
            start += height * width
        total += int(touched[:, :tokens].sum())
    return total


def _off_grid(offsets: Tensor, reference: Tensor, table: LevelTable) -> Tensor:
    """Move samples away from pixel centres, where gradients of locations are not unique.

    Offsets in pixels with few bits often hit them exactly; offsets in box sides do not.
    """
    if reference.shape[-1] == 4:
        return offsets
    centers = reference[:, :, None, :, None].to(torch.float64) * table.sizes[:, None] - 0.5
    position = centers + offsets
    near = (position - position.round()).abs() < 1 / 64
    # A sixteenth of a pixel, or the resolution of the offset's type.
    nudge = (offsets.abs() / 64).clamp(min=1 / 16)
    return torch.where(near, offsets + nudge, offsets)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
