"""Conversion of the published code's command lines to configurations.

Checkpoints of the published code describe the model only by the arguments of their run. This module
converts those arguments, or a list of flags, to a `RunConfig`.

Four command lines exist: `ms-detr` (the MS-DETR tree), `ms-detr-impl-a` (its implementation (a)),
`deformable-detr` (the original) and `h-deformable-detr` (H-DETR). Flags that all of them share have
the same defaults, except `--dim_feedforward`.

Where the published code and its flags disagree:

- `--o2m_matcher_threshold`, `--o2m_matcher_k` and `--use_indices_merge` never reach the published
  criterion, which always uses 0.4, 6 and no merging. The configuration has these values too, with
  a warning, because the published run did. `AssignmentConfig` has working fields for all three.
- `--mixed_selection` without `--two_stage`, and `--use_aux_ffn` without `--use_ms_detr`, have
  no effect there; `--look_forward_twice` without `--with_box_refine` crashes there. They are
  dropped with a warning.
- One-stage MS-DETR and `--two_stage` without `--with_box_refine` crash there and work here.
- `--focal_alpha` changes the loss only; the matching cost keeps 0.25.
- `--no_aux_loss` also removes the encoder's loss in `deformable-detr` and `h-deformable-detr`, not
  in the others.
- `h-deformable-detr` raises an exception with `--num_queries_one2many 0` unless `--k_one2many 0`
  is given too, and with `--no_aux_loss` unless `--k_one2many 0`. Both work here. With
  `--k_one2many 0` its extra queries get no loss: the weights are 0 here.
- `--lambda_one2many` multiplies the reported losses there, and the three `hybrid_*_weight` here.
- `--use_checkpoint` recomputes all layers of encoder and decoder. It becomes
  `activation_checkpointing = "all"`, which recomputes the backbone too; `encoder` would keep more
  than the published run.
- `--use_fp16` (float16 with a scaled loss, but float32 in encoder and decoder) becomes `bfloat16`,
  with a warning.
- `--eval_in_training_set` selects the images of the evaluation. It is dropped with a warning;
  `data.val_images` and `data.val_annotations` select them here.
- `--batch_size` counts the images of one process, `TrainConfig.batch_size` those of all. It is
  multiplied by the `world_size` of the arguments where they have one, otherwise by the number of
  processes of the published recipes (`PUBLISHED_NUM_PROCESSES`).
- `--resume` becomes `weights`: the published optimizer state is not loaded.
- `--device cuda`, the default, becomes `auto`, so that a checkpoint loads on any machine.
- Other flags have no counterpart. `tests/test_published.py` lists them with the reasons.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from msdetr.config import (
    AssignmentConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)

logger = logging.getLogger(__name__)

Implementation = Literal["ms-detr", "ms-detr-impl-a", "deformable-detr", "h-deformable-detr"]


@dataclass(frozen=True)
class PublishedFlag:
    """One option of a published command line."""

    type: type[bool] | type[int] | type[float] | type[str]
    """Type of the value; a `bool` takes none."""
    default: Any
    """Value where the option is absent. A `bool` that defaults to True is spelled `--no_NAME`."""
    many: bool = False
    """Whether the option takes several values."""


_BACKBONE_NAMES = ["backbone.0"]
_REFERENCE_NAMES = ["reference_points", "sampling_offsets"]

_SHARED_FLAGS = {
    # Optimisation
    "lr": PublishedFlag(float, 2e-4),
    "lr_backbone_names": PublishedFlag(str, _BACKBONE_NAMES, many=True),
    "lr_backbone": PublishedFlag(float, 2e-5),
    "lr_linear_proj_names": PublishedFlag(str, _REFERENCE_NAMES, many=True),
    "lr_linear_proj_mult": PublishedFlag(float, 0.1),
    "batch_size": PublishedFlag(int, 2),
    "weight_decay": PublishedFlag(float, 1e-4),
    "epochs": PublishedFlag(int, 50),
    "lr_drop": PublishedFlag(int, 40),
    "lr_drop_epochs": PublishedFlag(int, None, many=True),
    "clip_max_norm": PublishedFlag(float, 0.1),
    "sgd": PublishedFlag(bool, False),
    # Model
    "with_box_refine": PublishedFlag(bool, False),
    "two_stage": PublishedFlag(bool, False),
    "frozen_weights": PublishedFlag(str, None),
    "backbone": PublishedFlag(str, "resnet50"),
    "dilation": PublishedFlag(bool, False),
    "position_embedding": PublishedFlag(str, "sine"),
    "position_embedding_scale": PublishedFlag(float, 6.283185307179586),
    "num_feature_levels": PublishedFlag(int, 4),
    "enc_layers": PublishedFlag(int, 6),
    "dec_layers": PublishedFlag(int, 6),
    "hidden_dim": PublishedFlag(int, 256),
    "dropout": PublishedFlag(float, 0.1),
    "nheads": PublishedFlag(int, 8),
    "dec_n_points": PublishedFlag(int, 4),
    "enc_n_points": PublishedFlag(int, 4),
    "masks": PublishedFlag(bool, False),
    # Matching and loss
    "aux_loss": PublishedFlag(bool, True),
    "set_cost_class": PublishedFlag(float, 2.0),
    "set_cost_bbox": PublishedFlag(float, 5.0),
    "set_cost_giou": PublishedFlag(float, 2.0),
    "mask_loss_coef": PublishedFlag(float, 1.0),
    "dice_loss_coef": PublishedFlag(float, 1.0),
    "cls_loss_coef": PublishedFlag(float, 2.0),
    "bbox_loss_coef": PublishedFlag(float, 5.0),
    "giou_loss_coef": PublishedFlag(float, 2.0),
    "focal_alpha": PublishedFlag(float, 0.25),
    # Data and run
    "dataset_file": PublishedFlag(str, "coco"),
    "coco_path": PublishedFlag(str, "./data/coco"),
    "coco_panoptic_path": PublishedFlag(str, None),
    "remove_difficult": PublishedFlag(bool, False),
    "output_dir": PublishedFlag(str, ""),
    "device": PublishedFlag(str, "cuda"),
    "seed": PublishedFlag(int, 42),
    "resume": PublishedFlag(str, ""),
    "start_epoch": PublishedFlag(int, 0),
    "eval": PublishedFlag(bool, False),
    "num_workers": PublishedFlag(int, 2),
    "cache_mode": PublishedFlag(bool, False),
}

_DEFORMABLE_FLAGS = _SHARED_FLAGS | {
    "dim_feedforward": PublishedFlag(int, 1024),
    "num_queries": PublishedFlag(int, 300),
}

_ONE_TO_MANY_FLAGS = {
    "use_ms_detr": PublishedFlag(bool, False),
    "o2m_matcher_threshold": PublishedFlag(float, 0.4),
    "o2m_matcher_k": PublishedFlag(int, 6),
    "use_indices_merge": PublishedFlag(bool, False),
    "o2m_cls_loss_coef": PublishedFlag(float, 2.0),
    "o2m_bbox_loss_coef": PublishedFlag(float, 5.0),
    "o2m_giou_loss_coef": PublishedFlag(float, 2.0),
    "enc_cls_loss_coef": PublishedFlag(float, 2.0),
    "enc_bbox_loss_coef": PublishedFlag(float, 5.0),
    "enc_giou_loss_coef": PublishedFlag(float, 2.0),
    "topk_eval": PublishedFlag(int, 100),
    "nms_iou_threshold": PublishedFlag(float, None),
}

_PLUS_FLAGS = {
    "mixed_selection": PublishedFlag(bool, False),
    "look_forward_twice": PublishedFlag(bool, False),
}

_MAIN_TREE_FLAGS = _PLUS_FLAGS | {"use_aux_ffn": PublishedFlag(bool, False)}

_HYBRID_FLAGS = {
    "num_queries_one2one": PublishedFlag(int, 300),
    "num_queries_one2many": PublishedFlag(int, 0),
    "k_one2many": PublishedFlag(int, 5),
    "lambda_one2many": PublishedFlag(float, 1.0),
    "topk": PublishedFlag(int, 100),
    "pretrained_backbone_path": PublishedFlag(str, "./swin_tiny_patch4_window7_224.pkl"),
    "drop_path_rate": PublishedFlag(float, 0.2),
    "eval_in_training_set": PublishedFlag(bool, False),
    "use_fp16": PublishedFlag(bool, False),
    "use_checkpoint": PublishedFlag(bool, False),
    "use_wandb": PublishedFlag(bool, False),
}

PUBLISHED_FLAGS: dict[Implementation, dict[str, PublishedFlag]] = {
    "ms-detr": _DEFORMABLE_FLAGS | _ONE_TO_MANY_FLAGS | _MAIN_TREE_FLAGS,
    "ms-detr-impl-a": _DEFORMABLE_FLAGS | _ONE_TO_MANY_FLAGS,
    "deformable-detr": _DEFORMABLE_FLAGS,
    "h-deformable-detr": _SHARED_FLAGS
    | _PLUS_FLAGS
    | _HYBRID_FLAGS
    | {"dim_feedforward": PublishedFlag(int, 2048)},
}
"""The options of each published command line, by attribute name."""

PUBLISHED_NUM_PROCESSES: dict[Implementation, int] = {
    "ms-detr": 8,
    "ms-detr-impl-a": 8,
    "deformable-detr": 16,
    "h-deformable-detr": 8,
}
"""Processes of the published recipes: batch 32 for Deformable-DETR, 16 for the others."""

DEAD_FLAGS = {
    "o2m_matcher_threshold": "one_to_many_threshold",
    "o2m_matcher_k": "one_to_many_k",
    "use_indices_merge": "indices_merge",
}
"""Options that the published code never passes on, and the `AssignmentConfig` fields that work."""

_RUNTIME_ATTRIBUTES = frozenset(
    {
        "distributed",
        "dist_backend",
        "dist_url",
        "gpu",
        "override_resumed_lr_drop",
        "rank",
        "world_size",
    }
)
"""Attributes that the published code adds to its arguments at run time."""


def config_from_published_args(
    args: argparse.Namespace | Sequence[str],
    *,
    implementation: Implementation | None = None,
    overrides: Mapping[str, object] | None = None,
) -> RunConfig:
    """The configuration with the meaning of these published arguments.

    Args:
        args: the `args` of a published checkpoint, or a list of flags such as
            `["--two_stage", "--num_queries", "300"]`. Absent arguments have the published default.
        implementation: the command line they belong to. None infers it from the attributes of a
            Namespace (`infer_implementation`) and takes `ms-detr` for a flag list.
        overrides: values by attribute name that replace those of `args`.

    Raises:
        ValueError: a flag is unknown or names something that is not supported here, a value has
            the wrong type, or the values contradict each other.
    """
    if isinstance(args, argparse.Namespace):
        implementation = implementation or infer_implementation(args)
        given = vars(args)
    else:
        implementation = implementation or "ms-detr"
        given = _parse_flags(args, implementation)
    given = given | dict(overrides or {})
    values = _complete(given, implementation)
    _refuse_unsupported(values)
    _warn_dead_flags(values)
    _warn_changed_flags(values)
    batch_size = values.batch_size * _num_processes(given, implementation)
    return RunConfig(
        model=_model_config(values, implementation),
        assignment=_assignment_config(values, implementation),
        loss=_loss_config(values, implementation),
        data=DataConfig(root=Path(values.coco_path), num_workers=values.num_workers),
        optimizer=_optimizer_config(values),
        train=TrainConfig(
            epochs=values.epochs,
            batch_size=batch_size,
            activation_checkpointing="all" if values.use_checkpoint else "none",
            precision="bfloat16" if values.use_fp16 else "float32",
        ),
        eval=EvalConfig(
            max_detections=values.topk if _is_hybrid(implementation) else values.topk_eval,
            nms_iou_threshold=values.nms_iou_threshold,
        ),
        output=Path(values.output_dir) if values.output_dir else RunConfig().output,
        weights=Path(values.resume) if values.resume else None,
        device="cpu" if values.device == "cpu" else "auto",
        seed=values.seed,
    )


def infer_implementation(args: argparse.Namespace) -> Implementation:
    """The command line of these arguments, inferred from the flags that only it has."""
    names = vars(args).keys()
    if names & _HYBRID_FLAGS.keys():
        return "h-deformable-detr"
    if names & _MAIN_TREE_FLAGS.keys():
        return "ms-detr"
    if names & _ONE_TO_MANY_FLAGS.keys():
        return "ms-detr-impl-a"
    return "deformable-detr"


def _is_hybrid(implementation: Implementation) -> bool:
    return implementation == "h-deformable-detr"


class _Parser(argparse.ArgumentParser):
    """Raises errors instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"published flags: {message}")


def _parse_flags(flags: Sequence[str], implementation: Implementation) -> dict[str, Any]:
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, flag in PUBLISHED_FLAGS[implementation].items():
        if flag.type is not bool:
            nargs = "+" if flag.many else None
            parser.add_argument(f"--{name}", type=flag.type, nargs=nargs)
        elif flag.default:
            parser.add_argument(f"--no_{name}", dest=name, action="store_false")
        else:
            parser.add_argument(f"--{name}", action="store_true")
    namespace, rest = parser.parse_known_args(list(flags))
    if rest:
        names = [argument for argument in rest if argument.startswith("-")] or rest
        _refuse_unknown([name.removeprefix("--").split("=")[0] for name in names], implementation)
    return vars(namespace)


def _complete(given: Mapping[str, Any], implementation: Implementation) -> argparse.Namespace:
    """All published arguments. Those of other command lines have their defaults."""
    known = PUBLISHED_FLAGS[implementation]
    _refuse_unknown(given.keys() - known.keys() - _RUNTIME_ATTRIBUTES, implementation)
    values = {
        name: flag.default
        for flags in (*PUBLISHED_FLAGS.values(), known)
        for name, flag in flags.items()
    }
    for name in given.keys() & known.keys():
        values[name] = _checked_value(name, known[name], given[name])
    return argparse.Namespace(**values)


def _checked_value(name: str, flag: PublishedFlag, value: Any) -> Any:
    if value is None and flag.default is None:
        return None
    if flag.many:
        item = PublishedFlag(flag.type, None)
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"published argument {name}: expected a list, got {value!r}")
        return [_checked_value(name, item, entry) for entry in value]
    accepted = (int, float) if flag.type is float else flag.type
    if not isinstance(value, accepted) or isinstance(value, bool) != (flag.type is bool):
        raise ValueError(f"published argument {name}: expected {flag.type.__name__}, got {value!r}")
    return flag.type(value)


def _refuse_unknown(names: Collection[str], implementation: Implementation) -> None:
    if not names:
        return
    reasons = []
    for name in sorted(names):
        attribute = "aux_loss" if name == "no_aux_loss" else name
        owners = [owner for owner, flags in PUBLISHED_FLAGS.items() if attribute in flags]
        reasons.append(f"{name} (a flag of {', '.join(owners)})" if owners else name)
    raise ValueError(f"not arguments of the published {implementation}: {', '.join(reasons)}")


def _refuse_unsupported(values: argparse.Namespace) -> None:
    reasons = []
    if values.masks:
        reasons.append("masks: segmentation is not part of this project")
    if values.frozen_weights is not None:
        reasons.append("frozen_weights: it trains a mask head on a frozen detector")
    if values.dataset_file == "coco_panoptic":
        reasons.append("dataset_file coco_panoptic: panoptic segmentation is not supported")
    if values.backbone not in ("resnet50", "resnet101"):
        reasons.append(
            f"backbone {values.backbone}: only resnet50 and resnet101 are supported, no Swin"
        )
    if values.position_embedding not in _POSITION_EMBEDDINGS:
        reasons.append(
            f"position_embedding {values.position_embedding}: one of "
            f"{', '.join(_POSITION_EMBEDDINGS)} is needed"
        )
    if values.lr_backbone_names != _BACKBONE_NAMES:
        reasons.append(
            f"lr_backbone_names {values.lr_backbone_names}: lr_backbone is that of the backbone"
        )
    if sorted(values.lr_linear_proj_names) != _REFERENCE_NAMES:
        reasons.append(
            f"lr_linear_proj_names {values.lr_linear_proj_names}: "
            f"lr_linear_proj_mult is that of {' and '.join(_REFERENCE_NAMES)}"
        )
    if values.resume.startswith(("http://", "https://")):
        reasons.append(f"resume {values.resume}: download the file first")
    if reasons:
        raise ValueError(f"published arguments that are not supported: {'; '.join(reasons)}")


def _warn_dead_flags(values: argparse.Namespace) -> None:
    for name, field in DEAD_FLAGS.items():
        if getattr(values, name) != _ONE_TO_MANY_FLAGS[name].default:
            logger.warning(
                "%s: dropped, as the published code ignores it; set assignment.%s to use it",
                name,
                field,
            )


def _warn_changed_flags(values: argparse.Namespace) -> None:
    if values.use_fp16:
        logger.warning(
            "use_fp16: becomes train.precision bfloat16; the published code computes the backbone "
            "in float16, encoder and decoder in float32"
        )
    if values.eval_in_training_set:
        logger.warning(
            "eval_in_training_set: dropped; set data.val_images and data.val_annotations instead"
        )
    if values.num_queries_one2many and values.k_one2many <= 0:
        logger.warning(
            "k_one2many %d: the %d extra queries get no loss, as in the published code",
            values.k_one2many,
            values.num_queries_one2many,
        )


def _num_processes(given: Mapping[str, Any], implementation: Implementation) -> int:
    if "world_size" in given:
        return int(given["world_size"])
    if given.get("distributed") is False:
        return 1
    return PUBLISHED_NUM_PROCESSES[implementation]


_POSITION_EMBEDDINGS: dict[str, Literal["sine", "learned"]] = {
    "sine": "sine",
    "v2": "sine",
    "learned": "learned",
    "v3": "learned",
}


def _model_config(values: argparse.Namespace, implementation: Implementation) -> ModelConfig:
    internal = values.use_ms_detr and implementation == "ms-detr"
    one_to_many: Literal["none", "internal", "output"] = "none"
    if values.use_ms_detr:
        one_to_many = "internal" if internal else "output"
    return ModelConfig(
        backbone=values.backbone,
        train_backbone=values.lr_backbone > 0,
        dilation=values.dilation,
        num_classes=91 if values.dataset_file == "coco" else 20,
        hidden_dim=values.hidden_dim,
        num_heads=values.nheads,
        num_levels=values.num_feature_levels,
        num_encoder_layers=values.enc_layers,
        num_decoder_layers=values.dec_layers,
        num_encoder_points=values.enc_n_points,
        num_decoder_points=values.dec_n_points,
        feedforward_dim=values.dim_feedforward,
        dropout=values.dropout,
        num_queries=(
            values.num_queries_one2one if _is_hybrid(implementation) else values.num_queries
        ),
        extra_queries="hybrid" if values.num_queries_one2many else "none",
        num_hybrid_queries=values.num_queries_one2many or ModelConfig.num_hybrid_queries,
        position_embedding=_POSITION_EMBEDDINGS[values.position_embedding],
        decoder_order="cross_self" if internal else "self_cross",
        one_to_many=one_to_many,
        one_to_many_ffn=_effective(values, "use_aux_ffn", needs="use_ms_detr"),
        two_stage=values.two_stage,
        box_refine=values.with_box_refine,
        mixed_selection=_effective(values, "mixed_selection", needs="two_stage"),
        look_forward_twice=_effective(values, "look_forward_twice", needs="with_box_refine"),
    )


def _effective(values: argparse.Namespace, name: str, *, needs: str) -> bool:
    """Whether a flag is set and has an effect. Warns where it has none."""
    if getattr(values, name) and not getattr(values, needs):
        logger.warning("%s: dropped, it has no effect without %s", name, needs)
    return bool(getattr(values, name) and getattr(values, needs))


def _assignment_config(
    values: argparse.Namespace, implementation: Implementation
) -> AssignmentConfig:
    by_predictions = implementation in ("deformable-detr", "h-deformable-detr")
    hybrid = values.num_queries_one2many and values.k_one2many > 0
    return AssignmentConfig(
        cost_class=values.set_cost_class,
        cost_bbox=values.set_cost_bbox,
        cost_giou=values.set_cost_giou,
        encoder_match="predictions" if by_predictions else "anchors",
        encoder_cost_class=values.set_cost_class if by_predictions else 0.0,
        hybrid_k=values.k_one2many if hybrid else AssignmentConfig.hybrid_k,
    )


def _loss_config(values: argparse.Namespace, implementation: Implementation) -> LossConfig:
    main = (values.cls_loss_coef, values.bbox_loss_coef, values.giou_loss_coef)
    encoder = (values.enc_cls_loss_coef, values.enc_bbox_loss_coef, values.enc_giou_loss_coef)
    if implementation in ("deformable-detr", "h-deformable-detr"):
        # Its encoder weights are copies of the main ones, made together with those of the auxiliary
        # losses. Without these, the encoder's losses have no weight.
        encoder = main if values.aux_loss else (0.0, 0.0, 0.0)
    hybrid = (
        LossConfig.hybrid_class_weight,
        LossConfig.hybrid_bbox_weight,
        LossConfig.hybrid_giou_weight,
    )
    if values.num_queries_one2many:
        factor = values.lambda_one2many if values.k_one2many > 0 else 0.0
        hybrid = (factor * main[0], factor * main[1], factor * main[2])
    return LossConfig(
        class_weight=main[0],
        bbox_weight=main[1],
        giou_weight=main[2],
        one_to_many_class_weight=values.o2m_cls_loss_coef,
        one_to_many_bbox_weight=values.o2m_bbox_loss_coef,
        one_to_many_giou_weight=values.o2m_giou_loss_coef,
        hybrid_class_weight=hybrid[0],
        hybrid_bbox_weight=hybrid[1],
        hybrid_giou_weight=hybrid[2],
        encoder_class_weight=encoder[0],
        encoder_bbox_weight=encoder[1],
        encoder_giou_weight=encoder[2],
        focal_alpha=values.focal_alpha,
        auxiliary=values.aux_loss,
    )


def _optimizer_config(values: argparse.Namespace) -> OptimizerConfig:
    return OptimizerConfig(
        name="sgd" if values.sgd else "adamw",
        lr=values.lr,
        # The published code freezes the backbone at 0 or below, and clips above 0 only.
        backbone_lr=max(values.lr_backbone, 0.0),
        reference_lr_factor=values.lr_linear_proj_mult,
        weight_decay=values.weight_decay,
        clip_grad_norm=max(values.clip_max_norm, 0.0),
        lr_drop_epoch=values.lr_drop,
    )
