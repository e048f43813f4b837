"""Both assignments against the published matchers."""

from __future__ import annotations

import pytest
import torch

from msdetr.config import AssignmentConfig
from msdetr.ops.linear_assignment import linear_assignment
from msdetr.ops.matching_cost import matching_cost
from msdetr.ops.one_to_many import one_to_many
from msdetr.structures import Assignment, Branch, Predictions, Targets
from msdetr.supervision.matchers import MatchContext, one_to_many_matcher
from parity.golden import GoldenCase, published_pairs


def _device(impl: str, request: pytest.FixtureRequest) -> torch.device:
    if impl == "triton":
        return request.getfixturevalue("kernel_device")
    return torch.device("cpu")


def _scene(case: GoldenCase, device: torch.device) -> tuple[Predictions, Targets]:
    predictions = (case.tensor(f"pred_{name}")[None].to(device) for name in ("logits", "boxes"))
    return Predictions(*predictions), Targets(*(field.to(device) for field in case.targets()))


@pytest.mark.golden("o2m_")
def test_one_to_many(case: GoldenCase, impl: str, request: pytest.FixtureRequest) -> None:
    device = _device(impl, request)
    predictions, targets = _scene(case, device)
    priority = case.tensor("priority").to(device)
    options = {"k": case.info["k"], "threshold": case.info["threshold"]}
    pairs = one_to_many(
        *predictions,
        targets,
        priority,
        positive_fraction=0.25,
        impl=impl,
        **options,
    )
    found = Assignment(pairs.query_index, pairs.mask, pairs.best_class)
    for image in range(len(targets.count)):
        assert published_pairs(found, 0, image) == case.pairs(f"pairs{image}")
        cost = case.tensor(f"cost{image}")
        for target, place in pairs.mask[0, image].nonzero().tolist():
            query = pairs.query_index[0, image, target, place].cpu()
            score = pairs.score[0, image, target, place].cpu()
            torch.testing.assert_close(score, cost[target, query])

    config = AssignmentConfig(
        one_to_many_k=options["k"], one_to_many_threshold=options["threshold"]
    )
    context = MatchContext(priority=priority, impl=impl)
    assignment = one_to_many_matcher(config)(Branch(predictions), targets, context)
    assert torch.equal(assignment.target_class[0].cpu(), case.tensor("target_class"))


@pytest.mark.golden("o2m_")
def test_one_to_many_on_a_cpu(case: GoldenCase) -> None:
    """The default on a CPU gives the very result of the reference."""
    scene, priority = _scene(case, torch.device("cpu")), case.tensor("priority")
    options = {"k": case.info["k"], "threshold": case.info["threshold"], "positive_fraction": 0.25}
    results = (
        one_to_many(*scene[0], scene[1], priority, impl=impl, **options)
        for impl in ("auto", "reference")
    )
    assert all(map(torch.equal, *results))


@pytest.mark.golden("o2o_")
def test_one_to_one(case: GoldenCase, impl: str, request: pytest.FixtureRequest) -> None:
    predictions, targets = _scene(case, _device(impl, request))
    weights = case.info["cost"]
    cost = matching_cost(
        *predictions,
        targets,
        cost_class=weights["class_"],
        cost_bbox=weights["bbox"],
        cost_giou=weights["giou"],
        impl=impl,
    )
    query_index, mask = linear_assignment(cost[0], targets.count, impl=impl)
    for image in range(len(targets.count)):
        served = mask[image].nonzero().flatten().tolist()
        result = [[int(query_index[image, target]), target] for target in served]
        assert result == case.pairs(f"pairs{image}")
