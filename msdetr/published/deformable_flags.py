"""The options of Deformable-DETR's command line and of those that were made from it."""

from __future__ import annotations

from msdetr.published.flag import PublishedFlag

BACKBONE_NAMES = ["backbone.0"]
REFERENCE_NAMES = ["reference_points", "sampling_offsets"]

_SHARED_FLAGS = {
    # Optimisation
    "lr": PublishedFlag(float, 2e-4),
    "lr_backbone_names": PublishedFlag(str, BACKBONE_NAMES, many=True),
    "lr_backbone": PublishedFlag(float, 2e-5),
    "lr_linear_proj_names": PublishedFlag(str, REFERENCE_NAMES, many=True),
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

ONE_TO_MANY_FLAGS = {
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

MAIN_TREE_FLAGS = _PLUS_FLAGS | {"use_aux_ffn": PublishedFlag(bool, False)}

HYBRID_FLAGS = {
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

_DETA_FLAGS = {
    "assign_first_stage": PublishedFlag(bool, False),
    "assign_second_stage": PublishedFlag(bool, False),
    "bigger": PublishedFlag(bool, False),
    "finetune": PublishedFlag(str, ""),
}

MS_DETR = _DEFORMABLE_FLAGS | ONE_TO_MANY_FLAGS | MAIN_TREE_FLAGS
MS_DETR_IMPL_A = _DEFORMABLE_FLAGS | ONE_TO_MANY_FLAGS
DEFORMABLE_DETR = _DEFORMABLE_FLAGS
H_DEFORMABLE_DETR = (
    _SHARED_FLAGS | _PLUS_FLAGS | HYBRID_FLAGS | {"dim_feedforward": PublishedFlag(int, 2048)}
)
DETA = _DEFORMABLE_FLAGS | _DETA_FLAGS

FAMILY_DEFAULTS = {
    name: flag.default
    for flags in (H_DEFORMABLE_DETR, MS_DETR, DETA)
    for name, flag in flags.items()
}
"""Values of all options of these command lines where they are absent."""

DEAD_FLAGS = {
    "o2m_matcher_threshold": "one_to_many_threshold",
    "o2m_matcher_k": "one_to_many_k",
    "use_indices_merge": "indices_merge",
}
"""Options that the published code never passes on, and the `AssignmentConfig` fields that work."""
