"""Assignment by IoU against a loop over images, with the steps of DETA."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import padded_targets, random_boxes, with_garbage_padding
from torch import Tensor

from msdetr.boxes import cxcywh_to_xyxy, pairwise_iou
from msdetr.ops.iou_assignment import IoUPairs, assign_by_iou
from msdetr.structures import Targets

CLASSES = 3


class Options(NamedTuple):
    k: int = 4
    threshold: float = 0.6
    max_positives: int = 1000


def expected_counts(iou: Tensor, priority: Tensor, options: Options) -> list[int]:
    """Boxes that each target of one image may take, for IoU [targets, boxes]."""
    num_targets, num_boxes = iou.shape
    if num_targets == 0:
        return []
    positive = []
    for box in range(num_boxes):
        column = iou[:, box]
        is_best = any(column[t] == iou[t].max() for t in range(num_targets))
        if column.max() >= options.threshold or is_best:
            positive.append(box)
    positive.sort(key=lambda box: priority[box].item())
    counts = [0] * num_targets
    for box in positive[: options.max_positives]:
        counts[int(iou[:, box].argmax())] += 1
    return counts


def check(boxes: Tensor, targets: Targets, options: Options, *, ties: bool = False) -> IoUPairs:
    """Compare with the loop. Boxes of equal IoU may stand for each other."""
    priority = torch.rand(boxes.shape[:2])
    pairs = assign_by_iou(boxes, targets, priority, **options._asdict())
    query_index, mask, target_of = pairs
    num_slots, num_boxes = targets.labels.shape[1], boxes.shape[1]
    assert query_index.shape == mask.shape == (len(boxes), num_slots, min(options.k, num_boxes))
    assert not query_index[~mask].any()
    for image, count in enumerate(targets.count.tolist()):
        corners = cxcywh_to_xyxy(targets.boxes[image, :count].to(boxes.dtype))
        iou = pairwise_iou(corners, cxcywh_to_xyxy(boxes[image]))
        counts = expected_counts(iou, priority[image], options)
        last = [-1] * num_boxes
        for target in range(num_slots):
            found = query_index[image, target][mask[image, target]].tolist()
            if target >= count:
                assert not found
                continue
            number = min(counts[target], options.k, num_boxes)
            best = iou[target].sort(descending=True, stable=True)
            assert len(set(found)) == len(found) == number
            assert mask[image, target, :number].all()
            assert torch.equal(iou[target, found], best.values[:number])
            if not ties:
                assert found == best.indices[:number].tolist()
            for box in found:
                last[box] = target
        assert target_of[image].tolist() == last
    return pairs


def near(targets: Targets, queries: int, spread: float) -> Tensor:
    """[B, queries, 4] boxes: of every three, two are close to a target, if there is one."""
    boxes = random_boxes(len(targets.count), queries, dtype=targets.boxes.dtype)
    for image, count in enumerate(targets.count.tolist()):
        if count:
            chosen = targets.boxes[image, torch.randint(count, (queries,))]
            moved = chosen * (1.0 + spread * (torch.rand_like(chosen) - 0.5))
            boxes[image] = torch.where(torch.arange(queries)[:, None] % 3 < 2, moved, boxes[image])
    return boxes


def random_targets(*counts: int, slots: int, dtype: torch.dtype = torch.float64) -> Targets:
    labels = [torch.randint(CLASSES, (count,)) for count in counts]
    return padded_targets(labels, [random_boxes(n, dtype=dtype) for n in counts], slots=slots)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=3),
    st.integers(1, 20),
    st.builds(
        Options,
        k=st.sampled_from([1, 2, 4, 30]),
        threshold=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
        max_positives=st.sampled_from([0, 1, 3, 7, 1000]),
    ),
    st.sampled_from([0.1, 0.5]),
    st.integers(0, 2**31),
)
def test_pairs(counts, queries, options, spread, seed):
    torch.manual_seed(seed)
    targets = random_targets(*counts, slots=max(counts) + 2)
    check(near(targets, queries, spread), targets, options, ties=True)


def test_pairs_without_ties():
    targets = random_targets(6, 0, 4, 1, slots=7)
    boxes = near(targets, 40, 0.3)
    overlapping = targets.boxes[:, :1].expand(-1, 40, -1) * 0.5 + boxes * 0.5
    for max_positives in (3, 10, 1000):
        check(overlapping, targets, Options(max_positives=max_positives, threshold=0.3))


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("max_positives", [2, 5, 1000])
def test_equal_boxes(k, max_positives):
    """On a grid, many IoUs are equal: all of the best are positive."""
    places = (torch.randint(4, (3, 20, 2)) + 0.5) / 4
    boxes = torch.cat((places, torch.full((3, 20, 2), 0.25)), dim=-1)
    targets = padded_targets(
        [torch.zeros(count).long() for count in (5, 0, 2)],
        [boxes[image, :count] for image, count in enumerate((5, 0, 2))],
        slots=5,
    )
    check(boxes, targets, Options(k=k, max_positives=max_positives), ties=True)
    targets.boxes[0, 1:] = targets.boxes[0, :1]  # the same target several times
    check(boxes, targets, Options(k=k, max_positives=max_positives), ties=True)


def test_a_target_without_overlap_makes_all_boxes_without_overlap_positive():
    """They raise the number of boxes of their best target, which may be another one."""
    inside = torch.tensor([0.8, 0.8, 0.2, 0.2])
    boxes = torch.stack([inside + torch.tensor([0.02 * i, 0.0, 0.0, 0.0]) for i in range(5)])[None]
    alone = padded_targets([torch.zeros(1).long()], [inside[None]], slots=3)
    far = torch.tensor([0.1, 0.1, 0.1, 0.1])
    options = Options(k=4, threshold=0.99)
    assert check(boxes, alone, options).mask.sum().item() == 1
    both = padded_targets([torch.zeros(2).long()], [torch.stack((inside, far))], slots=3)
    assert check(boxes, both, options, ties=True).mask.sum(-1).tolist() == [[4, 0, 0]]


def test_a_box_of_several_targets_belongs_to_the_last():
    box = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    targets = padded_targets([torch.tensor([1, 2, 0])], [box.repeat(3, 1)], slots=4)
    boxes = torch.cat((box, box * 0.9, box * 0.8, box * 0.7))[None]
    pairs = check(boxes, targets, Options(threshold=0.0, k=2))
    # The first target has all four boxes, and the others none: ties go to the first.
    assert pairs.target.tolist() == [[0, 0, -1, -1]]
    moved = box + torch.tensor([0.01, 0.0, 0.0, 0.0])
    targets = padded_targets([torch.tensor([1, 2])], [torch.cat((box, moved))], slots=2)
    boxes = torch.cat((box - 0.001, moved + 0.001, box * 0.2))[None].double()
    pairs = check(boxes, targets, Options(threshold=0.5, k=2))
    assert pairs.mask.sum().item() == 2
    assert pairs.target.tolist() == [[0, 1, -1]]
    pairs = check(boxes[:, :1], targets, Options(threshold=0.0, k=2))
    assert pairs.target.tolist() == [[0]]


@pytest.mark.parametrize(("threshold", "number"), [(0.5, 2), (0.51, 1)])
def test_an_iou_of_the_threshold_is_positive(threshold, number):
    box = torch.tensor([0.5, 0.5, 0.5, 0.5])
    targets = padded_targets([torch.zeros(1).long()], [box[None]], slots=1)
    boxes = torch.stack((box, torch.tensor([0.5, 0.5, 0.5, 0.25])))[None]
    pairs = check(boxes, targets, Options(threshold=threshold))
    assert pairs.mask.sum().item() == number


def test_positives_of_the_lowest_priority_are_kept():
    targets = padded_targets([torch.zeros(1).long()], [torch.tensor([[0.5] * 4])], slots=1)
    boxes = torch.full((1, 6, 4), 0.5)
    for kept in range(7):
        pairs = assign_by_iou(
            boxes, targets, torch.rand(1, 6), k=10, threshold=0.5, max_positives=kept
        )
        assert pairs.mask.sum().item() == kept
    # Two targets far from each other, with two boxes each: the priority says whose remain.
    centers = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]])
    targets = padded_targets([torch.zeros(2).long()], [centers], slots=2)
    boxes = centers[[0, 1, 0, 1]][None]
    priority = torch.tensor([[0.1, 0.9, 0.2, 0.3]])
    for kept, counts in ((1, [1, 0]), (2, [2, 0]), (3, [2, 1]), (4, [2, 2])):
        pairs = assign_by_iou(boxes, targets, priority, k=4, threshold=0.5, max_positives=kept)
        assert pairs.mask.sum(-1).tolist() == [counts]


@pytest.mark.parametrize("value", [None, float("nan")])
def test_empty_slots_do_not_matter(value):
    targets = random_targets(4, 0, 2, slots=6)
    boxes, priority = near(targets, 15, 0.3), torch.rand(3, 15)
    garbage = with_garbage_padding(targets, CLASSES, value)
    options = Options(max_positives=5)._asdict()
    one, other = (assign_by_iou(boxes, x, priority, **options) for x in (targets, garbage))
    assert all(map(torch.equal, one, other))
    more = targets._replace(
        labels=torch.nn.functional.pad(targets.labels, (0, 3)),
        boxes=torch.nn.functional.pad(targets.boxes, (0, 0, 0, 3)),
    )
    wider = assign_by_iou(boxes, more, priority, **options)
    assert torch.equal(wider.query_index[:, :6], one.query_index)
    assert torch.equal(wider.mask[:, :6], one.mask)
    assert not wider.mask[:, 6:].any()
    assert torch.equal(wider.target, one.target)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_boxes_that_are_not_finite_do_no_harm(bad):
    targets = random_targets(4, 2, slots=5)
    boxes = near(targets, 12, 0.3)
    boxes[:, ::4] = bad
    pairs = assign_by_iou(boxes, targets, torch.rand(2, 12), **Options()._asdict())
    assert ((pairs.query_index >= 0) & (pairs.query_index < 12)).all()
    assert (pairs.target < 5).all()


def test_a_box_of_nan_overlaps_nothing():
    targets = random_targets(3, slots=3)
    boxes = torch.cat((near(targets, 6, 0.1), random_boxes(1, 5)), dim=1)
    priority = torch.rand(boxes.shape[:2])
    expected = assign_by_iou(boxes, targets, priority, **Options()._asdict())
    bad = torch.full_like(boxes[:, :1], float("nan"))
    boxes, priority = torch.cat((boxes, bad), dim=1), torch.cat((priority, bad[..., 0]), dim=1)
    found = assign_by_iou(boxes, targets, priority, **Options()._asdict())
    assert expected.mask.all(1).any()
    assert torch.equal(found.query_index, expected.query_index)
    assert torch.equal(found.mask, expected.mask)
    assert found.target[0].tolist() == [*expected.target[0].tolist(), -1]


def test_half_precision_boxes_are_compared_in_float32():
    targets = random_targets(4, 2, slots=5, dtype=torch.float32)
    boxes, priority = near(targets, 12, 0.3).bfloat16(), torch.rand(2, 12)
    options = Options()._asdict()
    one, other = (assign_by_iou(x, targets, priority, **options) for x in (boxes, boxes.float()))
    assert all(map(torch.equal, one, other))
