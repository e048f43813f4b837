"""The matching cost against its formula, one pair at a time."""

from __future__ import annotations

import math

import pytest
import torch
from scenes import Scene, random_scene, with_garbage_padding
from torch import Tensor

from msdetr.ops.matching_cost import WORST_COST, matching_cost

COSTS = {"cost_class": 2.0, "cost_bbox": 5.0, "cost_giou": 2.0}


def pair_cost(
    logit: float,
    box: list[float],
    target: list[float],
    *,
    cost_class: float,
    cost_bbox: float,
    cost_giou: float,
    giou_eps: float = 0.0,
) -> float:
    """2 (focal) + 5 L1 - 2 GIoU of one prediction and one target."""
    p = 1 / (1 + math.exp(-logit))
    positive = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8)
    negative = 0.75 * p**2 * -math.log(1 - p + 1e-8)
    l1 = sum(abs(a - b) for a, b in zip(box, target, strict=True))
    inside = hull = 1.0
    for axis in (0, 1):
        edges = [(b[axis] - b[axis + 2] / 2, b[axis] + b[axis + 2] / 2) for b in (box, target)]
        (low_a, high_a), (low_b, high_b) = edges
        inside *= max(min(high_a, high_b) - max(low_a, low_b), 0.0)
        hull *= max(high_a, high_b) - min(low_a, low_b)
    union = box[2] * box[3] + target[2] * target[3] - inside
    giou = inside / (union + giou_eps) - (hull - union) / (hull + giou_eps)
    return cost_class * (positive - negative) + cost_bbox * l1 - cost_giou * giou


def expected_cost(scene: Scene, **costs: float) -> Tensor:
    """[N, B, Q, T] in float64; zero in empty slots."""
    logits, boxes, targets = scene
    result = torch.zeros(*logits.shape[:3], targets.labels.shape[1], dtype=torch.float64)
    for layer, image, query, target in torch.ones_like(result).nonzero().tolist():
        if target < targets.count[image]:
            result[layer, image, query, target] = pair_cost(
                logits[layer, image, query, targets.labels[image, target]].item(),
                boxes[layer, image, query].tolist(),
                targets.boxes[image, target].tolist(),
                **costs,
            )
    return result


def in_slots(cost: Tensor, scene: Scene) -> Tensor:
    """The costs, zero in empty slots."""
    return cost * scene.targets.mask[:, None]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"cost_class": 0.0},
        {"cost_bbox": 0.0},
        {"cost_giou": 0.0},
        {"cost_class": 7.0},
        {"giou_eps": 0.1},
    ],
)
def test_equals_the_formula(change):
    scene = random_scene((3, 0, 4), queries=7, dtype=torch.float64)
    cost = matching_cost(*scene, **COSTS | change)
    torch.testing.assert_close(in_slots(cost, scene), expected_cost(scene, **COSTS | change))


def test_float32_is_close_to_float64():
    scene = random_scene((3, 0, 4), queries=7)
    cost = matching_cost(*scene, **COSTS)
    assert cost.dtype == torch.float32
    expected = expected_cost(scene, **COSTS).float()
    torch.testing.assert_close(in_slots(cost, scene), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_is_computed_in_float32():
    scene = random_scene((3, 2))
    half = scene._replace(logits=scene.logits.bfloat16(), boxes=scene.boxes.bfloat16())
    rounded = scene._replace(logits=half.logits.float(), boxes=half.boxes.float())
    cost = matching_cost(*half, **COSTS)
    assert cost.dtype == torch.float32
    assert torch.equal(cost, matching_cost(*rounded, **COSTS))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38, -3e38])
@pytest.mark.parametrize("place", ["logits", "boxes"])
def test_always_finite(bad, place):
    scene = random_scene((3, 2))
    clean = matching_cost(*scene, **COSTS)
    getattr(scene, place)[:, :, 5] = bad
    cost = matching_cost(*scene, **COSTS)
    assert cost.isfinite().all()
    others = torch.arange(12) != 5
    assert torch.equal(cost[:, :, others], clean[:, :, others])
    if math.isnan(bad) or place == "boxes":
        assert (cost[:, :, 5] >= WORST_COST).all()


def test_degenerate_boxes_are_finite_and_far_from_worst():
    scene = random_scene((3, 2))
    scene.boxes[:, :, ::2, 2:] = 0.0
    scene.targets.boxes[:, 0, 2:] = 0.0
    assert matching_cost(*scene, **COSTS).abs().max() < 20


def test_without_class_cost_the_logits_are_not_read():
    scene = random_scene((3, 2))
    costs = COSTS | {"cost_class": 0.0}
    expected = matching_cost(*scene, **costs)
    other = scene._replace(logits=torch.full_like(scene.logits, float("nan")))
    assert torch.equal(matching_cost(*other, **costs), expected)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_empty_slots_are_finite_and_do_not_matter(value):
    scene = random_scene((3, 0))
    garbage = scene._replace(targets=with_garbage_padding(scene.targets, 3, value))
    cost = matching_cost(*garbage, **COSTS)
    assert cost.isfinite().all()
    filled = scene.targets.mask[:, None].expand_as(cost[0])
    assert torch.equal(cost[:, filled], matching_cost(*scene, **COSTS)[:, filled])


def test_without_target_slots():
    scene = random_scene((0, 0), empty_slots=0)
    assert matching_cost(*scene, **COSTS).shape == (2, 2, 12, 0)
