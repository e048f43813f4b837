"""Deformable-DETR of Hugging Face's `transformers`, of a recipe's sizes, with random weights."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.detector.cases import normalized_pixels
from msdetr.config import LossConfig, ModelConfig
from msdetr.structures import ImageBatch

_RESNET_DEPTHS = {"resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3]}


def why_not_hugging_face(config: ModelConfig) -> str | None:
    """Why `transformers` lacks such an architecture, or None."""
    if config.backbone not in _RESNET_DEPTHS:
        return f"it has no backbone {config.backbone!r}"
    if config.two_stage and not config.box_refine:
        return "it has no two stages without box refinement"
    return None


def build_hugging_face(config: ModelConfig, loss: LossConfig) -> nn.Module:
    """A detector of the same sizes, without the parts of the recipe that `transformers` lacks.

    Those are one-to-many supervision, mixed selection and looking forward twice. The stem and the
    first stage of the backbone are frozen, as in the recipes.
    """
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    backbone = transformers.ResNetConfig(
        depths=_RESNET_DEPTHS[config.backbone],
        out_features=["stage2", "stage3", "stage4"],
    )
    detector: nn.Module = transformers.DeformableDetrForObjectDetection(
        transformers.DeformableDetrConfig(
            use_timm_backbone=False,
            backbone_config=backbone,
            num_labels=config.num_classes,
            num_queries=config.num_queries,
            two_stage=config.two_stage,
            two_stage_num_proposals=config.num_queries,
            with_box_refine=config.box_refine,
            d_model=config.hidden_dim,
            num_feature_levels=config.num_levels,
            encoder_layers=config.num_encoder_layers,
            decoder_layers=config.num_decoder_layers,
            encoder_n_points=config.num_encoder_points,
            decoder_n_points=config.num_decoder_points,
            encoder_attention_heads=config.num_heads,
            decoder_attention_heads=config.num_heads,
            encoder_ffn_dim=config.feedforward_dim,
            decoder_ffn_dim=config.feedforward_dim,
            dropout=config.dropout,
            position_embedding_type=config.position_embedding,
            auxiliary_loss=loss.auxiliary,
        )
    )
    # The rule of `transformers` names modules that do not exist, and so freezes everything.
    for name, parameter in detector.named_parameters():
        if ".backbone." in name:
            trains = any(f"stages.{stage}." in name for stage in (1, 2, 3))
            parameter.requires_grad_(config.train_backbone and trains)
    return detector


def hugging_face_images(images: ImageBatch) -> tuple[Tensor, Tensor]:
    """Unpadded images as its processor returns them: normalised pixels, and their mask."""
    pixels = normalized_pixels(images)
    mask = torch.ones(pixels[:, 0].shape, dtype=torch.int64, device=pixels.device)
    return pixels, mask
