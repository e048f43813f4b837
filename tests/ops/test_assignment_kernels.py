"""The kernels of assignment against their references: matching cost, linear assignment (SciPy) and
one-to-many. On a GPU if there is one, otherwise in Triton's interpreter.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.test_one_to_many import tied_scene
from scenes import Scene, match, padded_targets, random_scene, with_garbage_padding
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from msdetr.ops.linear_assignment import WORST_COST as LINEAR_WORST_COST
from msdetr.ops.linear_assignment import linear_assignment, linear_assignment_of_layers
from msdetr.ops.matching_cost import WORST_COST, matching_cost
from msdetr.ops.one_to_many import OneToMany, one_to_many
from msdetr.structures import Targets
from msdetr.supervision.matchers import Hungarian

pytest.importorskip("triton")

COSTS = {"cost_class": 2.0, "cost_bbox": 5.0, "cost_giou": 2.0}
OPTIONS = {"k": 3, "threshold": 0.4, "positive_fraction": 0.5}
FEW = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def _poisoned(kernel_device: torch.device) -> Iterator[None]:
    """Fill uninitialised memory with NaN and large numbers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1, device=kernel_device).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def moved(scene: Scene, device: torch.device) -> Scene:
    targets = Targets(*(field.to(device) for field in scene.targets))
    return Scene(scene.logits.to(device), scene.boxes.to(device), targets)


class TestMatchingCost:
    def check(self, scene: Scene, device: torch.device, **costs: float) -> Tensor:
        """Compare with float64, in the slots that hold targets."""
        result = matching_cost(*moved(scene, device), **costs, impl="triton").cpu()
        exact = matching_cost(
            scene.logits.double(),
            scene.boxes.double(),
            scene.targets._replace(boxes=scene.targets.boxes.double()),
            **costs,
        )
        filled = scene.targets.mask[:, None].expand_as(exact[0])
        assert result.dtype == torch.float32
        assert result.shape == exact.shape
        assert result.isfinite().all()
        torch.testing.assert_close(
            result[:, filled], exact[:, filled].float(), rtol=2e-5, atol=2e-5
        )
        return result

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
    def test_equals_the_reference(self, kernel_device, change):
        self.check(random_scene((3, 0, 4), queries=7), kernel_device, **COSTS | change)

    def test_more_queries_than_a_block(self, kernel_device):
        self.check(random_scene((2,), layers=1, queries=300), kernel_device, **COSTS)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, kernel_device, dtype):
        scene = random_scene((3, 2))
        self.check(
            scene._replace(logits=scene.logits.to(dtype), boxes=scene.boxes.to(dtype)),
            kernel_device,
            **COSTS,
        )

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
    @pytest.mark.parametrize("place", ["logits", "boxes"])
    def test_always_finite(self, kernel_device, bad, place):
        scene = random_scene((3, 2), empty_slots=0)
        getattr(scene, place)[:, :, 5] = bad
        result = matching_cost(*moved(scene, kernel_device), **COSTS, impl="triton").cpu()
        assert result.isfinite().all()
        if place == "boxes" or bad != bad:
            filled = scene.targets.mask[None].expand(2, -1, -1)
            assert (result[:, :, 5][filled] >= WORST_COST).all()

    def test_degenerate_boxes(self, kernel_device):
        scene = random_scene((3, 2))
        scene.boxes[:, :, ::2, 2:] = 0.0
        scene.targets.boxes[:, 0, 2:] = 0.0
        self.check(scene, kernel_device, **COSTS)
        self.check(scene, kernel_device, **COSTS, giou_eps=1e-6)

    def test_without_class_cost_the_logits_are_not_read(self, kernel_device):
        scene = random_scene((3, 2))
        scene.logits.fill_(float("nan"))
        self.check(scene, kernel_device, **COSTS | {"cost_class": 0.0})

    def test_one_class(self, kernel_device):
        scene = random_scene((3, 2))
        expected = scene._replace(
            targets=scene.targets._replace(labels=torch.zeros_like(scene.targets.labels))
        )
        expected = self.check(expected, kernel_device, **COSTS)
        assert torch.equal(self.check(scene, kernel_device, **COSTS, class_agnostic=True), expected)

    def test_strided_and_empty(self, kernel_device):
        scene = random_scene((3, 2))
        strided = scene._replace(
            boxes=scene.boxes.transpose(1, 2).contiguous().transpose(1, 2),
            logits=scene.logits.transpose(0, 3).contiguous().transpose(0, 3),
        )
        expected = self.check(scene, kernel_device, **COSTS)
        assert torch.equal(self.check(strided, kernel_device, **COSTS), expected)
        scene = moved(random_scene((0, 0), empty_slots=0), kernel_device)
        assert matching_cost(*scene, **COSTS, impl="triton").shape == (2, 2, 12, 0)

    def test_classes_out_of_range_count_as_the_nearest(self, kernel_device):
        """Nothing beyond the logits of a query is read."""
        scene = moved(random_scene((3, 2)), kernel_device)
        costs = []
        for first, second in ((-1, 10**6), (0, scene.logits.shape[-1] - 1)):
            scene.targets.labels[0, :2] = torch.tensor([first, second])
            costs.append(matching_cost(*scene, **COSTS, impl="triton"))
        assert torch.equal(*costs)

    def test_float64_is_refused(self, kernel_device):
        scene = moved(random_scene((3, 2), dtype=torch.float64), kernel_device)
        with pytest.raises(NotImplementedError, match="float64 boxes"):
            matching_cost(*scene, **COSTS, impl="triton")


def check_assignment(cost: Tensor, count: Tensor, device: torch.device, *, unique: bool) -> None:
    """The kernel's assignment has the cost of SciPy's, and the same pairs if they are unique."""
    query_index, matched = (
        x.cpu() for x in linear_assignment(cost.to(device), count.to(device), impl="triton")
    )
    expected_index, expected_matched = linear_assignment(cost, count, impl="reference")
    assert query_index.shape == expected_index.shape
    assert query_index.dtype == torch.int64
    if unique:
        assert torch.equal(query_index, expected_index)
        assert torch.equal(matched, expected_matched)
        return
    assert torch.equal(matched.sum(1), expected_matched.sum(1))
    assert not query_index[~matched].any()
    for problem, targets in enumerate(count.tolist()):
        mine = matched[problem]
        assert not mine[targets:].any()
        chosen = query_index[problem, mine]
        assert len(chosen.unique()) == len(chosen)
        total = cost[problem, chosen, mine.nonzero()[:, 0]].double().sum().item()
        rows, columns = linear_sum_assignment(cost[problem, :, :targets].double().numpy())
        assert total == pytest.approx(
            cost[problem].double()[rows, columns].sum().item(), rel=1e-9, abs=1e-9
        )


def check_copies(
    cost: Tensor, count: Tensor, copies: int, device: torch.device, *, unique: bool
) -> None:
    """The kernel's assignment [N, B, Q, T] has the cost of SciPy's, with columns repeated.

    If `unique`, targets have the same queries.
    """
    layers, batch, queries, slots = cost.shape
    labels = torch.arange(1, 1 + slots).repeat(batch, 1)  # tells targets apart
    arguments = cost.to(device), count.to(device), labels.to(device)
    result = linear_assignment_of_layers(*arguments, copies=copies, impl="triton")
    query_index, mask, target_class = (x.cpu() for x in result)
    assert query_index.shape == mask.shape == (layers, batch, slots, copies)
    assert (query_index.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert not query_index[~mask].any()
    if unique:
        expected = linear_assignment_of_layers(cost, count, labels, copies=copies, impl="reference")
        assert torch.equal(query_index, expected[0])
        assert torch.equal(mask, expected[1])
    assert torch.equal(mask, mask.cumprod(3).bool())
    ascending = query_index.where(mask, queries)
    assert torch.equal(ascending, ascending.sort(3).values)
    for layer, image in itertools.product(range(layers), range(batch)):
        targets = int(count[image])
        mine, problem = mask[layer, image], cost[layer, image].double()
        assert not mine[targets:].any()
        assert mine.sum() == min(copies * targets, queries)
        chosen, owners = query_index[layer, image, mine], mine.nonzero()[:, 0]
        assert len(chosen.unique()) == len(chosen)
        expected_class = torch.full((queries,), -1)
        expected_class[chosen] = 1 + owners
        assert torch.equal(target_class[layer, image], expected_class)
        repeated = problem[:, :targets].repeat(1, copies)
        expected_total = repeated[linear_sum_assignment(repeated.numpy())].sum().item()
        total = problem[chosen, owners].sum().item()
        assert total == pytest.approx(expected_total, rel=1e-12, abs=1e-12)


class TestCopies:
    """Targets that get several queries."""

    @FEW
    @given(data=st.data())
    def test_random_problems(self, kernel_device, data):
        queries, slots = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 6))
        copies, is_tied = data.draw(st.integers(1, 7)), data.draw(st.booleans())
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        cost = torch.randn(2, 3, queries, slots, generator=generator)
        if is_tied:
            cost = cost.round()
        count = torch.randint(slots + 1, (3,), generator=generator)
        check_copies(cost, count, copies, kernel_device, unique=not is_tied)

    @pytest.mark.parametrize(
        ("queries", "slots", "copies", "count"),
        [
            (12, 4, 3, [4, 4]),  # as many places as queries
            (13, 4, 3, [4, 2]),
            (11, 4, 3, [4, 3, 0]),  # more places than queries, and not
            (5, 2, 7, [2, 1, 0]),
            (1, 1, 4, [1, 0]),
            (1, 3, 2, [3, 1, 0]),
            (9, 2, 4, [0, 0]),
            (9, 0, 4, [0, 0]),
            (150, 10, 6, [10, 7]),
            (64, 11, 6, [11, 10]),
            (2500, 2, 3, [2, 1]),  # more columns than a block
        ],
    )
    def test_shapes(self, kernel_device, queries, slots, copies, count):
        cost = torch.randn(1, len(count), queries, slots)
        check_copies(cost, torch.tensor(count), copies, kernel_device, unique=True)

    @pytest.mark.parametrize("queries", [100, 75])  # fewer than places in the second case
    def test_more_targets_than_a_block(self, kernel_device, monkeypatch, queries):
        from msdetr.kernels import linear_assignment as kernel

        monkeypatch.setattr(kernel, "_MAX_BLOCK", 32)
        cost = torch.randn(1, 2, queries, 40)
        check_copies(cost, torch.tensor([40, 34]), 2, kernel_device, unique=True)

    @pytest.mark.parametrize("queries", [26, 20])  # fewer than places in the second case
    def test_crowded_targets(self, kernel_device, queries):
        """Some targets are equal, all want the same queries, and two queries are equal."""
        cost = torch.arange(float(queries))[:, None] * torch.linspace(1.0, 2.0, 6)
        cost = cost + 0.01 * torch.rand(1, 2, queries, 6)
        count = torch.tensor([6, 4])
        check_copies(cost, count, 4, kernel_device, unique=True)
        cost[..., 1:4], cost[:, :, 3] = cost[..., :1], cost[:, :, 2]
        check_copies(cost, count, 4, kernel_device, unique=False)

    def test_as_far_as_a_list_is_won(self, kernel_device):
        """The second target wants, after its cheapest query, one of the first target's."""
        cost = torch.rand(1, 1, 14, 3) + 1.0
        cost[0, 0, [0, 1, 2], 0] = torch.tensor([0.1, 0.3, 0.2])
        cost[0, 0, [5, 2, 6], 1] = torch.tensor([0.1, 0.2, 0.3])
        check_copies(cost, torch.tensor([3]), 3, kernel_device, unique=True)

    @pytest.mark.parametrize(
        ("costs", "copies"),
        [
            # A target's potential is the cost of the last column that it keeps, not of the first.
            (
                [
                    [119, 33, 101, 111, 123, 119, 85, 141, 127, 131],
                    [40, 107, 61, 60, 69, 86, 109, 135, 99, 36],
                    [50, 36, 130, 112, 127, 71, 73, 115, 117, 34],
                ],
                3,
            ),
            # The third target loses its cheapest query, so it must not keep the next one.
            (
                [
                    [20, 20, 90, 83, 158, 275, 140, 201],
                    [43, 43, 55, 316, 368, 381, 358, 381],
                    [15, 60, 30, 205, 340, 283, 221, 347],
                ],
                2,
            ),
            # Equal costs stand in a target's list beside each other.
            ([[0, 0, 1, 0, 3, 3, 0, 3], [2, 1, 2, 0, 2, 2, 2, 3], [0, 3, 3, 1, 3, 1, 1, 2]], 2),
        ],
        ids=["last column kept", "cheapest column lost", "equal costs"],
    )
    def test_potentials_at_the_start(self, kernel_device, costs, copies):
        cost = torch.tensor(costs, dtype=torch.float32).T[None, None]
        check_copies(cost, torch.tensor([3]), copies, kernel_device, unique=False)

    def test_strided_costs(self, kernel_device):
        cost = torch.rand(5, 3, 2, 17).permute(2, 1, 3, 0)
        check_copies(cost, torch.tensor([5, 3, 0]), 3, kernel_device, unique=True)
        check_copies(cost.mT, torch.tensor([5, 3, 0]), 3, kernel_device, unique=True)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("queries", [7, 5])
    def test_costs_that_are_not_finite_come_last(self, kernel_device, bad, queries):
        cost = torch.rand(3, 1, queries, 3)
        cost[0] = bad
        cost[1, 0, 2] = bad
        cost[2, 0, 1:, 1] = bad
        count = torch.tensor([3])
        for device, impl in ((torch.device("cpu"), "reference"), (kernel_device, "triton")):
            query_index, mask, _ = linear_assignment_of_layers(
                cost.to(device), count.to(device), None, copies=2, impl=impl
            )
            chosen = query_index[mask].view(3, -1).cpu()
            assert chosen.shape[1] == min(queries, 6)
            assert all(len(set(row)) == chosen.shape[1] for row in chosen.tolist())
            if queries == 7:
                assert 2 not in chosen[1]
            assert query_index[2, 0, 1, 0] == 0

    def test_one_copy(self, kernel_device):
        """It is linear assignment, with a dimension more."""
        cost, count = torch.rand(2, 3, 7, 9).to(kernel_device), torch.tensor([9, 4, 0])
        count = count.to(kernel_device)
        result = linear_assignment_of_layers(cost, count, None, impl="triton")
        expected = linear_assignment(cost.flatten(0, 1), count.repeat(2), impl="triton")
        for a, b in zip(result, expected, strict=False):
            assert torch.equal(a.flatten(0, 1)[..., 0], b)

    @pytest.mark.interpreted
    def test_steps_of_searches(self, kernel_device, monkeypatch):
        """A search takes no more steps than there are targets, whatever the number of copies."""
        from msdetr.kernels import linear_assignment as kernel

        steps = []
        search, load_cost = kernel._search, kernel._load_cost

        def counted_search(*arguments):
            steps.append(0)
            monkeypatch.setattr(kernel, "_load_cost", counted_load)
            result = search(*arguments)
            monkeypatch.setattr(kernel, "_load_cost", load_cost)
            return result

        def counted_load(*arguments):
            steps[-1] += 1  # a step reads the costs of one target
            return load_cost(*arguments)

        monkeypatch.setattr(kernel, "_search", counted_search)
        cost = torch.rand(1, 1, 30, 3) + 1.0
        for target in range(3):
            cost[0, 0, 5 * target : 5 * target + 5, target] = torch.rand(5)
        check_copies(cost, torch.tensor([3]), 5, kernel_device, unique=True)
        assert not steps  # each target wins its five cheapest queries
        cost = torch.arange(30.0)[:, None] * torch.linspace(1.0, 2.0, 3)
        cost = cost + 0.01 * torch.rand(1, 1, 30, 3)
        check_copies(cost, torch.tensor([3]), 5, kernel_device, unique=True)
        assert len(steps) > 5
        assert max(steps) in (2, 3)

    @pytest.mark.gpu
    def test_sizes_of_training(self, kernel_device):
        for queries, slots, problems in ((1500, 100, 12), (300, 50, 12), (300, 60, 12)):
            cost = torch.randn(1, problems, queries, slots)
            count = torch.randint(slots + 1, (problems,))
            check_copies(cost, count, 6, kernel_device, unique=True)
        cost = torch.randint(4, (6, 100, 60, 10)).float()
        check_copies(cost, torch.randint(11, (100,)), 6, kernel_device, unique=False)


class TestLinearAssignment:
    @FEW
    @given(data=st.data())
    def test_random_problems(self, kernel_device, data):
        queries, slots = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        cost = torch.randn(8, queries, slots, generator=generator)
        count = torch.randint(slots + 1, (8,), generator=generator)
        check_assignment(cost, count, kernel_device, unique=True)

    @FEW
    @given(data=st.data())
    def test_ties(self, kernel_device, data):
        queries, slots = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        cost = torch.randint(3, (8, queries, slots), generator=generator).float()
        count = torch.randint(slots + 1, (8,), generator=generator)
        check_assignment(cost, count, kernel_device, unique=False)

    @pytest.mark.parametrize(
        ("queries", "slots", "count"),
        [
            (1, 1, [1, 0]),
            (6, 6, [6, 6]),
            (3, 7, [7, 3, 2, 0]),  # more targets than queries, and not
            (1, 5, [5, 1]),
            (300, 20, [20, 7]),
            (2500, 3, [3]),  # more columns than a block
        ],
    )
    def test_shapes(self, kernel_device, queries, slots, count):
        cost = torch.randn(len(count), queries, slots)
        check_assignment(cost, torch.tensor(count), kernel_device, unique=True)

    def test_rivals_for_the_same_queries(self, kernel_device):
        """All targets rank the queries equally: every search passes all earlier columns."""
        cost = torch.arange(24.0)[:, None] * torch.linspace(1.0, 2.0, 20)[None]
        cost = cost + 0.01 * torch.rand(2, 24, 20)
        check_assignment(cost, torch.tensor([20, 11]), kernel_device, unique=True)

    def test_long_path_through_several_warps(self, kernel_device):
        """The last target wants another's query, and each of ten targets yields to the next."""
        cost = torch.rand(1, 300, 120) + 2.0
        cost[0, range(119), range(119)] = 0.0
        chain = torch.randperm(119)[:10]
        cost[0, [*chain[1:], 200], chain] = 0.1
        cost[0, chain[0], 119] = -1.0
        check_assignment(cost, torch.tensor([120]), kernel_device, unique=True)

    @pytest.mark.parametrize(("queries", "slots"), [(7, 4), (4, 7), (5, 5), (3, 0)])
    @pytest.mark.parametrize("has_labels", [True, False])
    def test_classes_of_queries(self, kernel_device, queries, slots, has_labels):
        """Layers share the targets of their images."""
        cost, labels = torch.rand(3, 2, queries, slots), torch.randint(9, (2, slots))
        count = torch.tensor([slots, min(slots, 2)])
        arguments = cost, count, labels if has_labels else None
        on_device = [x if x is None else x.to(kernel_device) for x in arguments]
        result = linear_assignment_of_layers(*on_device, impl="triton")
        expected = linear_assignment_of_layers(*arguments, impl="reference")
        assert all(torch.equal(a.cpu(), b) for a, b in zip(result, expected, strict=True))
        query_index, mask, target_class = expected
        for layer, image, target, _ in mask.nonzero().tolist():
            query = query_index[layer, image, target, 0]
            label = labels[image, target] if has_labels else 0
            assert target_class[layer, image, query] == label
        assert (target_class >= 0).sum() == mask.sum()

    def test_cheapest_queries_that_are_contested(self, kernel_device):
        """Some targets get their cheapest query directly, others need a search."""
        cost = torch.rand(4, 40, 16)
        cost[:, :3] -= 1.0  # three queries that are cheapest for all targets
        cost[2:] = cost[2:].round(decimals=1)
        check_assignment(cost[:2], torch.tensor([16, 9]), kernel_device, unique=True)
        check_assignment(cost[2:], torch.tensor([16, 9]), kernel_device, unique=False)

    @pytest.mark.interpreted
    @pytest.mark.parametrize(("contested", "searches"), [(0, 0), (1, 1), (3, 3)])
    def test_only_contested_targets_search(self, kernel_device, monkeypatch, contested, searches):
        from msdetr.kernels import linear_assignment as kernel

        added = []
        add_row = kernel._add_row

        def counted(problem, state, row, *rest):
            added.append(row)
            add_row(problem, state, row, *rest)

        monkeypatch.setattr(kernel, "_add_row", counted)
        cost = torch.rand(1, 12, 8) + 1.0
        cost[0, range(8), range(8)] = 0.0
        cost[0, 0, 1 : 1 + contested] = -0.5  # the first query is the cheapest of more targets
        check_assignment(cost, torch.tensor([8]), kernel_device, unique=True)
        assert len(added) == searches

    def test_large_and_close_costs(self, kernel_device):
        cost = torch.rand(2, 12, 6) * 1e-6 + 1e3
        cost[0, 3] = 1e6
        check_assignment(cost, torch.tensor([6, 4]), kernel_device, unique=False)

    @pytest.mark.parametrize(
        ("largest", "dtype"),
        [
            (1e30, torch.float32),
            (1e35, torch.float32),
            (3e38, torch.float32),
            (torch.finfo(torch.float32).max, torch.float32),
            (6e4, torch.float16),
            (3e38, torch.bfloat16),
            (1e250, torch.float64),
            (LINEAR_WORST_COST / 2, torch.float64),
        ],
    )
    def test_huge_costs(self, kernel_device, largest, dtype):
        """With both signs, and more targets than queries in the second half."""
        cost = torch.rand(4, 7, 7, dtype=torch.float64)
        cost[1::2] = 2.0 * cost[1::2] - 1.0
        cost[:, 3, 2], cost[1::2, 4, 1] = 1.0, -1.0
        cost = (cost * largest).to(dtype)
        count = torch.tensor([7, 4, 7, 2])
        unique = dtype in (torch.float32, torch.float64)
        check_assignment(cost, count, kernel_device, unique=unique)
        check_assignment(cost[:, :5].mT, count.clamp(max=5), kernel_device, unique=unique)
        check_assignment(cost[:, :5], count, kernel_device, unique=unique)

    def test_huge_costs_differ(self, kernel_device):
        """Each target has one query at 1e30 or -3e38, the others cost 1e35 or more."""
        cost = torch.rand(2, 9, 6) * 1e38 + 1e35
        query = torch.stack([torch.randperm(9)[:6] for _ in range(2)])
        cost.scatter_(1, query[:, None], torch.tensor([1e30, -3e38])[:, None, None].expand(2, 1, 6))
        count = torch.tensor([6, 6])
        check_assignment(cost, count, kernel_device, unique=True)
        result, _ = linear_assignment(
            cost.to(kernel_device), count.to(kernel_device), impl="triton"
        )
        assert torch.equal(result.cpu(), query)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e305])
    @pytest.mark.parametrize("scale", [1.0, 3e38])
    def test_costs_that_are_not_finite_come_last(self, kernel_device, bad, scale):
        """1e305 is finite, but replaced as well."""
        cost = scale * (torch.rand(4, 5, 3, dtype=torch.float64) - 0.5)
        cost[0] = bad
        cost[1, 2] = bad
        cost[2, 1:, 1] = bad
        cost[3, :, 1] = bad
        count = torch.tensor([3, 3, 3, 3])
        if bad != 1e305:
            cost = cost.float()
        check_assignment(cost[1:3], count[1:3], kernel_device, unique=True)
        on_device = cost.to(kernel_device), count.to(kernel_device)
        for arguments, impl in (((cost, count), "reference"), (on_device, "triton")):
            query_index, matched = linear_assignment(*arguments, impl=impl)
            assert matched.all()
            assert all(len(set(queries)) == 3 for queries in query_index.tolist())
            assert 2 not in query_index[1].tolist()
            assert query_index[2, 1] == 0

    def test_the_worst_cost_is_that_of_the_reference(self):
        from msdetr.kernels import linear_assignment as kernel

        assert kernel._WORST.value == LINEAR_WORST_COST > torch.finfo(torch.float32).max

    @pytest.mark.parametrize(("problems", "queries", "slots"), [(2, 3, 0), (0, 3, 2), (2, 0, 2)])
    def test_nothing_to_assign(self, kernel_device, problems, queries, slots):
        cost = torch.zeros(problems, queries, slots, device=kernel_device)
        count = torch.zeros(problems, dtype=torch.int64, device=kernel_device) + min(slots, 2)
        query_index, matched = linear_assignment(cost, count, impl="triton")
        assert query_index.shape == matched.shape == (problems, slots)
        assert not matched.any()

    def test_empty_slots_and_strides_do_not_matter(self, kernel_device):
        cost, count = torch.rand(3, 6, 5), torch.tensor([5, 2, 0])
        check_assignment(cost.permute(0, 2, 1)[:, :5].contiguous().mT, count, kernel_device,
                         unique=True)  # fmt: skip
        expected = linear_assignment(cost, count, impl="reference")
        cost[1, :, 2:] = -1e9
        cost[2] = float("nan")
        result = linear_assignment(cost.to(kernel_device), count.to(kernel_device), impl="triton")
        assert all(torch.equal(a.cpu(), b) for a, b in zip(result, expected, strict=True))

    @pytest.mark.gpu
    def test_thousands_of_problems(self, kernel_device):
        for queries, slots in ((300, 20), (900, 100), (4000, 1000), (22223, 100), (50, 80)):
            problems = 8 if slots == 1000 else 500 if queries <= 900 else 16
            cost = torch.randn(problems, queries, slots)
            count = torch.randint(slots + 1, (problems,))
            check_assignment(cost, count, kernel_device, unique=True)
        cost = torch.randint(4, (2000, 30, 20)).float()
        check_assignment(cost, torch.randint(21, (2000,)), kernel_device, unique=False)


def pairs_of(impl: str, scene: Scene, priority: Tensor, device: torch.device, **options: Any):
    scene = moved(scene, device)
    pairs = one_to_many(*scene, priority.to(device), **options, impl=impl)
    return OneToMany(*(x.cpu() for x in pairs))


def check_pairs(scene: Scene, priority: Tensor, device: torch.device, **options: Any) -> OneToMany:
    result = pairs_of("triton", scene, priority, device, **options)
    expected = pairs_of("reference", scene, priority, torch.device("cpu"), **options)
    assert torch.equal(result.mask, expected.mask)
    assert torch.equal(result.query_index, expected.query_index)
    assert torch.equal(result.best_target, expected.best_target)
    assert torch.equal(result.best_class, expected.best_class)
    torch.testing.assert_close(result.score, expected.score, rtol=1e-6, atol=1e-6)
    return result


class TestHungarian:
    @pytest.mark.parametrize("class_agnostic", [True, False])
    @pytest.mark.parametrize("counts", [(3, 0, 5), (14, 2), (0, 0)])
    def test_equals_the_reference(self, kernel_device, counts, class_agnostic):
        scene = random_scene(counts)
        matcher = Hungarian(**COSTS, class_agnostic=class_agnostic)
        result = match(matcher, moved(scene, kernel_device), impl="triton")
        expected = match(matcher, scene, impl="reference")
        assert all(torch.equal(a.cpu(), b) for a, b in zip(result, expected, strict=True))


class TestOneToMany:
    @FEW
    @given(
        seed=st.integers(0, 2**31),
        counts=st.lists(st.integers(0, 5), min_size=1, max_size=3),
        queries=st.integers(1, 9),
        k=st.integers(1, 10),
        threshold=st.sampled_from((0.0, 0.15, 0.3, 0.4, 1.0, 2.0)),
        positive_fraction=st.sampled_from((0.0, 0.25, 0.5, 1.0)),
        equal_priorities=st.booleans(),
    )
    def test_scenes_full_of_ties(
        self,
        kernel_device,
        seed,
        counts,
        queries,
        k,
        threshold,
        positive_fraction,
        equal_priorities,
    ):
        scene = tied_scene(seed, tuple(counts), queries, torch.float32)
        priority = torch.rand(2, len(counts), queries)
        if equal_priorities:
            priority = (priority * 2).round() - 1  # negative ones, zeros of both signs
        options = {"k": k, "threshold": threshold, "positive_fraction": positive_fraction}
        check_pairs(scene, priority, kernel_device, **options)

    @pytest.mark.parametrize(
        ("counts", "queries", "options"),
        [
            ((3, 0, 5), 16, {}),
            ((14, 2), 5, {}),  # more targets than queries
            ((2, 3), 2, {"k": 6}),  # fewer queries than k
            ((4, 4), 20, {"k": 6, "positive_fraction": 0.25}),
            ((4, 4), 20, {"k": 6, "positive_fraction": 1.0}),
            ((4, 4), 20, {"threshold": 0.9}),
            ((4, 4), 20, {"threshold": 0.0}),
            ((40,), 300, {"k": 6, "positive_fraction": 0.05}),  # a crowd, and a draw
        ],
    )
    def test_random_scenes(self, kernel_device, counts, queries, options):
        scene = random_scene(counts, queries=queries)
        priority = torch.rand(len(counts), queries)
        result = check_pairs(scene, priority, kernel_device, **OPTIONS | options)
        assert result.mask.any()

    def test_iou_at_the_threshold(self, kernel_device):
        """A score equal to the threshold is positive, a score one bit below it is not."""
        box = torch.tensor([0.5, 0.5, 0.25, 0.25])
        targets = padded_targets([torch.tensor([0])], [box[None]], slots=2)
        scene = Scene(torch.zeros(1, 1, 3, 1), box.expand(1, 1, 3, 4), targets)
        options = {"k": 3, "positive_fraction": 1.0}
        at = pairs_of("triton", scene, torch.zeros(1, 3), kernel_device, threshold=-1.0, **options)
        at = at.score[0, 0, 0, 0]
        for threshold, positives in ((at, 3), (at.nextafter(torch.tensor(2.0)), 1)):
            pairs = check_pairs(
                scene, torch.zeros(1, 3), kernel_device, threshold=threshold.item(), **options
            )
            assert pairs.mask.sum() == positives

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("place", ["logits", "boxes"])
    def test_predictions_that_are_not_finite(self, kernel_device, bad, place):
        scene = random_scene((3, 0, 2), queries=8)
        getattr(scene, place)[:, 1:, [1, 4, 6]] = bad
        options = OPTIONS | {"k": 8, "threshold": -2.0, "positive_fraction": 1.0}
        check_pairs(scene, torch.rand(3, 8), kernel_device, **options)

    @pytest.mark.parametrize("value", [None, float("nan")])
    def test_empty_slots_do_not_matter(self, kernel_device, value):
        scene = random_scene((4, 0, 2), empty_slots=3)
        priority = torch.rand(2, 3, 12)
        garbage = scene._replace(targets=with_garbage_padding(scene.targets, 3, value))
        expected = check_pairs(scene, priority, kernel_device, **OPTIONS)
        result = check_pairs(garbage, priority, kernel_device, **OPTIONS)
        assert all(map(torch.equal, result, expected))

    def test_nothing(self, kernel_device):
        check_pairs(random_scene((0, 0)), torch.rand(2, 12), kernel_device, **OPTIONS)
        check_pairs(
            random_scene((0, 0), empty_slots=0), torch.rand(2, 12), kernel_device, **OPTIONS
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_logits(self, kernel_device, dtype):
        scene = random_scene((3, 2))
        scene = scene._replace(logits=scene.logits.to(dtype))
        check_pairs(scene, torch.rand(2, 12), kernel_device, **OPTIONS)

    def test_priorities_of_layers_and_strides(self, kernel_device):
        scene = random_scene((6, 3), layers=3)
        scene = scene._replace(boxes=scene.boxes.transpose(0, 2).contiguous().transpose(0, 2))
        options = OPTIONS | {"threshold": 0.2, "positive_fraction": 0.3}
        check_pairs(scene, torch.rand(3, 2, 12), kernel_device, **options)
        check_pairs(scene, torch.rand(2, 12).expand(3, -1, -1), kernel_device, **options)
        priority = torch.rand(12, 3, 2).permute(1, 2, 0)
        for dtype in (torch.float16, torch.float32, torch.float64):
            check_pairs(scene, priority.half().to(dtype), kernel_device, **options)

    def test_unsupported_arguments_are_refused(self, kernel_device):
        scene = random_scene((3, 2), dtype=torch.float64)
        with pytest.raises(NotImplementedError, match="float64 boxes"):
            pairs_of("triton", scene, torch.rand(2, 12), kernel_device, **OPTIONS)

    @pytest.mark.gpu
    def test_sizes_of_training(self, kernel_device):
        for queries, counts in ((300, (7, 20)), (900, (100, 60)), (4000, (1000, 3))):
            scene = random_scene(counts, queries=queries, layers=6, classes=91)
            options = {"k": 6, "threshold": 0.4, "positive_fraction": 0.25}
            check_pairs(scene, torch.rand(2, queries), kernel_device, **options)


@pytest.mark.parametrize(
    "op",
    [
        "matching_cost",
        "linear_assignment",
        "linear_assignment_scipy",
        "one_to_many",
        "one_to_many_chunked",
    ],
)
def test_opcheck(kernel_device, op):
    device = torch.device("cpu") if op.endswith("_chunked") else kernel_device
    logits, boxes, targets = moved(random_scene((3, 2), queries=6), device)
    if op == "matching_cost":
        arguments = (logits, boxes, *targets, 2.0, 5.0, 2.0, 1e-6)
    elif op.startswith("linear_assignment"):
        cost = torch.rand(2, 2, 6, 5, device=device)
        arguments = (cost, targets.count, targets.labels, 3)
    else:
        priority = torch.rand(2, 6, device=device)
        arguments = (logits, boxes, *targets, priority, 3, 0.4, 3, 0.7, 0.3)
    torch.library.opcheck(getattr(torch.ops.msdetr, op).default, arguments)
