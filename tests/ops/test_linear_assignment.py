"""Linear assignment against all permutations and against SciPy, problem by problem."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from msdetr.ops.linear_assignment import linear_assignment, linear_assignment_of_layers


def minimum_cost(cost: Tensor) -> float:
    """Minimum over all assignments of different queries to the targets (columns), by trial."""
    queries, targets = cost.shape
    if targets > queries:
        return minimum_cost(cost.T)
    return min(
        sum(cost[query, target].item() for target, query in enumerate(chosen))
        for chosen in permutations(range(queries), targets)
    )


def check(cost: Tensor, count: Tensor) -> None:
    """The result is an assignment of minimum cost."""
    query_index, matched = linear_assignment(cost, count)
    problems, queries, slots = cost.shape
    assert query_index.shape == matched.shape == (problems, slots)
    assert query_index.dtype == torch.int64
    assert matched.dtype == torch.bool
    assert not query_index[~matched].any()
    for problem, targets in enumerate(count.tolist()):
        mine = matched[problem]
        assert not mine[targets:].any()
        assert mine.sum() == min(targets, queries)
        chosen = query_index[problem, mine]
        assert len(chosen.unique()) == len(chosen)
        total = cost[problem, chosen, mine.nonzero()[:, 0]].double().sum().item()
        assert total == pytest.approx(minimum_cost(cost[problem, :, :targets]))


@pytest.mark.parametrize(
    ("queries", "slots", "count"),
    [
        (5, 3, [3, 2, 0, 1]),
        (3, 5, [5, 4, 3, 0]),  # more targets than queries
        (1, 3, [3, 1, 0]),
        (4, 1, [1, 0]),
        (6, 6, [6]),
        (3, 2, [0, 0]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minimum_cost(queries, slots, count, dtype):
    cost = torch.randn(len(count), queries, slots, dtype=dtype)
    check(cost, torch.tensor(count))


@pytest.mark.parametrize("largest", [1e30, 1e35, 3e38, torch.finfo(torch.float32).max, 1e250])
def test_huge_costs(largest):
    cost = torch.rand(4, 5, 3, dtype=torch.float64)
    cost[2:] = 2.0 * cost[2:] - 1.0
    cost[:, 3, 2] = 1.0
    check(
        (cost * largest).to(torch.float64 if largest > 1e39 else torch.float32), torch.full((4,), 3)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scale", [1.0, 3e38])
def test_costs_that_are_not_finite_come_last(bad, scale):
    cost = scale * torch.rand(3, 5, 3)
    cost[0] = bad
    cost[1, 2] = bad
    cost[2, 1:, 1] = bad
    query_index, matched = linear_assignment(cost, torch.tensor([3, 3, 3]))
    assert matched.all()
    assert all(len(set(queries)) == 3 for queries in query_index.tolist())
    assert 2 not in query_index[1].tolist()
    assert query_index[2, 1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """The number of targets need not be a number of that type."""
    cost, count = torch.rand(1, 300, 257).to(dtype), torch.tensor([257])
    result = linear_assignment(cost, count)
    assert result[1].all()
    assert all(map(torch.equal, result, linear_assignment(cost.float(), count)))


@pytest.mark.parametrize("cost", [torch.zeros(2, 4, 3), torch.randint(2, (8, 4, 3)).float()])
def test_ties(cost):
    check(cost, torch.full((len(cost),), 3))


@pytest.mark.parametrize(("problems", "queries", "slots"), [(2, 3, 0), (0, 3, 2), (2, 0, 2)])
def test_nothing_to_assign(problems, queries, slots):
    count = torch.zeros(problems, dtype=torch.int64) + min(slots, 2)
    query_index, matched = linear_assignment(torch.zeros(problems, queries, slots), count)
    assert query_index.shape == matched.shape == (problems, slots)
    assert not matched.any()


def test_empty_slots_do_not_matter():
    cost, count = torch.rand(3, 6, 5), torch.tensor([5, 2, 0])
    result = linear_assignment(cost, count)
    cost[1, :, 2:] = -1e9
    cost[2] = float("nan")
    assert all(map(torch.equal, result, linear_assignment(cost, count)))


def test_pairs_equal_those_of_scipy():
    cost, count = torch.rand(4, 50, 20), torch.tensor([20, 13, 1, 0])
    query_index, matched = linear_assignment(cost, count)
    for problem, targets in enumerate(count.tolist()):
        rows, columns = linear_sum_assignment(cost[problem, :, :targets].numpy())
        result = [(query_index[problem, target].item(), target) for target in range(targets)]
        assert sorted(result) == sorted(zip(rows.tolist(), columns.tolist(), strict=True))
        assert matched[problem].sum() == targets


def test_costs_may_require_gradients_and_be_strided():
    cost, count = torch.rand(5, 3, 4), torch.tensor([3, 3, 2, 1])
    strided = cost.permute(2, 0, 1).requires_grad_()
    expected = linear_assignment(strided.detach().contiguous(), count)
    assert all(map(torch.equal, linear_assignment(strided, count), expected))
    assert torch.equal(strided.detach(), cost.permute(2, 0, 1))


@pytest.mark.parametrize(
    ("queries", "slots", "count"),
    [(6, 2, [2, 1, 0]), (5, 3, [3, 2, 0]), (2, 2, [2, 1]), (1, 1, [1]), (3, 0, [0]), (4, 2, [0])],
)
@pytest.mark.parametrize("copies", [2, 3])
def test_copies_are_repeated_columns(queries, slots, count, copies):
    cost, labels = torch.randn(2, len(count), queries, slots), torch.arange(slots).add(4)
    result = linear_assignment_of_layers(
        cost, torch.tensor(count), labels.repeat(len(count), 1), copies=copies
    )
    query_index, mask, target_class = result
    assert query_index.shape == mask.shape == (2, len(count), slots, copies)
    assert not query_index[~mask].any()
    for layer, image in ((layer, image) for layer in range(2) for image in range(len(count))):
        targets, mine = count[image], mask[layer, image]
        assert mine.sum() == min(queries, copies * targets)
        assert not mine[targets:].any()
        pairs = [
            (query, target)
            for target in range(slots)
            for query in query_index[layer, image, target, mine[target]].tolist()
        ]
        used = [query for query, _ in pairs]
        assert len(set(used)) == len(used)
        for target in range(slots):
            mine_of_target = [query for query, owner in pairs if owner == target]
            assert mine_of_target == sorted(mine_of_target)
            assert mine[target].tolist() == [i < len(mine_of_target) for i in range(copies)]
        total = sum(cost[layer, image, query, target].item() for query, target in pairs)
        repeated = cost[layer, image, :, :targets].repeat(1, copies)
        assert total == pytest.approx(minimum_cost(repeated), rel=1e-5, abs=1e-5)
        expected = dict.fromkeys(range(queries), -1) | {q: 4 + t for q, t in pairs}
        assert target_class[layer, image].tolist() == list(expected.values())


def test_fewer_than_one_copy_is_refused():
    with pytest.raises(ValueError, match="copies must be at least 1"):
        linear_assignment_of_layers(torch.rand(1, 1, 3, 2), torch.tensor([2]), None, copies=0)
