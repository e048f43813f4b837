"""The whole detector: backbone, neck, encoder, query selection, decoder."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from msdetr.config import ModelConfig
from msdetr.model.backbone import build_backbone, load_backbone_weights
from msdetr.model.decoder import Decoder
from msdetr.model.denoising import DenoisingQueries
from msdetr.model.encoder import Encoder
from msdetr.model.geometry import level_valid_sizes
from msdetr.model.heads import DetectionHeads
from msdetr.model.neck import Neck
from msdetr.model.position_embedding import LearnedPositionEmbedding, SinePositionEmbedding
from msdetr.model.proposal_queries import ProposalQueries
from msdetr.model.query_selection import AnchorQueries, EmbeddedQueries, Queries, QuerySelection
from msdetr.structures import DetectorOutput, FeaturePyramid, ImageBatch, Targets

# Mean and standard deviation of ImageNet's RGB values, the normalisation of torchvision's weights.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


class Detector(nn.Module):
    """MS-DETR and its relatives, selected by `ModelConfig`.

    Raises:
        ValueError: `config.num_classes` is not set.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.num_classes is None:
            raise ValueError("num_classes is not set: take it from the data set's label map")
        self.config = config
        self.backbone = build_backbone(config)
        self.neck = Neck(self.backbone.channels, config.hidden_dim, config.num_levels)
        self.position_embedding: SinePositionEmbedding | LearnedPositionEmbedding
        if config.position_embedding == "sine":
            self.position_embedding = SinePositionEmbedding(
                config.hidden_dim,
                temperature=config.position_temperature,
                offset=config.position_offset,
            )
        else:
            self.position_embedding = LearnedPositionEmbedding(config.hidden_dim)
        self.level_embed = nn.Parameter(torch.randn(config.num_levels, config.hidden_dim))
        self.encoder = Encoder(config)
        self.query_selection = _query_selection(config)
        self.denoising: DenoisingQueries | None = None
        if config.denoising != "none":
            self.denoising = DenoisingQueries(config, config.num_classes)
        self.decoder = Decoder(config)
        self.heads = DetectionHeads(config, config.num_classes)
        self.register_buffer("pixel_mean", _per_channel(PIXEL_MEAN), persistent=False)
        self.register_buffer("pixel_std", _per_channel(PIXEL_STD), persistent=False)

    def forward(
        self, images: ImageBatch, targets: Targets | None = None, noise: Tensor | None = None
    ) -> DetectorOutput:
        """Detect objects in a batch of images.

        Args:
            images: uint8 pixels are normalised here; floating-point pixels are used unchanged.
            targets: of the images, padded to at least one slot. Only denoising reads them, in
                training mode.
            noise: random numbers of `draw_noise` for these targets; default: new ones.

        Returns:
            Predictions of all decoder layers. In training mode also those of the one-to-many
            branch, of extra and denoising queries and of the encoder, where configured.

        Raises:
            ValueError: two-stage, and the images have fewer tokens than there are queries.
                Denoising in training mode, and there are no targets.
        """
        features = self.backbone(self.normalize(images))
        pyramid, pos = self.flatten(features, images)
        memory = self.encoder(pyramid, pos)
        queries: Queries = self.query_selection(memory, self.heads)
        if self.denoising is not None and self.training:
            if targets is None:
                raise ValueError("a model with denoising needs the targets in training mode")
            if noise is None:
                noise = self.denoising.draw(targets)
            queries = self.with_denoising(queries, targets, noise)
        branches = self.decoder(queries, memory, self.heads)
        return DetectorOutput(branches | queries.proposals)

    def draw_noise(self, targets: Targets, generator: torch.Generator | None) -> Tensor | None:
        """Random numbers for the denoising queries of a batch, outside of compiled code.

        Returns:
            See `DenoisingQueries.draw`; None without denoising.
        """
        return None if self.denoising is None else self.denoising.draw(targets, generator)

    def with_denoising(self, queries: Queries, targets: Targets, noise: Tensor) -> Queries:
        """The queries of a batch, with the denoising set before them."""
        assert self.denoising is not None
        denoising = self.denoising(targets, noise)
        query_pos = queries.query_pos
        if query_pos is not None:
            assert isinstance(self.query_selection, ProposalQueries)  # the others have no boxes
            code, _ = self.query_selection.code(denoising.reference)
            query_pos = torch.cat((code, query_pos), dim=1)
        return Queries(
            torch.cat((denoising.content, queries.content), dim=1),
            query_pos,
            torch.cat((denoising.reference, queries.reference), dim=1),
            queries.sets.preceded_by(denoising.query_set),
            queries.proposals,
        )

    def checkpoint_activations(self, parts: Literal["none", "encoder", "all"]) -> None:
        """Choose the modules whose activations are recomputed in the backward pass.

        `encoder`: the encoder's layers, which hold most of the memory (every token of every
        level). `all`: the decoder's layers and the backbone's stages as well. Losses and gradients
        stay the same.
        """
        self.encoder.activation_checkpointing = parts != "none"
        self.decoder.activation_checkpointing = parts == "all"
        self.backbone.activation_checkpointing = parts == "all"

    def flatten(self, features: list[Tensor], images: ImageBatch) -> tuple[FeaturePyramid, Tensor]:
        """Feature levels and their position codes [B, S, C], from the backbone's features."""
        levels = self.neck(features)
        spatial_shapes = tuple((level.shape[2], level.shape[3]) for level in levels)
        padded_size = (images.pixels.shape[2], images.pixels.shape[3])
        valid_sizes = level_valid_sizes(images.sizes, padded_size, spatial_shapes)
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        codes = self.position_embedding(spatial_shapes, valid_sizes)
        pos = torch.cat(
            [
                code.to(tokens.dtype) + embedding
                for code, embedding in zip(codes, self.level_embed, strict=True)
            ],
            dim=1,
        )
        return FeaturePyramid(tokens, spatial_shapes, valid_sizes), pos

    def normalize(self, images: ImageBatch) -> Tensor:
        """The backbone's input [B, 3, H, W]."""
        pixels = images.pixels
        if pixels.is_floating_point():
            return pixels
        mean, std = cast(Tensor, self.pixel_mean), cast(Tensor, self.pixel_std)
        normalized = (pixels.to(mean.dtype) / 255.0 - mean) / std
        # Padding is zero after normalisation, as it was for the published weights.
        height, width = pixels.shape[-2:]
        inside_y = torch.arange(height, device=pixels.device) < images.sizes[:, 0, None]
        inside_x = torch.arange(width, device=pixels.device) < images.sizes[:, 1, None]
        return normalized * (inside_y[:, None, :, None] & inside_x[:, None, None, :])


def build_detector(config: ModelConfig, *, initialize_backbone: bool = True) -> Detector:
    """Build the detector of a configuration.

    Args:
        config: with `num_classes` set.
        initialize_backbone: load the weights that `config.backbone_weights` names; False where a
            checkpoint is loaded next.

    Raises:
        ValueError, ConnectionError: see `msdetr.model.backbone.load_backbone_weights`.
    """
    detector = Detector(config)
    if initialize_backbone:
        load_backbone_weights(detector.backbone, config)
    return detector


def _query_selection(config: ModelConfig) -> QuerySelection:
    if config.two_stage:
        return ProposalQueries(config)
    return (EmbeddedQueries if config.query_position == "initial" else AnchorQueries)(config)


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None]
