"""Selection by level without duplicates, against the published steps on each image by itself."""

from __future__ import annotations

import pytest
import torch
from model.helpers import image_batch, random_pyramid, randomize, tiny_config
from torch import Tensor
from torchvision.ops import batched_nms

from msdetr.boxes import cxcywh_to_xyxy
from msdetr.model import proposal_nms
from msdetr.model.detector import Detector
from msdetr.model.heads import DetectionHeads
from msdetr.model.proposal_nms import select_by_level
from msdetr.model.proposal_queries import ProposalQueries
from msdetr.structures import SpatialShapes

SHAPES = ((6, 8), (3, 4), (2, 2))


def published(
    scores: Tensor,
    boxes: Tensor,
    spatial_shapes: SpatialShapes,
    num_selected: int,
    *,
    iou_threshold: float,
    per_level: int = 1000,
) -> list[int]:
    """DETA's selection of one image (arXiv:2212.06137, section 3.3), with lists."""
    sizes = [height * width for height, width in spatial_shapes]
    levels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    best = scores.topk(num_selected).indices.tolist()
    candidates = torch.cat(
        [
            tokens[scores[tokens].topk(min(per_level, len(tokens))).indices]
            for tokens in ((levels == level).nonzero()[:, 0] for level in range(len(sizes)))
        ]
    )
    corners = cxcywh_to_xyxy(boxes.float()).clamp(0, 1)[candidates]
    rank = scores[candidates].argsort().argsort().float()
    kept = candidates[batched_nms(corners, rank, levels[candidates], iou_threshold)]
    if len(kept) < num_selected:
        return best
    share = num_selected // len(sizes)
    chosen = [False] * len(kept)
    for level in range(len(sizes)):
        places = (levels[kept] == level).nonzero()[:share, 0]
        for place in places.tolist():
            chosen[place] = True
    for place, is_chosen in enumerate(chosen):
        if not is_chosen and sum(chosen) < num_selected:
            chosen[place] = True
    return [token for token, is_chosen in zip(kept.tolist(), chosen, strict=True) if is_chosen]


def scene(
    batch: int, shapes: SpatialShapes, *, side: float, copies: int = 1
) -> tuple[Tensor, Tensor]:
    """Scores without ties, and boxes, each of them `copies` times."""
    number = sum(height * width for height, width in shapes)
    scores = torch.stack([torch.randperm(number) for _ in range(batch)]) / number - 0.5
    center = torch.rand(batch, number, 2)
    size = side * (0.5 + torch.rand(batch, number, 2))
    boxes = torch.cat((center, size), dim=-1)
    original = torch.arange(number) // copies * copies
    return scores, boxes[:, original]


def check(scores: Tensor, boxes: Tensor, shapes: SpatialShapes, num_selected: int, **options):
    result = select_by_level(scores, boxes, shapes, num_selected, **options)
    assert result.shape == (len(scores), num_selected)
    per_level = {"per_level": proposal_nms.CANDIDATES_PER_LEVEL}
    options.pop("impl", None)
    for image, (image_scores, image_boxes) in enumerate(zip(scores, boxes, strict=True)):
        expected = published(image_scores, image_boxes, shapes, num_selected, **options | per_level)
        assert result[image].tolist() == expected, image
    return result


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("side", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("num_selected", [1, 7, 20, 45])
def test_selection(num_selected, side, threshold):
    """Few to many boxes remain, and the last levels have fewer than their share."""
    scores, boxes = scene(6, SHAPES, side=side)
    check(scores, boxes, SHAPES, num_selected, iou_threshold=threshold)


@pytest.mark.parametrize("copies", [2, 8])
@pytest.mark.parametrize("num_selected", [6, 12, 40])
def test_duplicates(num_selected, copies):
    scores, boxes = scene(4, SHAPES, side=0.1, copies=copies)
    check(scores, boxes, SHAPES, num_selected, iou_threshold=0.9)


def test_too_few_remain():
    """All boxes are one: the best scores, duplicates included."""
    scores, _ = scene(3, SHAPES, side=0.1)
    boxes = torch.full((*scores.shape, 4), 0.5)
    result = check(scores, boxes, SHAPES, 4, iou_threshold=0.9)
    assert torch.equal(result, scores.topk(4, dim=1).indices)
    one_of_each = check(scores, boxes, SHAPES, 3, iou_threshold=0.9)
    for image in range(3):
        assert {int(index >= 48) + int(index >= 60) for index in one_of_each[image]} == {0, 1, 2}


def test_images_take_different_outcomes():
    scores, boxes = scene(4, SHAPES, side=0.1)
    boxes[1] = 0.5
    boxes[3, 10:] = 0.25
    check(scores, boxes, SHAPES, 15, iou_threshold=0.5)


@pytest.mark.parametrize("limit", [1, 5, 13, 48])
@pytest.mark.parametrize("side", [0.05, 0.4])
def test_only_the_best_of_a_level_are_looked_at(monkeypatch, limit, side):
    monkeypatch.setattr(proposal_nms, "CANDIDATES_PER_LEVEL", limit)
    for num_selected in (3, 9, 30):
        scores, boxes = scene(3, SHAPES, side=side)
        check(scores, boxes, SHAPES, num_selected, iou_threshold=0.5)


def test_a_level_of_more_than_a_thousand():
    shapes = ((40, 40), (20, 20))
    scores, boxes = scene(2, shapes, side=0.05)
    check(scores, boxes, shapes, 300, iou_threshold=0.5)


def test_equal_scores():
    """Which of them are taken is not defined; shares and suppression hold."""
    scores = torch.zeros(2, 64)
    _, boxes = scene(2, SHAPES, side=0.05)
    selected = select_by_level(scores, boxes, SHAPES, 12, iou_threshold=1.0)
    for image in selected.tolist():
        assert len(set(image)) == 12
        levels = [int(index >= 48) + int(index >= 60) for index in image]
        assert [levels.count(level) for level in range(3)] == [4, 4, 4]


def test_boxes_are_clipped_before_suppression():
    """Two boxes that differ beyond the image only are one."""
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    boxes = torch.tensor([[[0.1, 0.5, 0.4, 0.4], [0.0, 0.5, 0.6, 0.4], [0.8] * 4, [0.7, 0.2] * 2]])
    selected = select_by_level(scores, boxes, ((2, 2),), 3, iou_threshold=0.9)
    assert selected.tolist() == [[0, 2, 3]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_boxes_that_are_not_finite_do_no_harm(bad):
    scores, boxes = scene(2, SHAPES, side=0.05)
    boxes[:, ::5] = bad
    selected = select_by_level(scores, boxes, SHAPES, 20, iou_threshold=0.5)
    assert all(len(set(image)) == 20 for image in selected.tolist())
    assert ((selected >= 0) & (selected < 64)).all()


CONFIG = tiny_config(
    num_queries=6,
    proposal_nms_iou_threshold=0.5,
    proposal_content=True,
    one_to_many="none",
    one_to_many_ffn=False,
    num_levels=3,
)


@pytest.mark.parametrize("training", [True, False])
def test_the_queries_are_the_selected_proposals(training):
    selection = ProposalQueries(CONFIG).double().train(training)
    heads = DetectionHeads(CONFIG, 3).double()
    randomize(selection)
    randomize(heads)
    pyramid = random_pyramid(SHAPES, [list(SHAPES), [(5, 6), (3, 3), (2, 2)]])
    queries = selection(pyramid, heads)
    training_queries = selection.train()(pyramid, heads)
    predictions = training_queries.proposals["encoder"].predictions
    scores, boxes = predictions.logits[0, ..., 0].detach(), predictions.boxes[0].detach()
    for image in range(2):
        best = published(scores[image], boxes[image], SHAPES, 6, iou_threshold=0.5)
        assert best != scores[image].topk(6).indices.tolist(), "suppression matters"
        torch.testing.assert_close(queries.reference[image], boxes[image, best])
    torch.testing.assert_close(queries.content, training_queries.content)
    assert ("encoder" in queries.proposals) == training


def test_evaluation_selects_as_training_does():
    detector, images = Detector(CONFIG).double(), image_batch()
    randomize(detector)
    with torch.no_grad():
        training, evaluation = detector(images), detector.eval()(images)
    for result, expected in zip(evaluation.one_to_one, training.one_to_one, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-11)
