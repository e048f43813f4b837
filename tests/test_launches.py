"""What counts as a launch, and how many the assignment of a training step takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scenes import random_boxes, random_scene

from benchmarks.launches import count_interpreted
from msdetr.config import AssignmentConfig, LossConfig
from msdetr.ops.linear_assignment import linear_assignment
from msdetr.ops.one_to_many import one_to_many
from msdetr.structures import Branch, DetectorOutput, Predictions, Targets
from msdetr.supervision.criterion import Criterion

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what is interpreted")

DEFAULT = AssignmentConfig()
BY_PREDICTIONS = AssignmentConfig(encoder_match="predictions", encoder_cost_class=2.0)
ONE_TO_ONE = Counter(matching_cost_kernel=1, best_columns_kernel=1, linear_assignment_kernel=1)
ONE_TO_MANY = Counter(score_kernel=1, best_queries_kernel=1, select_kernel=1)

x = torch.arange(6.0).view(2, 3)


def launches_of(call: Callable[[], object]) -> Counter[str]:
    with torch.no_grad(), count_interpreted() as launches:
        call()
    return launches


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: x.mT[None].expand(5, -1, -1).unflatten(1, (3, 1)).detach(), []),
        (lambda: torch.empty(3) is torch.empty_like(x) is x.new_empty(2), []),
        (lambda: x.contiguous().float(), []),
        (lambda: x.mT.contiguous(), ["clone"]),
        (lambda: x.mT.reshape(-1), ["clone"]),
        (lambda: x.double(), ["_to_copy"]),
        (lambda: torch.zeros(3), ["zeros"]),
        (lambda: x.new_full((2,), 1.0), ["new_full"]),
        (lambda: x.clone().copy_(x), ["clone", "copy_"]),
        (lambda: torch.where(x > 2, x, 0.0), ["gt", "where"]),
        (lambda: x.sum() + 1, ["sum", "add"]),
    ],
)
def test_what_is_a_launch(call, expected):
    assert not launches_of(call) - Counter({"scalar_tensor": 1}) - Counter(expected)
    assert not Counter(expected) - launches_of(call)


def test_operators_of_ours_are_looked_into():
    """The reference of linear assignment copies to the host and back, and does more than that."""
    cost, count = torch.rand(2, 3, 2), torch.tensor([2, 1])
    result = launches_of(lambda: linear_assignment(cost, count, impl="reference"))
    assert {"cat", "new_full", "scatter_"} <= result.keys()
    result = launches_of(lambda: linear_assignment(cost, count, impl="triton"))
    assert result == ONE_TO_ONE - Counter(matching_cost_kernel=1)


def step(counts: tuple[int, ...] = (3, 5)) -> tuple[DetectorOutput, Targets]:
    """What a two-stage detector of six layers computes for two images."""
    scene, many = (random_scene(counts, layers=6, classes=4) for _ in range(2))
    proposals = Predictions(torch.randn(1, len(counts), 40, 4), random_boxes(1, len(counts), 40))
    output = DetectorOutput(
        {
            "one_to_one": Branch(Predictions(scene.logits, scene.boxes)),
            "one_to_many": Branch(Predictions(many.logits, many.boxes)),
            "encoder": Branch(proposals, random_boxes(len(counts), 40)),
        }
    )
    return output, scene.targets


@pytest.mark.parametrize(
    ("config", "counts"),
    [(DEFAULT, (3, 5)), (BY_PREDICTIONS, (3, 5)), (DEFAULT, (0, 0)), (DEFAULT, (14, 2))],
)
def test_all_assignments_of_a_step(config, counts):
    output, targets = step(counts)
    criterion = Criterion(config, LossConfig(), impl="triton")
    expected = ONE_TO_ONE + ONE_TO_ONE + ONE_TO_MANY
    assert expected.total() == 9
    priority = {"one_to_many": torch.rand(6, 2, 12)}
    result = launches_of(lambda: criterion.assign(output, targets, priority=priority))
    assert result == expected


def test_hybrid_queries_take_three_more():
    output, targets = step((1, 2))
    hybrid = Branch(Predictions(torch.randn(1, 2, 20, 4), random_boxes(1, 2, 20)))
    extended = DetectorOutput(output.branches | {"hybrid": hybrid})
    criterion = Criterion(DEFAULT, LossConfig(), impl="triton")
    priority = {"one_to_many": torch.rand(6, 2, 12)}
    result = launches_of(lambda: criterion.assign(extended, targets, priority=priority))
    assert result == ONE_TO_ONE + ONE_TO_ONE + ONE_TO_ONE + ONE_TO_MANY


def test_groups_copy_the_targets_of_a_step_once():
    """Labels, boxes and counts."""
    output, targets = step((1, 2))
    selected = output.branches["encoder"]._replace(anchors=None)
    grouped = DetectorOutput(
        {
            name: branch._replace(num_groups=2)
            for name, branch in (output.branches | {"encoder_selected": selected}).items()
            if name != "encoder"
        }
    )
    criterion = Criterion(DEFAULT, LossConfig(), impl="triton")
    priority = {"one_to_many": torch.rand(6, 2, 12)}
    result = launches_of(lambda: criterion.assign(grouped, targets, priority=priority))
    assert result == ONE_TO_ONE + ONE_TO_ONE + ONE_TO_MANY + Counter(clone=3)


def test_a_priority_that_is_not_given_is_drawn():
    output, targets = step()
    criterion = Criterion(DEFAULT, LossConfig(), impl="triton")
    launches = launches_of(lambda: criterion.assign(output, targets))
    assert launches == ONE_TO_ONE + ONE_TO_ONE + ONE_TO_MANY + Counter(rand=1)


def test_merging_takes_a_few_more():
    output, targets = step()
    criterion = Criterion(replace(DEFAULT, indices_merge=True), LossConfig(), impl="triton")
    assert launches_of(lambda: criterion.assign(output, targets)).total() <= 9 + 1 + 11


def test_strided_predictions_are_not_copied():
    scene = random_scene((3, 5), layers=2)
    logits = scene.logits.transpose(0, 3).contiguous().transpose(0, 3)
    boxes = scene.boxes.transpose(1, 2).contiguous().transpose(1, 2)
    options = {"k": 3, "threshold": 0.4, "positive_fraction": 0.25, "impl": "triton"}
    priority = torch.rand(2, 12, 2).mT.half()
    result = launches_of(lambda: one_to_many(logits, boxes, scene.targets, priority[0], **options))
    assert result == ONE_TO_MANY
