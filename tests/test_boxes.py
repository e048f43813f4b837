"""Box formats and overlaps, against torchvision where boxes are proper and finite where not."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor

from msdetr.boxes import (
    at_least_float32,
    box_area,
    box_iou,
    cxcywh_to_xyxy,
    generalized_box_iou,
    pairwise_generalized_iou,
    pairwise_iou,
)


def random_corner_boxes(*shape: int) -> Tensor:
    boxes = torch.rand(*shape, 4, dtype=torch.float64)
    boxes[..., 2:] = boxes[..., :2] + 0.01 + boxes[..., 2:]
    return boxes


def test_corners_are_where_they_should_be():
    boxes = torch.tensor([[0.5, 0.25, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]])
    corners = torch.tensor([[0.25, 0.0, 0.75, 0.5], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(cxcywh_to_xyxy(boxes), corners)
    assert box_area(corners).tolist() == [0.25, 0.0]


def test_overlaps_by_hand():
    a = torch.tensor([0.0, 0.0, 2.0, 2.0])
    b = torch.tensor([1.0, 1.0, 3.0, 3.0])
    far = torch.tensor([3.0, 0.0, 4.0, 2.0])
    assert box_iou(a, b).item() == pytest.approx(1 / 7)
    assert generalized_box_iou(a, b).item() == pytest.approx(1 / 7 - 2 / 9)
    assert box_iou(a, far).item() == 0.0
    assert generalized_box_iou(a, far).item() == pytest.approx(-2 / 8)
    assert box_iou(a, a).item() == generalized_box_iou(a, a).item() == 1.0
    assert generalized_box_iou(a, b, eps=1.0).item() == pytest.approx(1 / 8 - 2 / 10)
    assert pairwise_generalized_iou(a[None], b[None], eps=1.0).item() == pytest.approx(1 / 8 - 0.2)


def test_pairwise_overlaps_equal_torchvision():
    a, b = random_corner_boxes(2, 7), random_corner_boxes(2, 5)
    iou, giou = pairwise_iou(a, b), pairwise_generalized_iou(a, b)
    assert iou.shape == giou.shape == (2, 7, 5)
    for image in range(2):
        torch.testing.assert_close(iou[image], torchvision.ops.box_iou(a[image], b[image]))
        torch.testing.assert_close(
            giou[image], torchvision.ops.generalized_box_iou(a[image], b[image])
        )
    assert giou.min() >= -1
    assert giou.max() <= 1


def test_paired_overlaps_are_the_diagonal_of_the_pairwise_ones():
    a, b = random_corner_boxes(6), random_corner_boxes(6)
    torch.testing.assert_close(box_iou(a, b), pairwise_iou(a, b).diagonal())
    torch.testing.assert_close(generalized_box_iou(a, b), pairwise_generalized_iou(a, b).diagonal())


def test_gradient_of_generalized_iou():
    a, b = random_corner_boxes(6).requires_grad_(), random_corner_boxes(6).requires_grad_()
    assert torch.autograd.gradcheck(generalized_box_iou, (a, b))
    assert torch.autograd.gradcheck(generalized_box_iou, (a, b, 0.1))


# Sides whose square is a small number, a denormal one, and zero; then lines.
DEGENERATE = {
    "1e-19": (0.0, 0.0, 1e-19, 1e-19),
    "1e-22": (0.0, 0.0, 1e-22, 1e-22),
    "1e-30": (0.0, 0.0, 1e-30, 1e-30),
    "point": (0.0, 0.0, 0.0, 0.0),
    "upright": (0.2, 0.2, 0.2, 0.9),
    "level": (0.2, 0.2, 0.9, 0.2),
}
WHOLE = (0.0, 0.0, 1.0, 1.0)
INVERTED = (0.5, 0.5, 0.4, 0.4)


@pytest.mark.parametrize("overlap", [pairwise_iou, pairwise_generalized_iou])
def test_degenerate_boxes_give_finite_values(overlap):
    boxes = torch.tensor([*DEGENERATE.values(), WHOLE, INVERTED])
    assert overlap(boxes, boxes).isfinite().all()


def test_boxes_without_area_have_no_overlap():
    boxes = torch.tensor([DEGENERATE[name] for name in ("1e-30", "point", "upright", "level")])
    whole = torch.tensor([WHOLE])
    assert not pairwise_iou(boxes, torch.cat((boxes, whole))).any()


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_boxes_give_finite_gradients(name):
    for other in (*DEGENERATE.values(), WHOLE):
        assert_finite_gradients(DEGENERATE[name], other)


def test_inverted_boxes_give_finite_gradients():
    assert_finite_gradients(INVERTED, WHOLE)
    assert_finite_gradients(INVERTED, INVERTED)


def assert_finite_gradients(*corners: tuple[float, ...]) -> None:
    for eps in (0.0, 1e-6):
        boxes = [torch.tensor(box).requires_grad_() for box in corners]
        generalized_box_iou(*boxes, eps).backward()
        for box in boxes:
            assert box.grad.isfinite().all(), f"{corners}: {box.grad}"


def test_at_least_float32():
    kept = (torch.float32, torch.float64)
    for dtype in (torch.float16, torch.bfloat16, *kept):
        result = at_least_float32(torch.ones(2, dtype=dtype))
        assert result.dtype == (dtype if dtype in kept else torch.float32)
