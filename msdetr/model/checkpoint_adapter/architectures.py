"""Which published model has the architecture of a configuration."""

from __future__ import annotations

from typing import Literal

from msdetr.config import ModelConfig

PublishedModel = Literal["deformable-detr", "dn-dab-deformable-detr", "dino", "deta"]
"""`deformable-detr` stands for that model and those made from it: MS-DETR and H-DETR."""

_Fields = dict[str, tuple[object, ...]]

_DEFORMABLE: _Fields = {
    "query_position": ("initial",),
    "denoising": ("none",),
    "proposal_nms_iou_threshold": (None,),
    "proposal_content": (False,),
    "decoder_norm": (False,),
    "position_temperature": (10000.0,),
    "position_offset": (0.5,),
    "logit_eps": (1e-5,),
}
_LATER: _Fields = _DEFORMABLE | {
    "decoder_order": ("self_cross",),
    "one_to_many": ("none",),
    "extra_queries": ("none",),
    "proposal_score": ("first_class",),
    "mixed_selection": (False,),
    "look_forward_twice": (False,),
}
_FIELDS: dict[PublishedModel, _Fields] = {
    "deformable-detr": _DEFORMABLE,
    "dn-dab-deformable-detr": _LATER
    | {
        "two_stage": (False,),
        "box_refine": (True,),
        "query_position": ("box_content",),
        "denoising": ("dn",),
        "logit_eps": (1e-3,),
    },
    "dino": _LATER
    | {
        "two_stage": (True,),
        "box_refine": (True,),
        "proposal_score": ("best_class",),
        "query_position": ("box",),
        "mixed_selection": (True,),
        "look_forward_twice": (False, True),
        "denoising": ("none", "contrastive"),
        "decoder_norm": (True,),
        "position_temperature": (),
        "position_offset": (1.0,),
        "logit_eps": (1e-3,),
    },
    "deta": _LATER | {"proposal_content": (True,), "proposal_nms_iou_threshold": (None, 0.9)},
}
"""The values that each model can have; an empty tuple stands for all."""


def published_model(config: ModelConfig) -> PublishedModel:
    """The published model that a configuration comes closest to, by what only that one has."""
    if config.decoder_norm:
        return "dino"
    if config.query_position == "box_content":
        return "dn-dab-deformable-detr"
    return "deta" if config.proposal_content else "deformable-detr"


def require_published_architecture(config: ModelConfig) -> None:
    """Check that a published model has this architecture.

    Raises:
        ValueError: none has, with a reason.
    """
    if config.backbone == "convnet":
        raise ValueError("backbone convnet: the published code has ResNets only")
    model = published_model(config)
    for name, values in _FIELDS[model].items():
        value = getattr(config, name)
        if values and value not in values:
            raise ValueError(
                f"{name}={value!r}: the published {model} has "
                + " or ".join(repr(other) for other in values)
            )
    if model != "dino" and config.shared_heads != ("none" if config.box_refine else "all"):
        raise ValueError(
            f"head_sharing={config.head_sharing!r} with box_refine={config.box_refine}: the "
            f"published {model} shares heads exactly without box refinement"
        )
    if model == "deformable-detr":
        _require_published_branches(config)


def _require_published_branches(config: ModelConfig) -> None:
    branches = {
        "internal": "cross_self",
        "output": "self_cross",
        "none": "self_cross",
    }
    if config.extra_queries == "group":
        raise ValueError("extra_queries='group': no published detector of this kind has groups")
    if config.extra_queries == "hybrid" and config.one_to_many != "none":
        raise ValueError(
            f"extra_queries='hybrid' with one_to_many={config.one_to_many!r}: the published H-DETR "
            "has no one-to-many supervision of its primary queries"
        )
    if config.proposal_score != "first_class":
        raise ValueError(
            f"proposal_score={config.proposal_score!r}: the published code ranks proposals by the "
            "first class logit"
        )
    if config.decoder_order != branches[config.one_to_many]:
        raise ValueError(
            f"decoder_order={config.decoder_order!r} with one_to_many={config.one_to_many!r} "
            "exists in no published implementation"
        )
    if config.one_to_many == "output" and (config.mixed_selection or config.look_forward_twice):
        raise ValueError(
            "the published implementation (a), one_to_many='output', has neither "
            "mixed_selection nor look_forward_twice"
        )
