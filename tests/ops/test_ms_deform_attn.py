"""Deformable attention against loops over single samples, and its edge cases."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from msdetr.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused, padding_mask
from msdetr.structures import SpatialShapes

SHAPES = ((3, 5), (1, 1), (2, 1), (1, 4))
TOKENS = 15 + 1 + 2 + 4


def loop_attention(
    value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """The definition, sample by sample, in float64. Does not use grid_sample."""
    batch, _, heads, channels = value.shape
    _, queries, _, _, points, _ = locations.shape
    value, locations, weights = value.double(), locations.double(), weights.double()
    output = torch.zeros(batch, queries, heads, channels, dtype=torch.float64)
    for image, query, head in product(range(batch), range(queries), range(heads)):
        start = 0
        for level, (height, width) in enumerate(spatial_shapes):
            for point in range(points):
                x, y = locations[image, query, head, level, point].tolist()
                if not (math.isfinite(x) and math.isfinite(y)):
                    continue
                weight = weights[image, query, head, level, point]
                x, y = x * width - 0.5, y * height - 0.5  # pixel centres at integers
                for column in (math.floor(x), math.floor(x) + 1):
                    for row in (math.floor(y), math.floor(y) + 1):
                        if 0 <= row < height and 0 <= column < width:
                            share = (1 - abs(x - column)) * (1 - abs(y - row))
                            token = start + row * width + column
                            output[image, query, head] += weight * share * value[image, token, head]
            start += height * width
    return output.flatten(2)


def random_inputs(
    *,
    shapes: SpatialShapes = SHAPES,
    batch: int = 2,
    queries: int = 3,
    heads: int = 2,
    points: int = 2,
    channels: int = 3,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, locations (some outside of the maps) and weights."""
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(batch, tokens, heads, channels, dtype=dtype)
    locations = torch.rand(batch, queries, heads, len(shapes), points, 2, dtype=dtype) * 2 - 0.5
    weights = torch.rand(batch, queries, heads, len(shapes), points, dtype=dtype)
    return value, locations, weights


def random_fused_inputs(
    reference_dim: int, *, shapes: SpatialShapes = SHAPES, **sizes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, projection and reference points."""
    value, locations, _ = random_inputs(shapes=shapes, **sizes)
    batch, queries, heads, levels, points, _ = locations.shape
    projection = torch.randn(batch, queries, heads * levels * points * 3, dtype=torch.float64)
    reference = torch.rand(batch, queries, levels, reference_dim, dtype=torch.float64)
    return value, projection, reference


class TestMsDeformAttn:
    @pytest.mark.parametrize(
        "sizes",
        [
            {},
            {"shapes": ((1, 1),), "queries": 1, "heads": 1, "points": 1, "channels": 1},
            {"shapes": ((1, 7),), "heads": 1},
            {"shapes": ((7, 1), (3, 3)), "channels": 1, "points": 5},
            {"batch": 1, "queries": 7, "heads": 3},
        ],
    )
    def test_equals_loops(self, sizes):
        value, locations, weights = random_inputs(**sizes)
        shapes = sizes.get("shapes", SHAPES)
        torch.testing.assert_close(
            ms_deform_attn(value, shapes, locations, weights),
            loop_attention(value, shapes, locations, weights),
        )

    @pytest.mark.parametrize("shape", [(1, 1), (3, 4), (2, 5)])
    def test_locations_on_borders_centres_and_edges_equal_loops(self, shape):
        """Every multiple of half a cell, from one cell outside to one cell outside."""
        height, width = shape
        y = (torch.arange(-2, 2 * height + 3, dtype=torch.float64) / 2) / height
        x = (torch.arange(-2, 2 * width + 3, dtype=torch.float64) / 2) / width
        grid = torch.cartesian_prod(x, y)
        locations = grid[None, :, None, None, None]
        value = torch.randn(1, height * width, 1, 2, dtype=torch.float64)
        weights = torch.ones(1, len(grid), 1, 1, 1, dtype=torch.float64)
        torch.testing.assert_close(
            ms_deform_attn(value, (shape,), locations, weights),
            loop_attention(value, (shape,), locations, weights),
        )

    def test_a_pixel_centre_samples_its_pixel(self):
        value = torch.arange(6.0).view(1, 6, 1, 1)
        locations = torch.tensor([(column + 0.5) / 3 for column in range(3)])
        locations = torch.stack((locations, torch.full((3,), 1.5 / 2)), dim=-1)  # second row
        output = ms_deform_attn(
            value, ((2, 3),), locations.view(1, 3, 1, 1, 1, 2), torch.ones(1, 3, 1, 1, 1)
        )
        torch.testing.assert_close(output.flatten(), torch.tensor([3.0, 4.0, 5.0]))

    def test_gradients(self):
        value, locations, weights = random_inputs(batch=1, queries=2, channels=2)
        inputs = [x.requires_grad_() for x in (value, locations, weights)]
        assert torch.autograd.gradcheck(
            lambda value, locations, weights: ms_deform_attn(value, SHAPES, locations, weights),
            inputs,
        )

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3.1])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_locations_far_away_sample_zero_with_finite_gradients(self, bad, axis):
        value, locations, weights = random_inputs(dtype=torch.float32)
        locations[0, 1, ..., axis] = bad
        inputs = [x.requires_grad_() for x in (value, locations, weights)]
        output = ms_deform_attn(value, SHAPES, locations, weights)
        assert not output[0, 1].any()
        torch.testing.assert_close(
            output, loop_attention(value, SHAPES, locations, weights).float()
        )
        output.square().sum().backward()
        assert all(x.grad.isfinite().all() for x in inputs)
        assert not locations.grad[0, 1].any()

    @pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0), (0, 0)])
    def test_nothing_to_attend_from(self, batch, queries):
        value, locations, weights = random_inputs(batch=batch, queries=queries)
        value.requires_grad_()
        output = ms_deform_attn(value, SHAPES, locations, weights)
        assert output.shape == (batch, queries, 6)
        output.sum().backward()
        assert not value.grad.any()

    def test_inputs_need_not_be_contiguous(self):
        value, locations, weights = random_inputs()
        expected = ms_deform_attn(value, SHAPES, locations, weights)
        strided = [
            x.transpose(0, 1).contiguous().transpose(0, 1) for x in (value, locations, weights)
        ]
        value, locations, weights = strided
        value = torch.stack((value, value), dim=-1)[..., 0]
        assert not value.is_contiguous()
        assert torch.equal(ms_deform_attn(value, SHAPES, locations, weights), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_loses_only_the_rounding_of_the_output(self, dtype):
        """Sums and coordinates are float32: the error is half a unit in the last place."""
        value, locations, weights = random_inputs(shapes=((4, 6), (9, 31)), points=4)
        value, weights = value.to(dtype), weights.to(dtype)
        output = ms_deform_attn(value, ((4, 6), (9, 31)), locations.float(), weights)
        assert output.dtype == dtype
        expected = loop_attention(value, ((4, 6), (9, 31)), locations.float(), weights)
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(output.double(), expected, rtol=0.51 * unit, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_locations_are_converted_exactly(self, dtype):
        """Coordinates in half precision are not rounded any further."""
        locations = torch.linspace(0.02, 0.1, 40).to(dtype)[None, :, None, None, None, None]
        locations = torch.cat((locations, torch.full_like(locations, 0.5)), dim=-1)
        value = torch.arange(64.0).view(1, 64, 1, 1)
        weights = torch.ones(locations.shape[:-1])
        torch.testing.assert_close(
            ms_deform_attn(value, ((1, 64),), locations, weights),
            loop_attention(value, ((1, 64),), locations, weights).float(),
            rtol=1e-5,
            atol=1e-5,
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"value": torch.zeros(2, TOKENS, 6)}, "value must be"),
            ({"value": torch.zeros(2, TOKENS, 2, 3, dtype=torch.int64)}, "value must be floating"),
            ({"spatial_shapes": ((3, 5), (1, 1))}, "spatial_shapes .* hold 16 tokens, value has"),
            ({"spatial_shapes": ()}, "spatial_shapes"),
            ({"sampling_locations": torch.zeros(2, 3, 2, 4, 2)}, "sampling_locations must be"),
            ({"sampling_locations": torch.zeros(1, 3, 2, 4, 2, 2)}, "sampling_locations must be"),
            ({"sampling_locations": torch.zeros(2, 3, 1, 4, 2, 2)}, "sampling_locations must be"),
            ({"sampling_locations": torch.zeros(2, 3, 2, 3, 2, 2)}, "sampling_locations must be"),
            ({"sampling_locations": torch.zeros(2, 3, 2, 4, 2, 3)}, "sampling_locations must be"),
            ({"attention_weights": torch.zeros(2, 3, 2, 4, 3)}, "attention_weights must be"),
            ({"attention_weights": torch.zeros(2, 3, 2, 8)}, "attention_weights must be"),
        ],
    )
    def test_errors_name_the_argument(self, change, message):
        value, locations, weights = random_inputs()
        arguments = {
            "value": value,
            "spatial_shapes": SHAPES,
            "sampling_locations": locations,
            "attention_weights": weights,
        }
        with pytest.raises(ValueError, match=message):
            ms_deform_attn(**arguments | change)


def loop_fused(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    projection: Tensor,
    reference: Tensor,
    valid_sizes: Tensor | None,
) -> Tensor:
    """Locations and weights by the definition, one at a time, and `loop_attention`."""
    batch, _, heads, _ = value.shape
    queries, levels = projection.shape[1], len(spatial_shapes)
    points = projection.shape[2] // (heads * levels * 3)
    locations = torch.zeros(batch, queries, heads, levels, points, 2, dtype=torch.float64)
    weights = torch.zeros(batch, queries, heads, levels, points, dtype=torch.float64)
    for image, query, head in product(range(batch), range(queries), range(heads)):
        row = projection[image, query].tolist()
        logits = row[heads * levels * points * 2 :][
            head * levels * points : (head + 1) * levels * points
        ]
        normalizer = sum(math.exp(logit) for logit in logits)
        for level, point in product(range(levels), range(points)):
            place = (head * levels + level) * points + point
            anchor = reference[image, query, level].tolist()
            height, width = spatial_shapes[level]
            for axis, side in enumerate((width, height)):
                offset = row[2 * place + axis]
                if len(anchor) == 2:
                    step = offset / side
                else:
                    step = offset * anchor[2 + axis] / (2 * points)
                locations[image, query, head, level, point, axis] = anchor[axis] + step
            weight = math.exp(logits[level * points + point]) / normalizer
            weights[image, query, head, level, point] = weight
    if valid_sizes is not None:
        value = value.clone()
        for image in range(batch):
            start = 0
            for level, (height, width) in enumerate(spatial_shapes):
                valid_height, valid_width = valid_sizes[image, level].tolist()
                for y, x in product(range(height), range(width)):
                    if y >= valid_height or x >= valid_width:
                        value[image, start + y * width + x] = 0.0
                start += height * width
    return loop_attention(value, spatial_shapes, locations, weights)


VALID_SIZES = torch.tensor([[[2, 3], [1, 1], [1, 1], [1, 2]], [[3, 5], [1, 1], [2, 1], [1, 4]]])


class TestFused:
    @pytest.mark.parametrize("reference_dim", [2, 4])
    @pytest.mark.parametrize("valid_sizes", [None, VALID_SIZES], ids=["whole", "padded"])
    def test_equals_loops(self, reference_dim, valid_sizes):
        inputs = random_fused_inputs(reference_dim)
        value, projection, reference = inputs
        torch.testing.assert_close(
            ms_deform_attn_fused(value, SHAPES, projection, reference, valid_sizes),
            loop_fused(value, SHAPES, projection, reference, valid_sizes),
        )

    @pytest.mark.parametrize("reference_dim", [2, 4])
    @pytest.mark.parametrize("valid_sizes", [None, [[[2, 2], [1, 1]]]], ids=["whole", "padded"])
    def test_gradients(self, reference_dim, valid_sizes):
        shapes = ((2, 3), (1, 2))
        inputs = random_fused_inputs(reference_dim, shapes=shapes, batch=1, queries=2, channels=1)
        valid_sizes = None if valid_sizes is None else torch.tensor(valid_sizes)
        assert torch.autograd.gradcheck(
            lambda value, projection, reference: ms_deform_attn_fused(
                value, shapes, projection, reference, valid_sizes
            ),
            [x.requires_grad_() for x in inputs],
        )

    def test_the_content_of_the_padding_does_not_matter(self):
        value, projection, reference = random_fused_inputs(2)
        outputs, gradients = [], []
        for padding in (0.0, 7.0, float("nan"), float("inf")):
            padded = value.clone()
            padded[padding_mask(SHAPES, VALID_SIZES)] = padding
            inputs = [x.clone().requires_grad_() for x in (padded, projection, reference)]
            output = ms_deform_attn_fused(inputs[0], SHAPES, *inputs[1:], VALID_SIZES)
            output.square().sum().backward()
            outputs.append(output)
            gradients.append([x.grad for x in inputs])
        for output, gradient in zip(outputs[1:], gradients[1:], strict=True):
            assert torch.equal(output, outputs[0])
            assert all(map(torch.equal, gradient, gradients[0]))
        assert not gradients[0][0][padding_mask(SHAPES, VALID_SIZES)].any()

    def test_a_sample_in_the_padding_is_zero(self):
        value = torch.ones(1, 16, 1, 1)
        projection = torch.zeros(1, 16, 3)
        centers = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)
        reference = ((centers + 0.5) / 4)[None, :, None]
        valid_sizes = torch.tensor([[[3, 2]]])
        output = ms_deform_attn_fused(value, ((4, 4),), projection, reference, valid_sizes)
        expected = torch.zeros(4, 4)
        expected[:3, :2] = 1.0
        assert torch.equal(output.view(4, 4), expected)

    @pytest.mark.parametrize("reference_dim", [2, 4])
    @pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0)])
    def test_nothing_to_attend_from(self, reference_dim, batch, queries):
        inputs = random_fused_inputs(reference_dim, batch=batch, queries=queries)
        value, projection, reference = (x.requires_grad_() for x in inputs)
        valid_sizes = VALID_SIZES[:batch]
        output = ms_deform_attn_fused(value, SHAPES, projection, reference, valid_sizes)
        assert output.shape == (batch, queries, 6)
        output.sum().backward()
        assert projection.grad is not None

    @pytest.mark.parametrize("reference_dim", [2, 4])
    def test_inputs_need_not_be_contiguous(self, reference_dim):
        value, projection, reference = random_fused_inputs(reference_dim)
        expected = ms_deform_attn_fused(value, SHAPES, projection, reference, VALID_SIZES)
        value = value.transpose(1, 2).contiguous().transpose(1, 2)
        projection = torch.cat((projection, projection), dim=-1)[..., : projection.shape[-1]]
        reference = reference.transpose(0, 1).contiguous().transpose(0, 1)
        valid_sizes = VALID_SIZES.flip(-1).contiguous().flip(-1)
        assert not value.is_contiguous()
        assert not projection.is_contiguous()
        result = ms_deform_attn_fused(value, SHAPES, projection, reference, valid_sizes)
        assert torch.equal(result, expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("reference_dim", [2, 4])
    def test_half_precision_loses_only_the_rounding_of_the_output(self, dtype, reference_dim):
        """Reference points are float32, as in the model; value and projection are not."""
        shapes = ((4, 6), (9, 31))
        value, projection, reference = random_fused_inputs(reference_dim, shapes=shapes, points=4)
        value, projection, reference = value.to(dtype), projection.to(dtype), reference.float()
        output = ms_deform_attn_fused(value, shapes, projection, reference)
        assert output.dtype == dtype
        expected = loop_fused(value, shapes, projection, reference, None)
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(output.double(), expected, rtol=0.51 * unit, atol=1e-5)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
    @pytest.mark.parametrize("place", ["offset", "reference"])
    @pytest.mark.parametrize("reference_dim", [2, 4])
    def test_far_locations_sample_zero_and_do_not_affect_others(self, bad, place, reference_dim):
        value, projection, reference = (x.float() for x in random_fused_inputs(reference_dim))
        num_offsets = projection.shape[2] // 3 * 2
        if place == "offset":
            projection[0, 1, :num_offsets] = bad
        else:
            reference[0, 1] = bad
        for x in (value, projection, reference):
            x.requires_grad_()
        output = ms_deform_attn_fused(value, SHAPES, projection, reference)
        assert not output[0, 1].any()
        assert output.isfinite().all()
        output.square().sum().backward()
        others = torch.tensor([[True, False, True], [True, True, True]])  # not this query
        assert value.grad.isfinite().all()
        assert projection.grad[others].isfinite().all()
        assert reference.grad[others].isfinite().all()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"value": torch.zeros(2, TOKENS, 6)}, "value must be"),
            ({"spatial_shapes": ((3, 5), (1, 2))}, "spatial_shapes"),
            ({"projection": torch.zeros(2, 48)}, "projection must be"),
            ({"projection": torch.zeros(1, 3, 48)}, "projection must be"),
            ({"projection": torch.zeros(2, 3, 47)}, "projection's last dimension .* 24, got 47"),
            ({"reference_points": torch.zeros(2, 3, 4, 3)}, "reference_points must be"),
            ({"reference_points": torch.zeros(2, 3, 2)}, "reference_points must be"),
            ({"reference_points": torch.zeros(2, 3, 3, 2)}, "reference_points must be"),
            ({"valid_sizes": torch.ones(2, 4)}, "valid_sizes must be"),
            ({"valid_sizes": torch.ones(1, 4, 2)}, "valid_sizes must be"),
        ],
    )
    def test_errors_name_the_argument(self, change, message):
        value, projection, reference = random_fused_inputs(2)
        arguments = {
            "value": value,
            "spatial_shapes": SHAPES,
            "projection": projection,
            "reference_points": reference,
            "valid_sizes": VALID_SIZES,
        }
        with pytest.raises(ValueError, match=message):
            ms_deform_attn_fused(**arguments | change)


def test_padding_mask():
    mask = padding_mask(((2, 3), (1, 2)), torch.tensor([[[1, 2], [1, 1]], [[2, 3], [1, 2]]]))
    assert mask.int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 1], [0] * 8]
