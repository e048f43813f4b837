"""One-to-many assignment: both PyTorch versions against each other and a loop over images."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import Scene, padded_targets, random_scene, with_garbage_padding
from torch import Tensor

from msdetr.boxes import box_iou, cxcywh_to_xyxy
from msdetr.ops import one_to_many_chunked as chunked
from msdetr.ops.one_to_many import OneToMany
from msdetr.ops.one_to_many import one_to_many as public_one_to_many
from msdetr.structures import Targets

OPTIONS = {"k": 3, "threshold": 0.4, "positive_fraction": 0.5}


def score_of(logit: float, box: list[float], target: list[float]) -> float:
    """0.7 IoU + 0.3 probability; -1 where that is not a number."""
    if not all(map(math.isfinite, (logit, *box))):
        return -1.0
    inside = 1.0
    for axis in (0, 1):
        low = max(box[axis] - box[axis + 2] / 2, target[axis] - target[axis + 2] / 2)
        high = min(box[axis] + box[axis + 2] / 2, target[axis] + target[axis + 2] / 2)
        inside *= max(high - low, 0.0)
    union = box[2] * box[3] + target[2] * target[3] - inside
    iou = inside / union if union > 0 else 0.0
    probability = 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
    return 0.7 * iou + 0.3 * probability


def assign_image(
    scores: list[list[float]],
    priority: list[float],
    *,
    k: int,
    threshold: float,
    positive_fraction: float,
) -> list[list[int]]:
    """Queries of each target of one image and layer, from scores[target][query]."""
    targets, queries = range(len(scores)), range(len(priority))
    if not scores:
        return []

    def best_target(query: int) -> int:
        return max(targets, key=lambda target: scores[target][query])  # the first of equals

    best_queries = {max(queries, key=lambda query: row[query]) for row in scores}
    positives = [
        query
        for query in queries
        if scores[best_target(query)][query] >= threshold or query in best_queries
    ]
    positives.sort(key=lambda query: priority[query])  # stable: the first of equals
    kept = positives[: int(positive_fraction * len(queries))]
    result = []
    for target in targets:
        number = min(sum(best_target(query) == target for query in kept), k)
        ranking = sorted(queries, key=lambda query: -scores[target][query])
        result.append(ranking[:number])
    return result


def expected_queries(scene: Scene, priority: Tensor, **options: float) -> list[list[list]]:
    """[layer][image][target] lists of queries."""
    logits, boxes, targets = scene
    result = []
    for layer in range(len(logits)):
        images = []
        for image, count in enumerate(targets.count.tolist()):
            scores = [
                [
                    score_of(
                        logits[layer, image, query, targets.labels[image, target]].item(),
                        boxes[layer, image, query].tolist(),
                        targets.boxes[image, target].tolist(),
                    )
                    for query in range(logits.shape[2])
                ]
                for target in range(count)
            ]
            row = priority[layer, image] if priority.ndim == 3 else priority[image]
            images.append(assign_image(scores, row.tolist(), **options))
        result.append(images)
    return result


def assigned_queries(pairs: OneToMany, targets: Targets) -> list[list[list]]:
    """[layer][image][target] lists of queries; empty slots have none."""
    assert not pairs.mask[:, ~targets.mask].any()
    return [
        [
            [
                pairs.query_index[layer, image, target][pairs.mask[layer, image, target]].tolist()
                for target in range(count)
            ]
            for image, count in enumerate(targets.count.tolist())
        ]
        for layer in range(len(pairs.mask))
    ]


def one_to_many(*arguments: Any, **options: float) -> OneToMany:
    """The result of `impl="auto"`, which must equal the reference index by index."""
    result = public_one_to_many(*arguments, **options)
    expected = public_one_to_many(*arguments, **options, impl="reference")
    assert [field.dtype for field in result] == [field.dtype for field in expected]
    assert_same(result, expected)
    return result


def assert_same(a: OneToMany, b: OneToMany) -> None:
    assert all(map(torch.equal, a, b))


def tied_scene(
    seed: int, counts: tuple[int, ...], queries: int, dtype: torch.dtype = torch.float64
) -> Scene:
    """Few different boxes and logits, so that many scores are equal bit for bit."""
    generator = torch.Generator().manual_seed(seed)

    def choose(values: list, *shape: int) -> Tensor:
        index = torch.randint(len(values), shape, generator=generator)
        return torch.tensor(values, dtype=dtype)[index]

    boxes = [[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0], [0.5, 0.25, 0.5, 0.5], [0.75] * 4]
    targets = padded_targets(
        [choose([0, 1], count).long() for count in counts],
        [choose(boxes[:3], count) for count in counts],
        slots=max(counts) + 1,
    )
    logits = choose([-1e4, 0.0, 0.0, 1e4], 2, len(counts), queries, 2)
    return Scene(logits, choose(boxes, 2, len(counts), queries), targets)


# Scores that such a scene can have, and values between them.
THRESHOLDS = (0.0, 0.15, 0.3, 0.4, 0.7 * 0.25 + 0.15, 0.7 * 1.0 + 0.3 * 0.5, 1.0, 2.0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    queries=st.one_of(st.integers(1, 9), st.sampled_from((30, 36))),
    k=st.integers(1, 10),
    threshold=st.sampled_from(THRESHOLDS),
    positive_fraction=st.sampled_from((0.0, 0.25, 0.5, 1.0)),
    equal_priorities=st.booleans(),
)
def test_equals_the_loop_on_scenes_full_of_ties(
    seed, counts, queries, k, threshold, positive_fraction, equal_priorities
):
    scene = tied_scene(seed, tuple(counts), queries)
    generator = torch.Generator().manual_seed(seed + 1)
    priority = torch.rand(2, len(counts), queries, generator=generator)
    if equal_priorities:
        priority = (priority * 2).round()
    options = {"k": k, "threshold": threshold, "positive_fraction": positive_fraction}
    pairs = one_to_many(*scene, priority, **options)
    assert pairs.query_index.shape == (2, *scene.targets.labels.shape, min(k, queries))
    assert assigned_queries(pairs, scene.targets) == expected_queries(scene, priority, **options)


@pytest.mark.parametrize(
    ("counts", "queries", "options"),
    [
        ((3, 0, 5), 16, {}),
        ((14, 2), 5, {}),  # more targets than queries
        ((2, 3), 2, {"k": 6}),  # fewer queries than k
        ((4, 4), 20, {"k": 6, "positive_fraction": 0.25}),
        ((4, 4), 20, {"k": 6, "positive_fraction": 1.0}),
        ((4, 4), 20, {"threshold": 0.9}),  # forced positives only
        ((4, 4), 20, {"threshold": 0.0}),  # every query positive
    ],
)
def test_equals_the_loop_on_random_scenes(counts, queries, options):
    options = OPTIONS | options
    scene = random_scene(counts, queries=queries, dtype=torch.float64)
    priority = torch.rand(len(counts), queries)
    pairs = one_to_many(*scene, priority, **options)
    expected = expected_queries(scene, priority, **options)
    assert assigned_queries(pairs, scene.targets) == expected
    assert any(queries for layer in expected for image in layer for queries in image)


def hand_made(scores: list[list[float]]) -> tuple[Tensor, Tensor, Targets]:
    """One image whose score of target t and query q is exactly 0.3 * scores[t][q]: targets of
    different classes far from all boxes."""
    scores = torch.tensor(scores, dtype=torch.float64)
    logits = scores.T.logit()[None, None]
    boxes = torch.full((1, 1, scores.shape[1], 4), 0.1, dtype=torch.float64)
    target_boxes = torch.full((len(scores), 4), 0.9, dtype=torch.float64)
    targets = padded_targets([torch.arange(len(scores))], [target_boxes], slots=len(scores) + 1)
    return logits, boxes, targets


def test_a_target_takes_its_best_queries_and_not_those_that_were_kept():
    """Query 0 prefers target 0 but is also the best of target 1's row: it serves both, and query
    2, which earned target 1 its place, serves none."""
    scene = hand_made([[0.9, 0.8, 0.1, 0.1], [0.7, 0.2, 0.6, 0.1]])
    options = {"k": 6, "threshold": 0.3 * 0.5, "positive_fraction": 1.0}
    pairs = one_to_many(*scene, torch.zeros(1, 4), **options)
    assert assigned_queries(pairs, scene[2]) == [[[[0, 1], [0]]]]
    torch.testing.assert_close(pairs.score[0, 0, 1, 0].item(), 0.3 * 0.7)
    assert pairs.score[0, 0, 1, 1] == -math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_score_at_the_threshold_is_positive(dtype):
    box = torch.tensor([0.5, 0.5, 0.25, 0.25], dtype=dtype)
    targets = padded_targets([torch.tensor([0])], [box[None]], slots=2)
    scene = torch.zeros(1, 1, 3, 1, dtype=dtype), box.expand(1, 1, 3, 4), targets
    options = {"k": 3, "positive_fraction": 1.0}
    at = one_to_many(*scene, torch.zeros(1, 3), threshold=-1.0, **options).score[0, 0, 0, 0]
    assert at.item() == pytest.approx(0.7 + 0.3 / 2)
    above = at.nextafter(torch.tensor(2.0, dtype=dtype))
    for threshold, expected in ((at, [0, 1, 2]), (above, [0])):
        pairs = one_to_many(*scene, torch.zeros(1, 3), threshold=threshold.item(), **options)
        assert assigned_queries(pairs, targets) == [[[expected]]]


def test_the_lowest_priorities_are_kept():
    scene = hand_made([[0.9, 0.8, 0.7, 0.6, 0.1, 0.1, 0.1, 0.1]])
    options = {"k": 6, "threshold": 0.3 * 0.5}
    numbers = {}
    for fraction in (0.0, 0.25, 0.4, 0.5, 1.0):
        # Non-positives have the lowest values and must not use up the share.
        priority = torch.tensor([[0.9, 0.4, 0.6, 0.5, 0.0, 0.0, 0.0, 0.0]])
        pairs = one_to_many(*scene, priority, positive_fraction=fraction, **options)
        numbers[fraction] = assigned_queries(pairs, scene[2])[0][0][0]
    assert numbers == {0.0: [], 0.25: [0, 1], 0.4: [0, 1, 2], 0.5: [0, 1, 2, 3], 1.0: [0, 1, 2, 3]}


def test_priority_decides_which_target_keeps_its_places():
    scene = hand_made([[0.9, 0.8, 0.1, 0.1], [0.1, 0.1, 0.9, 0.8]])
    options = {"k": 6, "threshold": 0.3 * 0.5, "positive_fraction": 0.5}
    first = one_to_many(*scene, torch.tensor([[0.0, 0.1, 0.8, 0.9]]), **options)
    second = one_to_many(*scene, torch.tensor([[0.9, 0.8, 0.1, 0.0]]), **options)
    assert assigned_queries(first, scene[2]) == [[[[0, 1], []]]]
    assert assigned_queries(second, scene[2]) == [[[[], [2, 3]]]]


def test_without_a_cap_priority_does_not_matter():
    scene = random_scene((6, 3), queries=20)
    options = OPTIONS | {"positive_fraction": 1.0, "threshold": 0.2}
    assert_same(
        one_to_many(*scene, torch.rand(2, 20), **options),
        one_to_many(*scene, torch.rand(2, 20), **options),
    )


def test_a_cap_of_nothing_assigns_nothing():
    scene = random_scene((6, 3))
    pairs = one_to_many(*scene, torch.rand(2, 12), **OPTIONS | {"positive_fraction": 0.0})
    assert not pairs.mask.any()
    assert not pairs.query_index.any()


def test_images_without_targets():
    scene = random_scene((0, 0, 0))
    pairs = one_to_many(*scene, torch.rand(3, 12), **OPTIONS)
    assert pairs.mask.shape == (2, 3, 2, 3)
    assert not pairs.mask.any()
    assert (pairs.score == -math.inf).all()


def test_no_target_slots():
    scene = random_scene((0, 0), empty_slots=0)
    pairs = one_to_many(*scene, torch.rand(2, 12), **OPTIONS)
    assert pairs.mask.shape == pairs.query_index.shape == (2, 2, 0, 3)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), -1e30])
def test_empty_slots_do_not_matter(value):
    scene = random_scene((4, 0, 2), empty_slots=5)
    priority = torch.rand(2, 3, 12)
    garbage = scene._replace(targets=with_garbage_padding(scene.targets, 3, value))
    assert_same(
        one_to_many(*scene, priority, **OPTIONS), one_to_many(*garbage, priority, **OPTIONS)
    )


def test_layers_and_images_are_independent():
    scene = random_scene((4, 0, 7), layers=3)
    priority = torch.rand(3, 3, 12)
    batched = one_to_many(*scene, priority, **OPTIONS)
    for layer in range(3):
        for image in range(3):
            one = slice(image, image + 1)
            alone = one_to_many(
                scene.logits[layer : layer + 1, one],
                scene.boxes[layer : layer + 1, one],
                Targets(*(field[one] for field in scene.targets)),
                priority[layer : layer + 1, one],
                **OPTIONS,
            )
            assert_same(OneToMany(*(field[layer : layer + 1, one] for field in batched)), alone)


def test_one_priority_for_all_layers():
    scene = random_scene((6, 3), layers=3)
    priority = torch.rand(2, 12)
    assert_same(
        one_to_many(*scene, priority, **OPTIONS),
        one_to_many(*scene, priority.expand(3, -1, -1), **OPTIONS),
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["logits", "boxes", "both"])
def test_predictions_that_are_not_finite_rank_last(bad, place):
    scene = random_scene((3, 0, 2), queries=8)
    logits, boxes = scene.logits.clone(), scene.boxes.clone()
    broken = [1, 4, 6]
    if place != "boxes":
        logits[:, 1:, broken] = bad
    if place != "logits":
        boxes[:, 1:, broken] = bad
    options = OPTIONS | {"k": 8, "threshold": -2.0, "positive_fraction": 1.0}
    priority = torch.rand(3, 8)
    pairs = one_to_many(logits, boxes, scene.targets, priority, **options)
    assert pairs.score[pairs.mask].isfinite().all()
    # The image with finite predictions is not disturbed.
    clean = one_to_many(*scene, priority, **options)
    assert torch.equal(pairs.query_index[:, 0], clean.query_index[:, 0])
    if not math.isnan(bad) and place == "logits":
        return  # an infinite logit is a probability of 0 or 1
    for layer, target in pairs.mask[:, 2].any(-1).nonzero().tolist():
        row = pairs.query_index[layer, 2, target][pairs.mask[layer, 2, target]].tolist()
        assert not set(row[:5]) & set(broken)


def test_all_predictions_nan_still_give_every_target_a_query():
    """Each target keeps its best query: with equal worst scores, the first."""
    scene = random_scene((2, 1), queries=8)
    predictions = scene.logits * float("nan"), scene.boxes * float("nan")
    options = OPTIONS | {"positive_fraction": 1.0}
    pairs = one_to_many(*predictions, scene.targets, torch.rand(2, 8), **options)
    assert assigned_queries(pairs, scene.targets) == [[[[0], []], [[0]]]] * 2


def test_score_weights_and_half_precision():
    scene = random_scene((3, 2))
    priority = torch.rand(2, 12)
    only_boxes = OPTIONS | {"iou_weight": 1.0, "class_weight": 0.0}
    pairs = one_to_many(*scene, priority, **only_boxes)
    other_logits = scene._replace(logits=torch.randn_like(scene.logits))
    assert_same(pairs, one_to_many(*other_logits, priority, **only_boxes))

    half = scene.logits.bfloat16(), scene.boxes.bfloat16()
    pairs = one_to_many(*half, scene.targets, priority, **OPTIONS)
    assert pairs.score.dtype == torch.float32
    # Scores are those of the rounded predictions, computed in float32.
    rounded = (half[0].float(), half[1].float(), scene.targets)
    assert_same(pairs, one_to_many(*rounded, priority, **OPTIONS))


def test_best_first():
    scene = random_scene((5,), queries=30)
    pairs = one_to_many(*scene, torch.rand(1, 30), **OPTIONS | {"k": 6, "threshold": 0.0})
    assert (pairs.score.diff(dim=-1)[pairs.mask[..., 1:]] <= 0).all()
    assert pairs.mask.sum() > 5


@pytest.mark.parametrize("queries", [12, 16])
@pytest.mark.parametrize("max_pairs", ["_CHUNK_PAIRS", "_BLOCK_PAIRS"])
def test_chunks_do_not_change_the_result(max_pairs, queries, monkeypatch):
    scene = random_scene((4, 0, 7, 2, 1), layers=7, queries=queries)
    priority = torch.rand(7, 5, queries)
    monkeypatch.setattr(chunked, max_pairs, 1)
    pairs = scene.targets.mask.shape[1] * queries
    assert len(chunked._chunks(35, pairs, 1)) > 1
    one_to_many(*scene, priority, **OPTIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iou_is_that_of_boxes(dtype):
    """Bit by bit, also for boxes that are tiny, inverted, huge or not finite."""
    inf, nan = math.inf, math.nan
    values = [0.5, 0.0, -0.3, 1e-16, 1e-8, 3e38, inf, -inf, nan]
    odd = torch.cartesian_prod(*[torch.tensor(values, dtype=dtype)] * 4)
    boxes = torch.cat((random_scene((3,), queries=40, dtype=dtype).boxes[0, 0], odd))[None]
    usual = random_scene((3,), dtype=dtype).targets.boxes
    targets = torch.cat((usual, torch.tensor([[[0.5, 0.5, 1e-16, 1e-16]]], dtype=dtype)), dim=1)
    planes = chunked._corners_and_area(boxes)[:, :, None]
    target_planes = chunked._corners_and_area(targets)[..., None]
    out = torch.empty(1, targets.shape[1], boxes.shape[1], dtype=dtype)
    result = chunked._iou(planes, target_planes, out)
    assert result is out
    expected = box_iou(cxcywh_to_xyxy(boxes)[:, None], cxcywh_to_xyxy(targets)[:, :, None])
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compiles_in_one_graph(impl):
    scene, priority = random_scene((3, 2)), torch.rand(2, 12)
    compiled = torch.compile(public_one_to_many, backend="aot_eager", fullgraph=True)
    result = compiled(*scene, priority, **OPTIONS, impl=impl)
    assert_same(OneToMany(*result), one_to_many(*scene, priority, **OPTIONS))
