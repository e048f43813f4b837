"""Feature levels of any number, from any backbone."""

from __future__ import annotations

import math

import pytest
import torch

from msdetr.model.backbone import ConvNetBackbone
from msdetr.model.neck import Neck


@pytest.mark.parametrize(
    ("num_levels", "strides"),
    [
        (1, [32]),
        (2, [16, 32]),
        (3, [8, 16, 32]),
        (4, [8, 16, 32, 64]),
        (5, [8, 16, 32, 64, 128]),
    ],
)
@pytest.mark.parametrize("size", [(128, 256), (100, 37)])
def test_strides(num_levels, strides, size):
    backbone = ConvNetBackbone()
    levels = Neck(backbone.channels, 36, num_levels)(backbone(torch.randn(1, 3, *size)))
    expected = [(1, 36, *(math.ceil(side / stride) for side in size)) for stride in strides]
    assert [level.shape for level in levels] == expected


def test_first_extra_level_reads_the_backbone_and_the_next_the_level_before():
    neck = Neck((4, 6, 8), 32, 5)
    features = [
        torch.randn(1, width, side, side)
        for width, side in zip((4, 6, 8), (32, 16, 8), strict=True)
    ]
    levels = neck(features)
    for index in range(3):
        torch.testing.assert_close(levels[index], neck.projections[index](features[index]))
    torch.testing.assert_close(levels[3], neck.projections[3](features[2]))
    torch.testing.assert_close(levels[4], neck.projections[4](levels[3]))


def test_projections_are_normalised_and_start_without_bias():
    for projection in Neck((4, 6, 8), 32, 5).projections:
        conv, norm = projection
        assert isinstance(norm, torch.nn.GroupNorm)
        assert norm.num_groups == 32
        assert not conv.bias.any()
        assert conv.weight.any()
    assert Neck((4, 6, 8), 36, 1).projections[0][1].num_groups == 4


def test_unused_stages_hold_no_parameters():
    """A stage that no level reads must not leave parameters without gradients behind."""
    neck = Neck((4, 6, 8), 32, 2)
    assert [projection[0].in_channels for projection in neck.projections] == [6, 8]
