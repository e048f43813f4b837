"""One-to-one assignment: pairs, and the class that each query is to predict."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scenes import Scene, match, padded_targets, random_scene, with_garbage_padding
from scipy.optimize import linear_sum_assignment

from msdetr.ops.matching_cost import matching_cost
from msdetr.structures import Targets
from msdetr.supervision.matchers import Hungarian

COSTS = {"cost_class": 2.0, "cost_bbox": 5.0, "cost_giou": 2.0}
MATCHER = Hungarian(**COSTS)


@pytest.mark.parametrize(
    ("counts", "queries"), [((3, 0, 5), 12), ((0, 0), 4), ((7, 2), 4), ((1,), 1)]
)
@pytest.mark.parametrize("giou_eps", [0.0, 1.0])
def test_pairs_are_those_of_least_cost_and_classes_follow(counts, queries, giou_eps):
    scene = random_scene(counts, layers=3, queries=queries)
    targets = scene.targets
    assignment = match(replace(MATCHER, giou_eps=giou_eps), scene)
    slots = targets.labels.shape[1]
    assert assignment.query_index.shape == assignment.mask.shape == (3, len(counts), slots, 1)
    assert assignment.target_class.shape == scene.logits.shape[:3]

    cost = matching_cost(*scene, **COSTS, giou_eps=giou_eps)
    for layer in range(3):
        for image, count in enumerate(counts):
            pairs = linear_sum_assignment(cost[layer, image, :, :count])
            expected = torch.full((queries,), -1)
            for query, target in zip(*pairs, strict=True):
                assert assignment.mask[layer, image, target, 0]
                assert assignment.query_index[layer, image, target, 0] == query
                expected[query] = targets.labels[image, target]
            assert assignment.mask[layer, image].sum() == len(pairs[0])
            assert torch.equal(assignment.target_class[layer, image], expected)


def test_by_hand():
    boxes = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]])
    targets = padded_targets([torch.tensor([2, 1])], [boxes[[1, 0]]], slots=4)
    assignment = match(MATCHER, Scene(torch.zeros(1, 1, 3, 3), boxes[None, None], targets))
    assert assignment.query_index.flatten().tolist() == [1, 0, 0, 0]
    assert assignment.mask.flatten().tolist() == [True, True, False, False]
    assert assignment.target_class.flatten().tolist() == [1, 2, -1]


@pytest.mark.parametrize("value", [None, float("nan")])
def test_empty_slots_do_not_matter(value):
    scene = random_scene((4, 0, 2), empty_slots=5)
    garbage = scene._replace(targets=with_garbage_padding(scene.targets, 3, value))
    assert all(map(torch.equal, match(MATCHER, scene), match(MATCHER, garbage)))


def test_layers_and_images_are_independent():
    scene = random_scene((4, 0, 7), layers=2)
    batched = match(MATCHER, scene)
    for layer in range(2):
        for image in range(3):
            one = slice(image, image + 1)
            targets = Targets(*(field[one] for field in scene.targets))
            logits, boxes = (x[layer : layer + 1, one] for x in (scene.logits, scene.boxes))
            alone = match(MATCHER, Scene(logits, boxes, targets))
            expected = [field[layer : layer + 1, one] for field in batched]
            assert all(map(torch.equal, alone, expected))


def test_predictions_that_are_not_finite_go_to_no_target():
    scene = random_scene((3, 2), queries=8)
    scene.logits[:, :, 2] = float("nan")
    scene.boxes[:, :, 5] = float("inf")
    assignment = match(MATCHER, scene)
    assert assignment.mask.sum() == 2 * 5
    assert (assignment.target_class[:, :, [2, 5]] == -1).all()


def test_every_target_is_served_even_by_nan():
    scene = random_scene((3,), queries=4)
    nothing = Scene(scene.logits * float("nan"), scene.boxes * float("nan"), scene.targets)
    assert match(MATCHER, nothing).mask.sum() == 2 * 3
