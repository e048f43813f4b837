"""The batch structures' own behaviour."""

from __future__ import annotations

import torch

from msdetr.structures import Targets, spatial_shapes_tensor


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
