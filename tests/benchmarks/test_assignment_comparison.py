"""Implementations of assignment agree, and the comparison objects to what is wrong."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.assignment.cases import CONFIG, Case, Inputs, image_targets, make_inputs
from benchmarks.assignment.comparison import taken_pairs, what_is_wrong
from benchmarks.assignment.implementations import (
    IMPLEMENTATIONS,
    dense_one_to_many,
    dense_one_to_one,
    torch_linear_assignment,
)


def ragged_inputs(task: str) -> Inputs:
    """Three images with 5, 0 and 2 targets."""
    inputs = make_inputs(Case(task, 3, 30, 5))
    targets = inputs.targets._replace(count=torch.tensor([5, 0, 2]))
    return inputs._replace(targets=targets, image_targets=image_targets(targets))


@pytest.mark.parametrize(
    ("name", "task"),
    [
        (name, task)
        for name in ("reference", "published", "scipy")
        for task in IMPLEMENTATIONS[name].runs
    ],
)
def test_all_agree_on_ragged_images(name: str, task: str) -> None:
    inputs = ragged_inputs(task)
    assert what_is_wrong(IMPLEMENTATIONS[name].runs[task](inputs), inputs) is None


def test_the_draw_is_exercised() -> None:
    inputs = make_inputs(Case("one_to_many", 2, 300, 20))
    kept = dense_one_to_many(inputs, "reference").mask.sum((2, 3))
    assert kept.max() == int(CONFIG.positive_fraction * 300)


def test_a_missing_pair_is_wrong() -> None:
    inputs = make_inputs(Case("one_to_many", 2, 30, 5))
    pairs = dense_one_to_many(inputs, "reference")
    mask = pairs.mask.clone()
    mask[3, 1, 2, 0] = False
    wrong = what_is_wrong(pairs._replace(mask=mask), inputs)
    assert wrong == "other numbers of queries per target"


def test_a_worse_query_is_wrong() -> None:
    inputs = make_inputs(Case("one_to_many", 2, 30, 5))
    pairs = dense_one_to_many(inputs, "reference")
    query_index = pairs.query_index.clone()
    taken = taken_pairs(pairs, inputs)[3, 1, 2]
    query_index[3, 1, 2, 0] = int((~taken).nonzero()[0, 0])
    wrong = what_is_wrong(pairs._replace(query_index=query_index), inputs)
    assert wrong is not None
    assert "values differ" in wrong


def test_a_costlier_assignment_is_wrong() -> None:
    inputs = make_inputs(Case("one_to_one", 2, 30, 5))
    query, mask = dense_one_to_one(inputs, "reference")
    query = query.clone()
    query[4, 0] = next(index for index in range(30) if index not in query[4].tolist())
    wrong = what_is_wrong((query, mask), inputs)
    assert wrong is not None
    assert "values differ" in wrong


def test_a_query_with_two_targets_is_wrong_where_it_must_have_one() -> None:
    inputs = make_inputs(Case("one_to_one", 1, 8, 2))
    # Queries are all the same, so that no assignment costs more than another.
    logits, boxes = (x[:, :, :1].expand_as(x) for x in (inputs.logits, inputs.boxes))
    inputs = inputs._replace(logits=logits, boxes=boxes)
    query, mask = dense_one_to_one(inputs, "reference")
    assert what_is_wrong((query, mask), inputs) is None
    both = query[:, :1].expand(-1, 2)
    assert what_is_wrong((both, mask), inputs) == "queries that serve several targets"


def test_torch_linear_assignment_is_given_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def batch_linear_assignment(cost: Tensor) -> Tensor:
        """As the package: [P, workers, tasks], the task of each worker."""
        assert cost.shape == (18, 5, 30)
        return torch.stack(
            [torch.from_numpy(linear_sum_assignment(problem.numpy())[1]) for problem in cost]
        )

    package: Any = ModuleType("torch_linear_assignment")
    package.batch_linear_assignment = batch_linear_assignment
    monkeypatch.setitem(sys.modules, "torch_linear_assignment", package)
    inputs = ragged_inputs("one_to_one")
    assert what_is_wrong(torch_linear_assignment(inputs), inputs) is None
