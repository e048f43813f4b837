"""Pairs of denoising queries with their targets, and what the others learn."""

from __future__ import annotations

import pytest
import torch
from scenes import random_scene, with_garbage_padding
from torch import Tensor

from msdetr.config import AssignmentConfig, LossConfig
from msdetr.structures import (
    BACKGROUND,
    IGNORED,
    Assignment,
    Branch,
    DetectorOutput,
    Predictions,
    TargetCount,
    Targets,
)
from msdetr.supervision.criterion import Criterion, LossOutput
from msdetr.supervision.matchers import FixedPairs, MatchContext

LAYERS, GROUPS, SLOTS, CLASSES = 2, 3, 5, 3
SIDES = {"denoising": 1, "contrastive": 2}
KINDS = pytest.mark.parametrize("kind", SIDES)
COUNTS = pytest.mark.parametrize("counts", [(3, 0, 5), (4,), (0, 0)], ids=str)


def noised_output(kind: str, counts: tuple[int, ...]) -> tuple[DetectorOutput, Targets]:
    """A primary and a denoising set that record gradients, and targets with `SLOTS` slots."""
    scenes = {
        name: random_scene(
            counts,
            layers=LAYERS,
            queries=queries,
            classes=CLASSES,
            empty_slots=SLOTS - max(counts),
            dtype=torch.float64,
        )
        for name, queries in (("one_to_one", 7), (kind, GROUPS * SIDES[kind] * SLOTS))
    }
    branches = {
        name: Branch(
            Predictions(scene.logits.requires_grad_(), scene.boxes.requires_grad_()),
            num_groups=GROUPS if name == kind else 1,
        )
        for name, scene in scenes.items()
    }
    return DetectorOutput(branches), scenes["one_to_one"].targets


def of_copies(x: Tensor, kind: str) -> Tensor:
    """[N, B, G, S, T, ...] of the queries [N, B, Q, ...] of the denoising set."""
    return x.unflatten(2, (GROUPS, SIDES[kind], SLOTS))


def assign(output: DetectorOutput, targets: Targets, kind: str) -> Assignment:
    branch = output.branches[kind].groups_as_images()
    return FixedPairs()(branch, targets.repeated(GROUPS), MatchContext())


@KINDS
@COUNTS
def test_pairs(kind, counts):
    """Query t of each group restores target t. The others learn background, or nothing."""
    output, targets = noised_output(kind, counts)
    query_index, mask, target_class = assign(output, targets, kind)
    batch = len(counts)
    assert mask.shape == query_index.shape == (LAYERS, batch * GROUPS, SLOTS, 1)
    others = BACKGROUND if kind == "contrastive" else IGNORED
    for layer in range(LAYERS):
        for problem in range(batch * GROUPS):
            image = problem // GROUPS
            count = counts[image]
            assert mask[layer, problem, :, 0].tolist() == [t < count for t in range(SLOTS)]
            expected = list(range(count)) + [0] * (SLOTS - count)
            assert query_index[layer, problem, :, 0].tolist() == expected
            classes = target_class[layer, problem].tolist()
            assert classes[:count] == targets.labels[image, :count].tolist()
            assert classes[count:] == [others] * (SIDES[kind] * SLOTS - count)


def supervise(
    output: DetectorOutput, targets: Targets, **options: TargetCount
) -> tuple[LossOutput, dict[str, Predictions]]:
    """Losses, and gradients of the total."""
    losses = Criterion(AssignmentConfig(), LossConfig())(output, targets, **options)
    leaves = {name: branch.predictions for name, branch in output.branches.items()}
    flat = [x for predictions in leaves.values() for x in predictions]
    found = iter(torch.autograd.grad(losses.total, flat))
    return losses, {name: Predictions(next(found), next(found)) for name in leaves}


def test_empty_slots_of_dn_have_no_loss():
    """Neither value nor gradient, whatever they predict."""
    output, targets = noised_output("denoising", (3, 0, 5))
    losses, gradients = supervise(output, targets)
    filled = targets.mask[None, :, None, None].expand(LAYERS, 3, GROUPS, 1, SLOTS)
    for gradient in gradients["denoising"]:
        copies = of_copies(gradient, "denoising")
        assert copies[filled].all()
        assert not copies[~filled].any()
    with torch.no_grad():
        logits = of_copies(output.branches["denoising"].predictions.logits, "denoising")
        logits.masked_fill_(~filled[..., None], float("inf"))
    again, _ = supervise(output, targets)
    assert again.total == losses.total


def test_negatives_and_empty_slots_of_contrastive_denoising_learn_background():
    """By the class loss alone, in images without targets too."""
    output, targets = noised_output("contrastive", (3, 0, 5))
    _, (logits, boxes) = supervise(output, targets)[1].values()
    filled = targets.mask[None, :, None].expand(LAYERS, 3, GROUPS, SLOTS)
    positive = torch.stack((filled, torch.zeros_like(filled)), dim=3)
    logits, boxes = (of_copies(x, "contrastive") for x in (logits, boxes))
    assert boxes[positive].any(-1).all()
    assert not boxes[~positive].any()
    assert (logits[~positive] > 0).all(), "all classes are to fall"
    labels = targets.labels[None, :, None, None, :, None].expand(LAYERS, 3, GROUPS, 2, SLOTS, 1)
    own = logits.gather(-1, labels)[..., 0]
    assert (own[positive] < 0).all()


@KINDS
def test_values(kind):
    """Against the sum over all copies, written out."""
    output, targets = noised_output(kind, (3, 0, 5))
    losses, _ = supervise(output, targets)
    logits, boxes = (of_copies(x.detach(), kind) for x in output.branches[kind].predictions)
    number = GROUPS * 8
    distance = torch.zeros(LAYERS, dtype=torch.float64)
    for image, target in targets.mask.nonzero().tolist():
        difference = boxes[:, image, :, 0, target] - targets.boxes[image, target]
        distance += difference.abs().sum((1, 2))
    torch.testing.assert_close(losses.terms[f"{kind}/bbox"], distance / number)
    wanted = torch.zeros_like(logits)
    for image, target in targets.mask.nonzero().tolist():
        wanted[:, image, :, 0, target, targets.labels[image, target]] = 1.0
    p = logits.sigmoid()
    focal = torch.where(wanted > 0, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
    if kind == "denoising":
        focal = focal[:, targets.mask[:, None, None].expand(-1, GROUPS, 1, -1)]
    value = focal.flatten(1).sum(1) / number
    torch.testing.assert_close(losses.terms[f"{kind}/class"], value)


@KINDS
def test_a_batch_without_targets_has_no_denoising_loss(kind):
    output, targets = noised_output(kind, (0, 0))
    losses, gradients = supervise(output, targets)
    for term in ("class", "bbox", "giou"):
        assert losses.terms[f"{kind}/{term}"].tolist() == [0.0] * LAYERS
    for gradient in gradients[kind]:
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert losses.terms["one_to_one/class"].all()


@pytest.mark.parametrize("mean", [0.5, 0.0])
def test_a_process_without_targets_learns_background_if_another_has_some(mean):
    output, targets = noised_output("contrastive", (0, 0))
    counts = TargetCount(torch.tensor(mean), torch.tensor(0.0))
    losses, gradients = supervise(output, targets, num_targets=counts)
    logits, boxes = gradients["contrastive"]
    assert (losses.terms["contrastive/class"] > 0).tolist() == [mean > 0] * LAYERS
    assert bool(logits.all()) == (mean > 0)
    assert not boxes.any()


@KINDS
def test_what_the_losses_are_divided_by(kind):
    """DN-DETR counts the targets of the process, DINO the mean over processes, both per group."""
    output, targets = noised_output(kind, (3, 0, 5))

    def term(mean: float, local: float) -> Tensor:
        counts = TargetCount(torch.tensor(mean), torch.tensor(local))
        return supervise(output, targets, num_targets=counts)[0].terms[f"{kind}/bbox"]

    default = term(8.0, 8.0)
    mean, local = term(2.0, 8.0), term(8.0, 2.0)
    expected = (default, 4 * default) if kind == "denoising" else (4 * default, default)
    torch.testing.assert_close((mean, local), expected)
    few = term(0.1, 0.1)  # at least 1: in DN-DETR for all groups, in DINO for each
    torch.testing.assert_close(few, default * 8 * (GROUPS if kind == "denoising" else 1))


@KINDS
def test_summed_groups_are_those_of_the_primary_set(kind):
    output, targets = noised_output(kind, (3, 0, 5))
    average, summed = (
        Criterion(AssignmentConfig(), LossConfig(sum_group_losses=value))(output, targets)
        for value in (False, True)
    )
    assert torch.equal(average.terms[f"{kind}/class"], summed.terms[f"{kind}/class"])


@KINDS
@pytest.mark.parametrize("value", [None, float("nan")])
def test_what_empty_slots_hold_does_not_matter(kind, value):
    output, targets = noised_output(kind, (3, 0, 5))
    garbage = with_garbage_padding(targets, CLASSES, value)
    one, other = (assign(output, x, kind) for x in (targets, garbage))
    assert all(map(torch.equal, one, other))
    assert supervise(output, targets)[0].total == supervise(output, garbage)[0].total


@KINDS
def test_weights(kind):
    output, targets = noised_output(kind, (3, 0, 5))
    base = LossConfig()
    for term in ("class", "bbox", "giou"):
        heavier = LossConfig(**{f"denoising_{term}_weight": 100.0})
        light, heavy = (
            Criterion(AssignmentConfig(), loss)(output, targets) for loss in (base, heavier)
        )
        added = 100.0 - getattr(base, f"denoising_{term}_weight")
        expected = light.total + added * light.terms[f"{kind}/{term}"].sum()
        torch.testing.assert_close(heavy.total, expected)
