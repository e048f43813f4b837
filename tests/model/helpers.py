"""Small configurations and images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msdetr.config import ModelConfig
from msdetr.structures import FeaturePyramid, ImageBatch

NUM_CLASSES = 3


def tiny_config(**changes: object) -> ModelConfig:
    """The smallest detector with everything in it."""
    defaults: dict[str, object] = {
        "backbone": "convnet",
        "backbone_weights": "none",
        "num_classes": NUM_CLASSES,
        "hidden_dim": 32,
        "num_heads": 2,
        "num_levels": 2,
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
        "num_encoder_points": 2,
        "num_decoder_points": 2,
        "feedforward_dim": 16,
        "dropout": 0.0,
        "num_queries": 4,
    }
    return ModelConfig(**defaults | changes)


def image_batch(*sizes: tuple[int, int], padded: tuple[int, int] = (64, 64)) -> ImageBatch:
    """Random uint8 images of the given (height, width), padding 0."""
    sizes = sizes or ((64, 64), (40, 52))
    batch = ImageBatch(torch.zeros(len(sizes), 3, *padded, dtype=torch.uint8), torch.tensor(sizes))
    for image, (height, width) in enumerate(sizes):
        batch.pixels[image, :, :height, :width] = torch.randint(256, (3, height, width))
    return batch


def randomize(module: nn.Module) -> None:
    """Random weights where initialisation left zeros or copies, so that everything matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def random_pyramid(
    spatial_shapes: tuple[tuple[int, int], ...],
    valid_sizes: list[list[tuple[int, int]]],
    hidden_dim: int = 32,
) -> FeaturePyramid:
    """Random tokens in float64."""
    num_tokens = sum(height * width for height, width in spatial_shapes)
    tokens = torch.randn(len(valid_sizes), num_tokens, hidden_dim, dtype=torch.float64)
    return FeaturePyramid(tokens, spatial_shapes, torch.tensor(valid_sizes))


def cropped(pyramid: FeaturePyramid, image: int) -> FeaturePyramid:
    """One image of a batch without its padding."""
    shapes = tuple((int(height), int(width)) for height, width in pyramid.valid_sizes[image])
    tokens = crop_tokens(pyramid.tokens[image : image + 1], pyramid.spatial_shapes, shapes)
    return FeaturePyramid(tokens, shapes, pyramid.valid_sizes[image : image + 1])


def crop_tokens(
    tokens: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    valid_shapes: tuple[tuple[int, int], ...],
) -> Tensor:
    """The tokens [B, S, ...] of the top left part of each level."""
    areas = [height * width for height, width in spatial_shapes]
    levels = []
    for level, shape, valid in zip(
        tokens.split(areas, dim=1), spatial_shapes, valid_shapes, strict=True
    ):
        level_map = level.unflatten(1, shape)
        levels.append(level_map[:, : valid[0], : valid[1]].flatten(1, 2))
    return torch.cat(levels, dim=1)
