"""Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021, eq. 3).

Each head of each query takes bilinear samples at P points of each of L feature maps and sums them
with its attention weights. Locations are fractions of the map: (0, 0) is its top left corner and
(1, 1) its bottom right corner. Pixel centres are at half integers. Samples outside a map are zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import msdetr.ops.ms_deform_attn_chunked  # noqa: F401
from msdetr.ops.dispatch import Impl, resolve_impl
from msdetr.ops.ms_deform_attn_library import flatten_shapes
from msdetr.structures import SpatialShapes, spatial_shapes_tensor

# Limits of the kernels. The reference has none.
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_LEVELS = 8
_MAX_POINTS = 16
_MAX_HEAD_DIM = 256


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Weighted sum of bilinear samples at given locations.

    Args:
        value: [B, S, M, D], the feature maps of all levels, flattened row by row.
        spatial_shapes: L pairs (height, width); their areas sum to S. A tensor [L, 2] is accepted
            outside of compiled code; it is copied to the host.
        sampling_locations: [B, Q, M, L, P, 2], (x, y) as fractions of each map. A location that is
            not finite samples zero.
        attention_weights: [B, Q, M, L, P]
        impl: see `msdetr.ops.dispatch`.

    Returns:
        [B, Q, M * D], in the dtype of `value`.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message names the argument.
        NotImplementedError: `impl` is "triton" and the kernel cannot serve the arguments.
    """
    spatial_shapes = _as_pairs(spatial_shapes)
    _check_value(value, spatial_shapes)
    batch, _, heads, _ = value.shape
    levels = len(spatial_shapes)
    expected = f"[{batch}, Q, {heads}, {levels}, P"
    if (
        sampling_locations.ndim != 6
        or sampling_locations.shape[0] != batch
        or sampling_locations.shape[2:4] != (heads, levels)
        or sampling_locations.shape[5] != 2
    ):
        raise ValueError(
            f"sampling_locations must be {expected}, 2], got {list(sampling_locations.shape)}"
        )
    if attention_weights.shape != sampling_locations.shape[:-1]:
        raise ValueError(
            f"attention_weights must be {list(sampling_locations.shape[:-1])}, "
            f"got {list(attention_weights.shape)}"
        )
    _check_floating(
        value, sampling_locations=sampling_locations, attention_weights=attention_weights
    )
    unsupported = _unsupported(value, levels, attention_weights.shape[-1])
    resolved = resolve_impl("ms_deform_attn", impl, value.device, unsupported)
    if resolved == "triton":
        output: Tensor = torch.ops.msdetr.ms_deform_attn(
            value, flatten_shapes(spatial_shapes), sampling_locations, attention_weights
        )
        return output
    return _sample(value, spatial_shapes, sampling_locations, attention_weights, resolved)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: SpatialShapes | Tensor,
    projection: Tensor,
    reference_points: Tensor,
    valid_sizes: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Deformable attention from the raw output of one linear layer.

    Args:
        value: [B, S, M, D], the feature maps of all levels, flattened row by row.
        spatial_shapes: L pairs (height, width); their areas sum to S. A tensor [L, 2] is accepted
            outside of compiled code; it is copied to the host.
        projection: [B, Q, M * L * P * 3]: first the sampling offsets [M, L, P, 2], then the
            attention logits [M, L, P], whose softmax is over L * P.
        reference_points: fractions of the padded maps. Either points [B, Q, L, 2], with offsets in
            pixels of their level, or boxes [B, Q, L, 4] (cxcywh), with offsets in box sides divided
            by 2 P.
        valid_sizes: [B, L, 2], valid (height, width) of each image and level; the rest, right and
            below, is padding and samples zero. None: no padding.
        impl: see `msdetr.ops.dispatch`.

    Returns:
        [B, Q, M * D], in the dtype of `value`.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message names the argument.
        NotImplementedError: `impl` is "triton" and the kernel cannot serve the arguments.
    """
    spatial_shapes = _as_pairs(spatial_shapes)
    _check_value(value, spatial_shapes)
    batch, _, heads, _ = value.shape
    levels = len(spatial_shapes)
    if projection.ndim != 3 or projection.shape[0] != batch:
        raise ValueError(f"projection must be [{batch}, Q, ...], got {list(projection.shape)}")
    if projection.shape[2] % (heads * levels * 3):
        raise ValueError(
            f"projection's last dimension must be a multiple of heads * levels * 3 = "
            f"{heads * levels * 3}, got {projection.shape[2]}"
        )
    queries = projection.shape[1]
    if reference_points.shape not in ((batch, queries, levels, 2), (batch, queries, levels, 4)):
        raise ValueError(
            f"reference_points must be [{batch}, {queries}, {levels}, 2 or 4], "
            f"got {list(reference_points.shape)}"
        )
    if valid_sizes is not None and valid_sizes.shape != (batch, levels, 2):
        raise ValueError(
            f"valid_sizes must be [{batch}, {levels}, 2], got {list(valid_sizes.shape)}"
        )
    _check_floating(value, projection=projection, reference_points=reference_points)
    if valid_sizes is not None and valid_sizes.device != value.device:
        raise ValueError(f"valid_sizes is on {valid_sizes.device}, value on {value.device}")
    points = projection.shape[2] // (heads * levels * 3)
    unsupported = _unsupported(value, levels, points)
    resolved = resolve_impl("ms_deform_attn_fused", impl, value.device, unsupported)
    if resolved == "triton":
        output: Tensor = torch.ops.msdetr.ms_deform_attn_fused(
            value, flatten_shapes(spatial_shapes), projection, reference_points, valid_sizes
        )
        return output
    locations, weights = _locations_and_weights(value, spatial_shapes, projection, reference_points)
    if valid_sizes is not None:
        padding = padding_mask(spatial_shapes, valid_sizes)
        value = value.masked_fill(padding[:, :, None, None], 0.0)
    return _sample(value, spatial_shapes, locations, weights, resolved)


def padding_mask(spatial_shapes: SpatialShapes, valid_sizes: Tensor) -> Tensor:
    """[B, S] bool, True where a token of the flattened levels is padding."""
    device = valid_sizes.device
    masks = []
    for level, (height, width) in enumerate(spatial_shapes):
        outside_y = torch.arange(height, device=device) >= valid_sizes[:, level, 0, None]
        outside_x = torch.arange(width, device=device) >= valid_sizes[:, level, 1, None]
        masks.append((outside_y[:, :, None] | outside_x[:, None, :]).flatten(1))
    return torch.cat(masks, dim=1)


def _locations_and_weights(
    value: Tensor, spatial_shapes: SpatialShapes, projection: Tensor, reference_points: Tensor
) -> tuple[Tensor, Tensor]:
    """Arguments of `ms_deform_attn` that follow from those of `ms_deform_attn_fused`."""
    heads, levels = value.shape[2], len(spatial_shapes)
    points = projection.shape[2] // (heads * levels * 3)
    num_offsets = heads * levels * points * 2
    # Locations are float32 at least: a bfloat16 coordinate can be off by a third of a pixel.
    projection = projection.to(torch.promote_types(projection.dtype, torch.float32))
    offsets = projection[..., :num_offsets].unflatten(-1, (heads, levels, points, 2))
    logits = projection[..., num_offsets:].unflatten(-1, (heads, levels * points))
    weights = logits.softmax(-1).unflatten(-1, (levels, points))

    reference = reference_points[:, :, None, :, None]  # [B, Q, 1, L, 1, 2 or 4]
    if reference.shape[-1] == 2:
        shapes = spatial_shapes_tensor(spatial_shapes, dtype=offsets.dtype, device=offsets.device)
        locations = reference + offsets / shapes.flip(-1)[:, None]
    else:
        locations = reference[..., :2] + offsets / points * reference[..., 2:] * 0.5
    return locations, weights


def _sample(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    resolved: str,
) -> Tensor:
    if resolved == "reference":
        return _reference(value, spatial_shapes, sampling_locations, attention_weights)
    output: Tensor = torch.ops.msdetr.ms_deform_attn_chunked(
        value, flatten_shapes(spatial_shapes), sampling_locations, attention_weights
    )
    return output


def _reference(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    batch, tokens, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    # A sample at -1 or 2 is outside of every map, so clamping changes neither values nor gradients.
    # It keeps the integer conversion of grid_sample in range.
    locations = torch.nan_to_num(sampling_locations.to(dtype), nan=-1.0).clamp(-1.0, 2.0)
    grid = 2.0 * locations - 1.0
    grid = grid.permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # [L, B * M, Q, P, 2]
    weights = attention_weights.to(dtype).permute(3, 0, 2, 1, 4).flatten(1, 2)  # [L, B * M, Q, P]
    maps = value.to(dtype).permute(0, 2, 3, 1).reshape(batch * heads, channels, tokens)

    output = maps.new_zeros(batch * heads, channels, queries)
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        level_map = maps[..., start : start + height * width].unflatten(-1, (height, width))
        start += height * width
        samples = F.grid_sample(level_map, grid[level], align_corners=False)  # [B * M, D, Q, P]
        output = output + (samples * weights[level, :, None]).sum(-1)
    output = output.view(batch, heads, channels, queries).permute(0, 3, 1, 2).flatten(2)
    return output.to(value.dtype)


def _as_pairs(spatial_shapes: SpatialShapes | Tensor) -> SpatialShapes:
    if isinstance(spatial_shapes, Tensor):
        if torch.compiler.is_compiling():
            raise ValueError(
                "spatial_shapes must be pairs of Python integers in compiled code, got a tensor"
            )
        if spatial_shapes.ndim != 2 or spatial_shapes.shape[1] != 2:
            raise ValueError(f"spatial_shapes must be [L, 2], got {list(spatial_shapes.shape)}")
        return tuple((height, width) for height, width in spatial_shapes.tolist())
    return tuple((height, width) for height, width in spatial_shapes)


def _check_value(value: Tensor, spatial_shapes: SpatialShapes) -> None:
    if value.ndim != 4:
        raise ValueError(f"value must be [B, S, heads, head dim], got {list(value.shape)}")
    if not value.is_floating_point():
        raise ValueError(f"value must be floating point, got {value.dtype}")
    area = sum(height * width for height, width in spatial_shapes)
    if not spatial_shapes or area != value.shape[1]:
        raise ValueError(
            f"spatial_shapes {tuple(spatial_shapes)} hold {area} tokens, value has {value.shape[1]}"
        )
    if any(side < 1 for shape in spatial_shapes for side in shape):
        raise ValueError(f"spatial_shapes must be positive, got {tuple(spatial_shapes)}")


def _check_floating(value: Tensor, **arguments: Tensor) -> None:
    for name, tensor in arguments.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, value on {value.device}")


def _unsupported(value: Tensor, levels: int, points: int) -> str | None:
    """Why the kernels cannot serve these arguments, or None."""
    head_dim = value.shape[3]
    if value.dtype not in _KERNEL_DTYPES:
        return f"the kernel takes float32, bfloat16 or float16 values, got {value.dtype}"
    if levels > _MAX_LEVELS:
        return f"the kernel takes up to {_MAX_LEVELS} levels, got {levels}"
    if not 1 <= points <= _MAX_POINTS:
        return f"the kernel takes 1 to {_MAX_POINTS} points, got {points}"
    if not 1 <= head_dim <= _MAX_HEAD_DIM:
        return f"the kernel takes head dimensions 1 to {_MAX_HEAD_DIM}, got {head_dim}"
    return None
