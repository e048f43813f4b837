"""Loss terms against torchvision's, and at their edges."""

from __future__ import annotations

import pytest
import torch
import torchvision
from scenes import Scene, random_scene, with_garbage_padding
from torch import Tensor

from msdetr.config import LossConfig
from msdetr.structures import Assignment, Predictions, Targets
from msdetr.supervision.losses import bbox_loss, giou_loss, loss_inputs


def box_losses(boxes: Tensor, targets: Targets, assignment: Assignment) -> tuple[Tensor, Tensor]:
    """L1 and GIoU losses per layer."""
    logits = boxes.new_zeros(*boxes.shape[:-1], 1)
    inputs = loss_inputs(Predictions(logits, boxes), targets, assignment, LossConfig())
    return bbox_loss(inputs), giou_loss(inputs)


def random_assignment(scene: Scene, k: int) -> Assignment:
    """Some queries for every target; the same one may come twice."""
    layers, batch, queries, _ = scene.boxes.shape
    slots = scene.targets.labels.shape[1]
    mask = (torch.rand(layers, batch, slots, k) < 0.7) & scene.targets.mask[:, :, None]
    query_index = torch.randint(queries, mask.shape).masked_fill(~mask, 0)
    return Assignment(query_index, mask, torch.full((layers, batch, queries), -1))


class TestBoxLosses:
    def test_sums_over_pairs(self):
        scene = random_scene((3, 0, 5), dtype=torch.float64)
        assignment = random_assignment(scene, k=4)
        l1, giou = (torch.zeros(2, dtype=torch.float64) for _ in range(2))
        for layer, image, target, place in assignment.mask.nonzero().tolist():
            query = assignment.query_index[layer, image, target, place]
            pair = torch.stack(
                (scene.boxes[layer, image, query], scene.targets.boxes[image, target])
            )
            l1[layer] += (pair[0] - pair[1]).abs().sum()
            corners = torchvision.ops.box_convert(pair, "cxcywh", "xyxy")
            giou[layer] += 1 - torchvision.ops.generalized_box_iou(corners[:1], corners[1:]).item()
        result = box_losses(scene.boxes, scene.targets, assignment)
        torch.testing.assert_close(result[0], l1)
        torch.testing.assert_close(result[1], giou)

    def test_an_epsilon_in_the_denominators_of_giou(self):
        scene = random_scene((3, 0, 5), dtype=torch.float64)
        assignment = random_assignment(scene, k=4)
        logits = scene.boxes.new_zeros(*scene.boxes.shape[:-1], 1)
        predictions = Predictions(logits, scene.boxes)
        result = giou_loss(
            loss_inputs(predictions, scene.targets, assignment, LossConfig(giou_eps=0.1))
        )
        expected = torch.zeros_like(result)
        for layer, image, target, place in assignment.mask.nonzero().tolist():
            query = assignment.query_index[layer, image, target, place]
            x, y, w, h = torch.stack(
                (scene.boxes[layer, image, query], scene.targets.boxes[image, target])
            ).unbind(-1)
            low, high = torch.stack((x - w / 2, y - h / 2)), torch.stack((x + w / 2, y + h / 2))
            inside = (high.amin(1) - low.amax(1)).clamp(min=0).prod()
            hull = (high.amax(1) - low.amin(1)).prod()
            union = (w * h).sum() - inside
            expected[layer] += 1 - inside / (union + 0.1) + (hull - union) / (hull + 0.1)
        torch.testing.assert_close(result, expected)

    def test_gradient(self):
        scene = random_scene((2, 3), layers=1, queries=4, dtype=torch.float64)
        assignment = random_assignment(scene, k=2)
        assert torch.autograd.gradcheck(
            lambda boxes: box_losses(boxes, scene.targets, assignment),
            [scene.boxes.requires_grad_()],
        )

    def test_degenerate_boxes_have_finite_gradients(self):
        scene = random_scene((4,), layers=1)
        scene.boxes[0, 0, :4, 2:] = torch.tensor([[0.0, 0.0], [0.0, 0.3], [0.3, 0.0], [1e-22] * 2])
        scene.targets.boxes[0, 3] = scene.boxes[0, 0, 3]
        scene.targets.boxes[0, 2, 2:] = 0.0
        scene.boxes.requires_grad_()
        mask = torch.ones(1, 1, 6, 4, dtype=torch.bool) & scene.targets.mask[:, :, None]
        query_index = torch.arange(4).expand_as(mask).masked_fill(~mask, 0)
        assignment = Assignment(query_index, mask, torch.full((1, 1, 12), -1))
        l1, giou = box_losses(scene.boxes, scene.targets, assignment)
        assert l1.isfinite().all()
        assert giou.isfinite().all()
        (l1 + giou).sum().backward()
        assert scene.boxes.grad.isfinite().all()

    def test_equal_boxes_cost_nothing(self):
        scene = random_scene((4,), layers=1)
        boxes = scene.targets.boxes[None, :, :4].clone().requires_grad_()
        query_index = torch.tensor([0, 1, 2, 3, 0, 0]).view(1, 1, 6, 1)
        mask = torch.tensor([True] * 4 + [False] * 2).view(1, 1, 6, 1)
        assignment = Assignment(query_index, mask, torch.full((1, 1, 4), -1))
        l1, giou = box_losses(boxes, scene.targets, assignment)
        assert l1.item() == 0.0
        assert giou.item() == pytest.approx(0.0, abs=1e-6)
        (l1 + giou).sum().backward()
        assert boxes.grad.isfinite().all()

    @pytest.mark.parametrize("value", [None, 0.0, float("nan"), float("inf")])
    def test_empty_places_contribute_nothing(self, value):
        scene = random_scene((3, 0), empty_slots=3)
        assignment = random_assignment(scene, k=3)
        garbage = with_garbage_padding(scene.targets, 3, value)
        results = []
        for targets in (scene.targets, garbage):
            boxes = scene.boxes.clone().requires_grad_()
            l1, giou = box_losses(boxes, targets, assignment)
            (l1 + giou).sum().backward()
            results.append((l1.detach(), giou.detach(), boxes.grad))
        assert all(map(torch.equal, *results))

    def test_a_query_that_is_not_assigned_gets_no_gradient_even_if_it_is_nan(self):
        """Empty places point at query 0: a bad box there must not spread."""
        scene = random_scene((3, 2))
        assignment = random_assignment(scene, k=3)
        query_index = assignment.query_index.clamp(min=1).masked_fill(~assignment.mask, 0)
        assignment = assignment._replace(query_index=query_index)
        boxes = scene.boxes.clone()
        boxes[:, :, 0] = float("nan")
        boxes.requires_grad_()
        l1, giou = box_losses(boxes, scene.targets, assignment)
        (l1 + giou).sum().backward()
        assert l1.isfinite().all()
        assert giou.isfinite().all()
        assert boxes.grad[:, :, 1:].isfinite().all()

    def test_no_pairs(self):
        scene = random_scene((0, 0))
        boxes = scene.boxes.requires_grad_()
        l1, giou = box_losses(boxes, scene.targets, random_assignment(scene, k=2))
        assert not l1.any()
        assert not giou.any()
        (l1 + giou).sum().backward()
        assert not boxes.grad.any()

    def test_half_precision_is_computed_in_float32(self):
        scene = random_scene((3, 2))
        assignment = random_assignment(scene, k=2)
        half = scene.boxes.bfloat16()
        losses = box_losses(half, scene.targets, assignment)
        assert all(loss.dtype == torch.float32 for loss in losses)
        expected = box_losses(half.float(), scene.targets, assignment)
        assert all(map(torch.equal, losses, expected))

    def test_targets_may_be_float64(self):
        scene = random_scene((3, 2))
        assignment = random_assignment(scene, k=2)
        targets = Targets(scene.targets.labels, scene.targets.boxes.double(), scene.targets.count)
        losses = box_losses(scene.boxes, targets, assignment)
        assert all(map(torch.equal, losses, box_losses(scene.boxes, scene.targets, assignment)))
