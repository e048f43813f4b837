"""The restated assignment is the published one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.assignment.cases import CONFIG, Case, Inputs, image_targets, make_inputs
from benchmarks.assignment.comparison import taken_pairs
from benchmarks.assignment.published import Pairs, published_one_to_many, published_one_to_one
from msdetr.assignment.one_to_many import assign_one_to_many
from msdetr.structures import Predictions
from parity.golden import GoldenCase, find_cases

GOLDEN = Path(__file__).parent / "golden"


def golden_inputs(case: GoldenCase, task: str) -> Inputs:
    targets = case.targets()
    logits, boxes = case.tensor("pred_logits")[None], case.tensor("pred_boxes")[None]
    priority = (
        case.tensor("priority")[None] if "priority" in case.arrays else torch.rand(logits.shape[:3])
    )
    return Inputs(task, logits, boxes, targets, image_targets(targets), priority)


def golden_pairs(case: GoldenCase, inputs: Inputs) -> Tensor:
    pairs = [
        torch.from_numpy(case.arrays[f"pairs{image}"]).unbind(1)
        for image in range(len(inputs.image_targets))
    ]
    return taken_pairs([pairs], inputs)


@pytest.mark.parametrize("case", find_cases(GOLDEN, ("o2m_",)), ids=lambda case: case.name)
def test_the_restated_one_to_many_is_the_published_one(case: GoldenCase) -> None:
    inputs = golden_inputs(case, "one_to_many")
    result = published_one_to_many(inputs, k=case.info["k"], threshold=case.info["threshold"])
    assert torch.equal(taken_pairs(result, inputs), golden_pairs(case, inputs))

    assert torch.equal(last_class(result, inputs)[0], case.tensor("target_class"))


def last_class(pairs: Pairs, inputs: Inputs) -> Tensor:
    """[N, B, Q], the class of the last pair of each query, -1 for none."""
    target_class = torch.full(inputs.logits.shape[:3], -1)
    for layer, images in enumerate(pairs):
        for image, (queries, targets) in enumerate(images):
            labels = inputs.image_targets[image][0]
            for query, target in zip(queries.tolist(), targets.tolist(), strict=True):
                target_class[layer, image, query] = labels[target]
    return target_class


def test_the_restated_pairs_are_in_ascending_order_of_score() -> None:
    inputs = make_inputs(Case("one_to_many", 2, 12, 8))
    pairs = published_one_to_many(inputs)
    served = taken_pairs(pairs, inputs).sum(2)
    assert served.max() > 1
    expected = assign_one_to_many(
        Predictions(inputs.logits, inputs.boxes),
        inputs.targets,
        CONFIG,
        priority=inputs.priority,
        impl="reference",
    )
    assert torch.equal(last_class(pairs, inputs), expected.target_class)


@pytest.mark.parametrize("case", find_cases(GOLDEN, ("o2o_",)), ids=lambda case: case.name)
def test_the_restated_one_to_one_is_the_published_one(case: GoldenCase) -> None:
    weights = case.info["cost"]
    assert (weights["class_"], weights["bbox"], weights["giou"]) == (
        CONFIG.cost_class,
        CONFIG.cost_bbox,
        CONFIG.cost_giou,
    )
    inputs = golden_inputs(case, "one_to_one")
    taken = taken_pairs(published_one_to_one(inputs), inputs)
    assert torch.equal(taken, golden_pairs(case, inputs))
