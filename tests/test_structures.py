"""The batch structures' own behaviour."""

from __future__ import annotations

import torch

from msdetr.structures import (
    Branch,
    DetectorOutput,
    Predictions,
    Targets,
    spatial_shapes_tensor,
)


def test_target_mask_marks_the_first_slots():
    count = torch.tensor([0, 2, 3])
    targets = Targets(torch.zeros(3, 3, dtype=torch.int64), torch.zeros(3, 3, 4), count)
    assert targets.count is count
    assert targets.mask.tolist() == [
        [False, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_target_mask_without_slots():
    targets = Targets(
        torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, 4), torch.zeros(2).long()
    )
    assert targets.mask.shape == (2, 0)


def test_spatial_shapes_tensor():
    shapes = spatial_shapes_tensor(
        ((3, 5), (2, 1)), dtype=torch.float64, device=torch.device("cpu")
    )
    assert shapes.dtype == torch.float64
    assert shapes.tolist() == [[3.0, 5.0], [2.0, 1.0]]


def branch_of_groups(num_groups: int) -> Branch:
    """Two layers, three images, two queries per group. A query's values are its number; anchors
    add 100 per image."""
    numbers = torch.arange(2 * num_groups, dtype=torch.float32)[:, None]
    logits, boxes = (numbers.expand(2, 3, -1, width).clone() for width in (5, 4))
    anchors = numbers + 100 * torch.arange(3)[:, None, None]
    return Branch(Predictions(logits, boxes), anchors.expand(3, -1, 4), num_groups)


def test_groups_of_a_branch_are_images():
    branch = branch_of_groups(4).groups_as_images()
    logits, boxes = branch.predictions
    assert logits.shape == (2, 12, 2, 5)
    assert boxes.shape == (2, 12, 2, 4)
    assert branch.num_groups == 1
    rows = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert logits[1, :, :, 0].tolist() == boxes[1, :, :, 0].tolist() == 3 * rows
    expected = [[100 * image + x for x in row] for image in range(3) for row in rows]
    assert branch.anchors[..., 0].tolist() == expected


def test_the_first_group_is_the_result():
    logits, boxes = DetectorOutput({"one_to_one": branch_of_groups(4)}).one_to_one
    assert logits.shape == (2, 3, 2, 5)
    assert boxes.shape == (2, 3, 2, 4)
    assert logits[0, 0, :, 0].tolist() == boxes[0, 0, :, 0].tolist() == [0, 1]
