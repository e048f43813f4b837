"""One-to-many assignment for the losses: classes of shared queries, priorities, merging."""

from __future__ import annotations

import pytest
import torch
from scenes import Scene, match, padded_targets, random_scene, with_garbage_padding

from msdetr.config import AssignmentConfig
from msdetr.ops.one_to_many import OneToMany, one_to_many
from msdetr.structures import Assignment
from msdetr.supervision.matchers import one_to_many_matcher, one_to_one_matcher

KEEP_ALL = AssignmentConfig(positive_fraction=1.0)
MERGE = AssignmentConfig(positive_fraction=1.0, indices_merge=True)


def assign(scene: Scene, config: AssignmentConfig = KEEP_ALL, **context) -> Assignment:
    context.setdefault("priority", torch.rand(scene.logits.shape[:3]))
    return match(one_to_many_matcher(config), scene, **context)


def matched(scene: Scene) -> dict[str, Assignment]:
    return {"one_to_one": match(one_to_one_matcher(KEEP_ALL), scene)}


def pairs_of(scene: Scene, config: AssignmentConfig = KEEP_ALL) -> OneToMany:
    """The op's result, for `positive_fraction` 1."""
    return one_to_many(
        *scene,
        torch.zeros(scene.logits.shape[:3]),
        k=config.one_to_many_k,
        threshold=config.one_to_many_threshold,
        positive_fraction=1.0,
    )


def crowded_scene(**options) -> Scene:
    """Overlapping targets, so that queries serve several of them."""
    scene = random_scene((6, 0, 9), queries=16, **options)
    scene.targets.boxes[0, 3] = scene.targets.boxes[0, 1]  # the same object twice
    scene.targets.labels[0, 3] = scene.targets.labels[0, 1]
    return scene


def winners(pairs: OneToMany, layer: int, image: int) -> dict[int, int]:
    """The target of each taken query: the highest score, the lowest index of equals."""
    best: dict[int, tuple[float, int]] = {}
    for target, place in pairs.mask[layer, image].nonzero().tolist():
        query = pairs.query_index[layer, image, target, place].item()
        score = pairs.score[layer, image, target, place].item()
        if query not in best or score > best[query][0]:
            best[query] = (score, target)
    return {query: target for query, (_, target) in best.items()}


def test_pairs_are_those_of_the_op():
    scene = crowded_scene()
    assignment, pairs = assign(scene), pairs_of(scene)
    assert torch.equal(assignment.query_index, pairs.query_index)
    assert torch.equal(assignment.mask, pairs.mask)


def test_a_shared_query_learns_the_class_of_its_best_pair():
    scene = crowded_scene(layers=6)
    assignment, pairs = assign(scene), pairs_of(scene)
    shared = 0
    for layer in range(6):
        for image in range(3):
            expected = torch.full((16,), -1)
            for query, target in winners(pairs, layer, image).items():
                expected[query] = scene.targets.labels[image, target]
            assert torch.equal(assignment.target_class[layer, image], expected)
            shared += pairs.mask[layer, image].sum().item() - (expected >= 0).sum().item()
    assert shared > 4, "the scene is to make queries serve several targets"


def test_equal_scores_give_the_first_target():
    box = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    targets = padded_targets([torch.tensor([1, 2])], [box.repeat(2, 1)], slots=3)
    scene = Scene(torch.zeros(1, 1, 1, 3), box[None, None], targets)
    # One query goes to one target, the first: only that one takes it.
    assignment = assign(scene)
    assert assignment.target_class.flatten().tolist() == [1]
    assert assignment.mask[0, 0, :, 0].tolist() == [True, False, False]

    # A second query earns the second target a place too, which the first query takes again.
    logits = torch.tensor([[0.0, 2.0, 2.0], [0.0, 1.0, 1.5]])[None, None]
    assignment = assign(Scene(logits, box.repeat(2, 1)[None, None], targets))
    assert assignment.mask[0, 0].tolist() == [[True, False], [True, False], [False, False]]
    assert not assignment.query_index.any()
    assert assignment.target_class.flatten().tolist() == [1, -1]


@pytest.mark.parametrize("config", [AssignmentConfig(positive_fraction=0.25), MERGE])
@pytest.mark.parametrize("value", [None, float("nan")])
def test_empty_slots_do_not_matter(config, value):
    scene = crowded_scene()
    garbage = scene._replace(targets=with_garbage_padding(scene.targets, 3, value))
    options = {"priority": torch.rand(2, 3, 16), "assignments": matched(scene)}
    assert all(
        map(torch.equal, assign(scene, config, **options), assign(garbage, config, **options))
    )


def test_no_targets():
    scene = random_scene((0, 0))
    for config in (KEEP_ALL, MERGE):
        assignment = assign(scene, config, assignments=matched(scene))
        assert not assignment.mask.any()
        assert (assignment.target_class == -1).all()


def test_a_priority_is_needed():
    with pytest.raises(ValueError, match="needs a random priority per query"):
        assign(random_scene((2,)), priority=None)


def test_merging_gives_each_query_one_target():
    scene = crowded_scene(layers=3)
    pairs, assignments = pairs_of(scene), matched(scene)
    one_to_one = assignments["one_to_one"]
    merged = assign(scene, MERGE, assignments=assignments)
    k = pairs.mask.shape[-1]
    assert merged.mask.shape[-1] == k + 1
    joined = refused = 0
    for layer in range(3):
        for image, count in enumerate(scene.targets.count.tolist()):
            # One-to-one first, then overwritten by one-to-many.
            expected = {}
            for target in range(count):
                if one_to_one.mask[layer, image, target, 0]:
                    expected[one_to_one.query_index[layer, image, target, 0].item()] = target
            many = winners(pairs, layer, image)
            joined += len(expected.keys() - many.keys())
            refused += len(expected.keys() & many.keys())
            expected |= many

            result = [
                (merged.query_index[layer, image, target, place].item(), target)
                for target, place in merged.mask[layer, image].nonzero().tolist()
            ]
            assert len(result) == len(expected)
            assert dict(result) == expected
            classes = torch.full((16,), -1)
            for query, target in expected.items():
                classes[query] = scene.targets.labels[image, target]
            assert torch.equal(merged.target_class[layer, image], classes)
    assert joined, "some one-to-one query is to be new"
    assert refused, "and some is to be taken"


def test_merging_needs_the_other_assignment():
    with pytest.raises(ValueError, match="indices_merge needs the assignment of 'one_to_one'"):
        assign(random_scene((2,)), MERGE)


def test_without_merging_the_other_assignment_is_ignored():
    scene = crowded_scene()
    with_other = assign(scene, KEEP_ALL, assignments=matched(scene))
    assert all(map(torch.equal, with_other, assign(scene)))


def test_options_reach_the_op():
    scene = random_scene((3, 2), queries=16)
    strict = AssignmentConfig(
        one_to_many_k=2,
        one_to_many_threshold=0.9,
        one_to_many_iou_weight=0.9,
        one_to_many_class_score_weight=0.1,
        positive_fraction=1.0,
    )
    expected = one_to_many(
        *scene,
        torch.zeros(2, 16),
        k=2,
        threshold=0.9,
        positive_fraction=1.0,
        iou_weight=0.9,
        class_weight=0.1,
    )
    assignment = assign(scene, strict)
    assert torch.equal(assignment.query_index, expected.query_index)
    assert torch.equal(assignment.mask, expected.mask)
    assert not torch.equal(assignment.mask.sum(-1), assign(scene).mask.sum(-1))
