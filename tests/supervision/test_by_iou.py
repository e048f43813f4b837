"""Matching by the IoU of anchors: classes, layers, priorities."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scenes import random_scene
from torch import Tensor

from msdetr.config import AssignmentConfig, LossConfig
from msdetr.ops.iou_assignment import assign_by_iou
from msdetr.structures import Branch, DetectorOutput, Predictions, Targets
from msdetr.supervision.criterion import Criterion
from msdetr.supervision.matchers import ByIoU, MatchContext, decoder_matcher, encoder_matcher

LAYERS, QUERIES, CLASSES = 3, 16, 4
CONFIG = AssignmentConfig(decoder_match="iou", encoder_match="iou")


def anchored_branch(
    *counts: int, layers: int = LAYERS, queries: int = QUERIES
) -> tuple[Branch, Targets]:
    scene = random_scene(counts, layers=layers, queries=queries, classes=CLASSES)
    anchors = random_scene(counts, layers=1, queries=queries).boxes[0]
    near = scene.targets.boxes[:, torch.arange(queries) % max(max(counts), 1)]
    anchors = torch.where(torch.rand(len(counts), queries, 1) < 0.5, 0.97 * near + 0.01, anchors)
    return Branch(Predictions(scene.logits, scene.boxes), anchors), scene.targets


def test_all_layers_have_the_pairs_of_the_anchors():
    branch, targets = anchored_branch(5, 0, 3)
    priority = torch.rand(3, QUERIES)
    found = decoder_matcher(CONFIG)(branch, targets, MatchContext(priority=priority))
    pairs = assign_by_iou(
        branch.anchors, targets, priority, k=4, threshold=0.6, max_positives=QUERIES // 4
    )
    assert pairs.mask.any()
    for layer in range(LAYERS):
        assert torch.equal(found.query_index[layer], pairs.query_index)
        assert torch.equal(found.mask[layer], pairs.mask)
        for image in range(3):
            labels = [targets.labels[image, t] if t >= 0 else -1 for t in pairs.target[image]]
            assert found.target_class[layer, image].tolist() == [int(label) for label in labels]


@pytest.mark.parametrize(
    ("queries", "fraction", "positives"), [(7, 0.25, 1), (7, 0.0, 0), (7, 0.99, 6), (8, 0.25, 2)]
)
def test_the_number_of_positives_is_rounded_down(queries, fraction, positives):
    branch, targets = anchored_branch(2, queries=queries)
    matcher = ByIoU(k=queries, threshold=0.0, positive_fraction=fraction)  # All are positive.
    found = matcher(branch, targets, MatchContext(priority=torch.rand(1, queries)))
    assert found.mask[0].sum() == positives


def test_predictions_do_not_matter():
    branch, targets = anchored_branch(5, 0, 3)
    other = branch._replace(predictions=Predictions(*(x + 1.0 for x in branch.predictions)))
    context = MatchContext(priority=torch.rand(3, QUERIES))
    one, same = (decoder_matcher(CONFIG)(x, targets, context) for x in (branch, other))
    assert all(map(torch.equal, one, same))


def test_the_last_layer_s_priority_is_that_of_all():
    branch, targets = anchored_branch(5, 0, 3)
    matcher = ByIoU(k=4, threshold=0.0, max_positives=3)
    priority = torch.rand(LAYERS, 3, QUERIES)
    one, same, other = (
        matcher(branch, targets, MatchContext(priority=x))
        for x in (priority, priority[-1], priority[0])
    )
    assert all(map(torch.equal, one, same))
    assert not torch.equal(one.mask, other.mask)


def test_proposals_learn_that_there_is_an_object():
    branch, targets = anchored_branch(5, 0, 3, layers=1)
    targets.labels[:] = torch.where(targets.mask, 2, 0)
    context = MatchContext(priority=torch.rand(3, QUERIES))
    found = encoder_matcher(CONFIG)(branch, targets, context)
    assert found.mask.any()
    assert set(found.target_class.flatten().tolist()) == {-1, 0}
    served = found.target_class[0] == 0
    for image in range(3):
        queries = found.query_index[0, image][found.mask[0, image]]
        assert served[image].nonzero()[:, 0].tolist() == sorted(set(queries.tolist()))


def test_the_matchers_of_a_configuration():
    config = replace(
        CONFIG,
        iou_k=3,
        iou_threshold=0.55,
        encoder_iou_threshold=0.65,
        encoder_max_positives=77,
        positive_fraction=0.5,
    )
    assert decoder_matcher(config) == ByIoU(k=3, threshold=0.55, positive_fraction=0.5)
    assert encoder_matcher(config) == ByIoU(
        k=3, threshold=0.65, max_positives=77, class_agnostic=True
    )


def test_a_query_of_several_targets_counts_for_all_boxes_and_learns_the_last_class():
    branch, targets = anchored_branch(6, 0, 6, queries=40)
    config = replace(CONFIG, iou_threshold=0.1, positive_fraction=1.0)
    criterion, output = Criterion(config, LossConfig()), DetectorOutput({"one_to_one": branch})
    found = criterion.assign(output, targets)["one_to_one"]
    distance = torch.zeros(LAYERS)
    served: dict[tuple[int, int], list[int]] = {}
    for image, target, place in found.mask[0].nonzero().tolist():
        query = int(found.query_index[0, image, target, place])
        served.setdefault((image, query), []).append(target)
        boxes = branch.predictions.boxes[:, image, query]
        distance += (boxes - targets.boxes[image, target]).abs().sum(-1)
    assert sum(len(several) > 1 for several in served.values()) > 3
    for (image, query), several in served.items():
        label = int(targets.labels[image, max(several)])
        assert (found.target_class[:, image, query] == label).all()
    result = criterion(output, targets).terms["one_to_one/bbox"]
    torch.testing.assert_close(result, distance / 12)


@pytest.mark.parametrize("stage", ["one_to_one", "encoder"])
def test_the_criterion_draws_priorities(stage):
    branch, targets = anchored_branch(5, 0, 3, layers=1 if stage == "encoder" else LAYERS)
    primary = random_scene((5, 0, 3), layers=LAYERS, queries=QUERIES, classes=CLASSES)
    output = DetectorOutput(
        {"one_to_one": Branch(Predictions(primary.logits, primary.boxes), branch.anchors)}
        | {stage: branch}
    )
    config = replace(CONFIG, iou_threshold=0.0, encoder_iou_threshold=0.0, encoder_max_positives=4)
    criterion = Criterion(config, LossConfig())

    def run(seed: int) -> Tensor:
        return criterion.assign(output, targets, generator=torch.Generator().manual_seed(seed))[
            stage
        ].mask

    first, again, *others = (run(seed) for seed in (1, 1, 2, 3, 4))
    assert torch.equal(first, again)
    assert not all(torch.equal(first, other) for other in others)


def test_anchors_and_a_priority_are_needed():
    branch, targets = anchored_branch(5)
    matcher = decoder_matcher(CONFIG)
    with pytest.raises(ValueError, match="reads anchors, and the branch has none"):
        matcher(branch._replace(anchors=None), targets, MatchContext(priority=torch.rand(1, 16)))
    with pytest.raises(ValueError, match="needs a random priority"):
        matcher(branch, targets, MatchContext())
