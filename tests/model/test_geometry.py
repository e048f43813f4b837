"""Valid sizes, cell centres and box refinement."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model.helpers import crop_tokens

from msdetr.model.geometry import (
    cell_centers,
    inverse_sigmoid,
    level_valid_ratios,
    level_valid_sizes,
    refine_boxes,
)

SHAPES = ((8, 12), (4, 6), (2, 3), (1, 2))


def test_valid_sizes_are_those_of_resized_masks():
    """A cell is valid where the nearest pixel of the image's mask is, for every size."""
    padded = (64, 96)
    sizes = torch.tensor([(h, w) for h in range(1, 65, 7) for w in range(1, 97, 5)] + [padded])
    inside_y = torch.arange(padded[0]) < sizes[:, 0, None]
    inside_x = torch.arange(padded[1]) < sizes[:, 1, None]
    mask = (inside_y[:, :, None] & inside_x[:, None])[:, None].float()
    result = level_valid_sizes(sizes, padded, SHAPES)
    assert result.dtype == torch.int64
    for level, shape in enumerate(SHAPES):
        resized = F.interpolate(mask, size=shape, mode="nearest")[:, 0]
        assert torch.equal(result[:, level, 0], resized[:, :, 0].sum(1).long())
        assert torch.equal(result[:, level, 1], resized[:, 0].sum(1).long())


def test_valid_sizes_of_odd_levels():
    """Sizes that are no multiple of the stride, as with a padding multiple of 1."""
    sizes = torch.tensor([[50, 75], [49, 33], [1, 1]])
    result = level_valid_sizes(sizes, (50, 75), ((7, 10), (4, 5), (1, 1)))
    assert result[0].tolist() == [[7, 10], [4, 5], [1, 1]]
    assert result[1].tolist() == [[7, 5], [4, 3], [1, 1]]
    assert result[2].tolist() == [[1, 1]] * 3


def test_valid_ratios_are_width_then_height():
    ratios = level_valid_ratios(((4, 8), (2, 4)), torch.tensor([[[4, 2], [1, 4]]]))
    assert ratios.dtype == torch.float32
    assert ratios.tolist() == [[[0.25, 1.0], [1.0, 0.5]]]


def test_cell_centers():
    centers = cell_centers(((2, 3),), torch.tensor([[[2, 3]], [[1, 2]]]))
    x, y = torch.tensor([0.5, 1.5, 2.5]).repeat(2), torch.tensor([0.5, 1.5]).repeat_interleave(3)
    torch.testing.assert_close(centers[0], torch.stack((x / 3, y / 2), dim=-1))
    torch.testing.assert_close(centers[1], torch.stack((x / 2, y), dim=-1))


def test_cell_centers_do_not_see_padding():
    valid_sizes = torch.tensor([[[3, 5], [2, 3], [1, 2], [1, 1]]])
    shapes = tuple(map(tuple, valid_sizes[0].tolist()))
    padded, alone = cell_centers(SHAPES, valid_sizes), cell_centers(shapes, valid_sizes)
    assert torch.equal(crop_tokens(padded, SHAPES, shapes), alone)


def test_centers_times_ratios_are_fractions_of_the_padded_map():
    valid_sizes = torch.tensor(
        [[[3, 5], [2, 3], [1, 2], [1, 1]], [[8, 12], [4, 6], [2, 3], [1, 2]]]
    )
    centers, ratios = cell_centers(SHAPES, valid_sizes), level_valid_ratios(SHAPES, valid_sizes)
    start = 0
    for level, (height, width) in enumerate(SHAPES):
        own = centers[:, start : start + height * width] * ratios[:, level, None]
        whole = cell_centers(((height, width),), torch.tensor([[[height, width]]]))
        torch.testing.assert_close(own, whole.expand(2, -1, -1))
        start += height * width


def test_inverse_sigmoid_is_inverse():
    x = torch.tensor([1e-4, 0.01, 0.3, 0.5, 0.99, 0.9999], dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(x).sigmoid(), x)
    torch.testing.assert_close(inverse_sigmoid(x), x.logit())


def test_inverse_sigmoid_is_bounded():
    x = torch.tensor([-3.0, 0.0, 1e-7, 1.0, 2.0, float("inf")]).requires_grad_()
    y = inverse_sigmoid(x)
    limit = torch.tensor(1e5).log()
    torch.testing.assert_close(y.abs(), limit.expand(6), rtol=1e-4, atol=0.0)
    assert y.sign().tolist() == [-1, -1, -1, 1, 1, 1]
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_refinement_by_nothing_keeps_boxes():
    boxes = 0.01 + 0.98 * torch.rand(5, 4)
    torch.testing.assert_close(refine_boxes(torch.zeros(5, 4), boxes), boxes)


def test_refinement_moves_in_logit_space():
    delta = torch.tensor([1.0, -1.0, 0.5, 2.0])
    box = torch.tensor([0.5, 0.5, 0.2, 0.1])
    torch.testing.assert_close(refine_boxes(delta, box), (box.logit() + delta).sigmoid())


def test_points_take_their_size_from_the_step_alone():
    delta, point = torch.tensor([1.0, -1.0, 0.5, 2.0]), torch.tensor([0.25, 0.75])
    boxes = refine_boxes(delta, point)
    torch.testing.assert_close(boxes[:2], (point.logit() + delta[:2]).sigmoid())
    torch.testing.assert_close(boxes[2:], delta[2:].sigmoid())


@pytest.mark.parametrize("reference_dim", [2, 4])
def test_refinement_is_float32_at_least(reference_dim):
    delta, reference = torch.randn(3, 4).bfloat16(), torch.rand(3, reference_dim)
    assert refine_boxes(delta, reference).dtype == torch.float32
    assert refine_boxes(delta.double(), reference.double()).dtype == torch.float64
    torch.testing.assert_close(
        refine_boxes(delta, reference), refine_boxes(delta.float(), reference)
    )


def test_refinement_gradient_reaches_both():
    delta = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    boxes = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(refine_boxes, (delta, boxes))


def test_extreme_steps_stay_in_the_image():
    delta = torch.tensor([[1e4, -1e4, 1e4, -1e4]]).requires_grad_()
    boxes = refine_boxes(delta, torch.tensor([[0.0, 1.0, 1.0, 0.0]]))
    assert boxes.tolist() == [[1.0, 0.0, 1.0, 0.0]]
    boxes.sum().backward()
    assert delta.grad.isfinite().all()
