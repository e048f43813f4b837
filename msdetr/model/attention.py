"""Deformable attention and self-attention, with the parameters of the published code."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdetr.model.query_sets import QuerySets, visible_queries
from msdetr.ops.dispatch import Impl
from msdetr.ops.ms_deform_attn import ms_deform_attn_fused
from msdetr.structures import SpatialShapes, split_groups


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its projections.

    Offsets and attention logits keep separate parameters (their learning rates differ) and come
    from one matrix product. `impl` chooses the implementation of the sampling (see
    `msdetr.ops.dispatch`) and may be assigned to.
    """

    def __init__(self, hidden_dim: int, num_levels: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        self.num_levels = num_levels
        self.num_heads = num_heads
        self.num_points = num_points
        self.impl: Impl = "auto"
        num_samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(hidden_dim, num_samples * 2)
        self.attention_weights = nn.Linear(hidden_dim, num_samples)
        self.value_proj = nn.Linear(hidden_dim, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, hidden_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Point p of head m starts p steps away along the head's direction; weights are uniform."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.num_heads) * (2.0 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)  # [M, 2], on the square
        steps = torch.arange(1, self.num_points + 1, dtype=directions.dtype)
        offsets = directions[:, None, None, :] * steps[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        tokens: Tensor,
        spatial_shapes: SpatialShapes,
        valid_sizes: Tensor | None,
    ) -> Tensor:
        """Attend from queries to feature maps.

        Args:
            query: [B, Q, C]
            reference_points: [B, Q, L, 2 or 4] fractions of the padded maps.
            tokens: [B, S, C]
            spatial_shapes: L pairs (height, width).
            valid_sizes: [B, L, 2] valid (height, width), or None without padding.

        Returns:
            [B, Q, C]
        """
        weight = torch.cat((self.sampling_offsets.weight, self.attention_weights.weight))
        bias = torch.cat((self.sampling_offsets.bias, self.attention_weights.bias))
        projection = F.linear(query, weight, bias)
        value = self.value_proj(tokens).unflatten(-1, (self.num_heads, -1))
        sampled = ms_deform_attn_fused(
            value, spatial_shapes, projection, reference_points, valid_sizes, impl=self.impl
        )
        output: Tensor = self.output_proj(sampled)
        return output


class SelfAttention(nn.Module):
    """Multi-head attention among queries; the position code enters query and key.

    One call per set: groups are folded into the batch. Only denoising queries need a mask.

    Parameter names and initialisation are those of `torch.nn.MultiheadAttention`.
    """

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_dim, hidden_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_dim))
        self.out_proj = nn.Linear(hidden_dim, hidden_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, query_pos: Tensor, sets: QuerySets) -> Tensor:
        """Attend as `sets` allow.

        Args:
            x: [B, Q, C] queries of all sets.
            query_pos: [B, Q, C] position codes.
            sets: how the queries are grouped.

        Returns:
            [B, Q, C]
        """
        channels = x.shape[-1]
        weight_qk, weight_v = self.in_proj_weight.split((2 * channels, channels))
        bias_qk, bias_v = self.in_proj_bias.split((2 * channels, channels))
        query, key = F.linear(x + query_pos, weight_qk, bias_qk).chunk(2, dim=-1)
        value = F.linear(x, weight_v, bias_v)
        parts = zip(*map(sets.split, (query, key, value)), strict=True)
        num_inferring = sets.primary.group_size
        attended = []
        for query_set, part in zip(sets.sets, parts, strict=True):
            if query_set.sees_primary:
                seen_key, seen_value = (
                    torch.cat((own, sets.of_primary(field)[:, :num_inferring]), dim=1)
                    for own, field in zip(part[1:], (key, value), strict=True)
                )
                visible = visible_queries(query_set, num_inferring, x.device)
                attended.append(self._attend(part[0], seen_key, seen_value, visible))
            else:
                group = [split_groups(field, query_set.num_groups, dim=1) for field in part]
                attended.append(self._attend(*group).view(len(x), -1, channels))
        output: Tensor = self.out_proj(
            attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)
        )
        return output

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None
    ) -> Tensor:
        """Attention of P problems: [P, Q, C] each, and the keys [Q, keys] that a query sees."""

        def split_heads(tensor: Tensor) -> Tensor:
            return tensor.view(*tensor.shape[:-1], self.num_heads, -1).transpose(1, 2)

        attended: Tensor = F.scaled_dot_product_attention(
            split_heads(query),
            split_heads(key),
            split_heads(value),
            attn_mask=visible,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return attended.transpose(1, 2).flatten(2)
