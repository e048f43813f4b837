"""Deformable encoder: every token attends to a few points of every level around itself."""

from __future__ import annotations

from torch import Tensor, nn

from msdetr.config import ModelConfig
from msdetr.model.activation_checkpointing import call_module
from msdetr.model.attention import MSDeformAttn
from msdetr.model.geometry import cell_centers, level_valid_ratios
from msdetr.model.layers import Dropout, FeedForward
from msdetr.structures import FeaturePyramid, SpatialShapes


class EncoderLayer(nn.Module):
    """Deformable self-attention and feed-forward network, post-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(
            config.hidden_dim, config.num_levels, config.num_heads, config.num_encoder_points
        )
        self.dropout = Dropout(config.dropout)
        self.self_attn_norm = nn.LayerNorm(config.hidden_dim)
        self.ffn = FeedForward(config.hidden_dim, config.feedforward_dim, config.dropout)

    def forward(self, pyramid: FeaturePyramid, pos: Tensor, reference_points: Tensor) -> Tensor:
        """New tokens [B, S, C] from those of `pyramid`, position codes [B, S, C] and reference
        points [B, S, L, 2]."""
        tokens = pyramid.tokens
        attended = self.self_attn(
            tokens + pos,
            reference_points,
            tokens,
            pyramid.spatial_shapes,
            pyramid.valid_sizes,
        )
        tokens = self.self_attn_norm(tokens + self.dropout(attended))
        output: Tensor = self.ffn(tokens)
        return output


class Encoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.activation_checkpointing = False
        """Recompute the layers in the backward pass, see `Detector.checkpoint_activations`."""
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_encoder_layers))

    def forward(self, pyramid: FeaturePyramid, pos: Tensor) -> FeaturePyramid:
        """Tokens [B, S, C] of `pyramid`, encoded, given position codes `pos` [B, S, C]."""
        reference_points = self.reference_points(pyramid.spatial_shapes, pyramid.valid_sizes)
        for layer in self.layers:
            tokens = call_module(
                layer,
                pyramid,
                pos,
                reference_points,
                activation_checkpointing=self.activation_checkpointing,
                has_dropout=self.dropout > 0,
            )
            pyramid = pyramid._replace(tokens=tokens)
        return pyramid

    def reference_points(self, spatial_shapes: SpatialShapes, valid_sizes: Tensor) -> Tensor:
        """[B, S, L, 2], the centre of each token's cell on every level's padded map."""
        centers = cell_centers(spatial_shapes, valid_sizes)
        ratios = level_valid_ratios(spatial_shapes, valid_sizes)
        return centers[:, :, None] * ratios[:, None]
