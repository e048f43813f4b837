"""Neck: feature levels of one width from the backbone's features."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from msdetr.model.backbone import group_norm


class Neck(nn.Module):
    """1x1 projections of backbone stages, and strided 3x3 convolutions for coarser levels.

    Levels come from the last backbone stages as far as these go. Further levels are strided
    convolutions of the last stage and of each other.
    """

    def __init__(self, channels: Sequence[int], hidden_dim: int, num_levels: int) -> None:
        super().__init__()
        self.num_stages = min(num_levels, len(channels))
        projections = [
            nn.Sequential(nn.Conv2d(width, hidden_dim, 1), group_norm(hidden_dim))
            for width in channels[-self.num_stages :]
        ]
        width = channels[-1]
        for _ in range(num_levels - self.num_stages):
            strided = nn.Conv2d(width, hidden_dim, 3, stride=2, padding=1)
            projections.append(nn.Sequential(strided, group_norm(hidden_dim)))
            width = hidden_dim
        self.projections = nn.ModuleList(projections)
        for projection in projections:
            conv = projection[0]
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Backbone features, fine to coarse, to `num_levels` maps [B, C, H, W]."""
        stages = features[-self.num_stages :]
        levels: list[Tensor] = []
        for index, projection in enumerate(self.projections):
            if index < self.num_stages:
                source = stages[index]
            elif index == self.num_stages:
                source = stages[-1]
            else:
                source = levels[-1]
            levels.append(projection(source))
        return levels
