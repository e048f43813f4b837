"""The options of DINO's command line and the keys of its configuration files."""

from __future__ import annotations

from typing import Any

from msdetr.published.dn_detr_flags import RUN_OPTIONS
from msdetr.published.flag import PublishedFlag

_OPTIONS = RUN_OPTIONS | {
    "config_file": PublishedFlag(str, "config/DINO/DINO_4scale.py", short="-c"),
    "test": PublishedFlag(bool, False),
    "amp": PublishedFlag(bool, False),
}

DINO_FILE_KEYS = {
    # Optimisation
    "lr": PublishedFlag(float, 1e-4),
    "param_dict_type": PublishedFlag(str, "default"),
    "lr_backbone": PublishedFlag(float, 1e-5),
    "lr_backbone_names": PublishedFlag(str, ["backbone.0"], many=True),
    "lr_linear_proj_names": PublishedFlag(str, ["reference_points", "sampling_offsets"], many=True),
    "lr_linear_proj_mult": PublishedFlag(float, 0.1),
    "ddetr_lr_param": PublishedFlag(bool, False),
    "batch_size": PublishedFlag(int, 2),
    "weight_decay": PublishedFlag(float, 1e-4),
    "epochs": PublishedFlag(int, 12),
    "lr_drop": PublishedFlag(int, 11),
    "save_checkpoint_interval": PublishedFlag(int, 1),
    "clip_max_norm": PublishedFlag(float, 0.1),
    "onecyclelr": PublishedFlag(bool, False),
    "multi_step_lr": PublishedFlag(bool, False),
    "lr_drop_list": PublishedFlag(int, [33, 45], many=True),
    "use_ema": PublishedFlag(bool, False),
    "ema_decay": PublishedFlag(float, 0.9997),
    "ema_epoch": PublishedFlag(int, 0),
    # Model
    "modelname": PublishedFlag(str, "dino"),
    "num_classes": PublishedFlag(int, 91),
    "frozen_weights": PublishedFlag(str, None),
    "backbone": PublishedFlag(str, "resnet50"),
    "use_checkpoint": PublishedFlag(bool, False),
    "dilation": PublishedFlag(bool, False),
    "position_embedding": PublishedFlag(str, "sine"),
    "pe_temperatureH": PublishedFlag(float, 20.0),
    "pe_temperatureW": PublishedFlag(float, 20.0),
    "return_interm_indices": PublishedFlag(int, [1, 2, 3], many=True),
    "backbone_freeze_keywords": PublishedFlag(str, None, many=True),
    "batch_norm_type": PublishedFlag(str, "FrozenBatchNorm2d"),
    "num_feature_levels": PublishedFlag(int, 4),
    "enc_layers": PublishedFlag(int, 6),
    "dec_layers": PublishedFlag(int, 6),
    "unic_layers": PublishedFlag(int, 0),
    "pre_norm": PublishedFlag(bool, False),
    "dim_feedforward": PublishedFlag(int, 2048),
    "hidden_dim": PublishedFlag(int, 256),
    "dropout": PublishedFlag(float, 0.0),
    "nheads": PublishedFlag(int, 8),
    "transformer_activation": PublishedFlag(str, "relu"),
    "enc_n_points": PublishedFlag(int, 4),
    "dec_n_points": PublishedFlag(int, 4),
    "use_deformable_box_attn": PublishedFlag(bool, False),
    "box_attn_type": PublishedFlag(str, "roi_align"),
    "add_channel_attention": PublishedFlag(bool, False),
    "add_pos_value": PublishedFlag(bool, False),
    "decoder_sa_type": PublishedFlag(str, "sa"),
    "decoder_module_seq": PublishedFlag(str, ["sa", "ca", "ffn"], many=True),
    "masks": PublishedFlag(bool, False),
    # Queries
    "num_queries": PublishedFlag(int, 900),
    "query_dim": PublishedFlag(int, 4),
    "num_patterns": PublishedFlag(int, 0),
    "random_refpoints_xy": PublishedFlag(bool, False),
    "fix_refpoints_hw": PublishedFlag(float, -1.0),
    "dec_layer_number": PublishedFlag(int, None, many=True),
    "decoder_layer_noise": PublishedFlag(bool, False),
    "dln_xy_noise": PublishedFlag(float, 0.2),
    "dln_hw_noise": PublishedFlag(float, 0.2),
    "two_stage_type": PublishedFlag(str, "standard"),
    "two_stage_pat_embed": PublishedFlag(int, 0),
    "two_stage_add_query_num": PublishedFlag(int, 0),
    "two_stage_learn_wh": PublishedFlag(bool, False),
    "two_stage_default_hw": PublishedFlag(float, 0.05),
    "two_stage_keep_all_tokens": PublishedFlag(bool, False),
    "embed_init_tgt": PublishedFlag(bool, True),
    "use_detached_boxes_dec_out": PublishedFlag(bool, False),
    "pdetr3_bbox_embed_diff_each_layer": PublishedFlag(bool, False),
    "pdetr3_refHW": PublishedFlag(float, -1.0),
    "dabdetr_yolo_like_anchor_update": PublishedFlag(bool, False),
    "dabdetr_deformable_encoder": PublishedFlag(bool, False),
    "dabdetr_deformable_decoder": PublishedFlag(bool, False),
    # Heads
    "dec_pred_bbox_embed_share": PublishedFlag(bool, True),
    "dec_pred_class_embed_share": PublishedFlag(bool, True),
    "two_stage_bbox_embed_share": PublishedFlag(bool, False),
    "two_stage_class_embed_share": PublishedFlag(bool, False),
    # Denoising
    "use_dn": PublishedFlag(bool, True),
    "dn_number": PublishedFlag(int, 100),
    "dn_box_noise_scale": PublishedFlag(float, 0.4),
    "dn_label_noise_ratio": PublishedFlag(float, 0.5),
    "dn_labelbook_size": PublishedFlag(int, 91),
    # Matching and loss
    "aux_loss": PublishedFlag(bool, True),
    "matcher_type": PublishedFlag(str, "HungarianMatcher"),
    "match_unstable_error": PublishedFlag(bool, True),
    "set_cost_class": PublishedFlag(float, 2.0),
    "set_cost_bbox": PublishedFlag(float, 5.0),
    "set_cost_giou": PublishedFlag(float, 2.0),
    "cls_loss_coef": PublishedFlag(float, 1.0),
    "bbox_loss_coef": PublishedFlag(float, 5.0),
    "giou_loss_coef": PublishedFlag(float, 2.0),
    "mask_loss_coef": PublishedFlag(float, 1.0),
    "dice_loss_coef": PublishedFlag(float, 1.0),
    "enc_loss_coef": PublishedFlag(float, 1.0),
    "interm_loss_coef": PublishedFlag(float, 1.0),
    "no_interm_box_loss": PublishedFlag(bool, False),
    "focal_alpha": PublishedFlag(float, 0.25),
    # Data and evaluation
    "num_select": PublishedFlag(int, 300),
    "nms_iou_threshold": PublishedFlag(float, -1.0),
    "data_aug_scales": PublishedFlag(
        int, [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800], many=True
    ),
    "data_aug_max_size": PublishedFlag(int, 1333),
    "data_aug_scales2_resize": PublishedFlag(int, [400, 500, 600], many=True),
    "data_aug_scales2_crop": PublishedFlag(int, [384, 600], many=True),
    "data_aug_scale_overlap": PublishedFlag(float, None),
    # In no file, but read by the code or set by its scripts
    "strong_aug": PublishedFlag(bool, False),
    "backbone_dir": PublishedFlag(str, None),
    "dn_scalar": PublishedFlag(int, None),
    "dn_label_coef": PublishedFlag(float, None),
    "dn_bbox_coef": PublishedFlag(float, None),
}
"""Keys of the configuration file, with the values of `DINO_4scale.py`. `--options` changes them."""

DINO = _OPTIONS | DINO_FILE_KEYS

DINO_FILES: dict[str, dict[str, Any]] = {
    "DINO_4scale.py": {},
    "DINO_4scale_swin.py": {"backbone": "swin_L_384_22k", "use_checkpoint": True},
    "DINO_4scale_convnext.py": {"backbone": "convnext_xlarge_22k"},
    "DINO_5scale.py": {
        "batch_size": 1,
        "return_interm_indices": [0, 1, 2, 3],
        "num_feature_levels": 5,
    },
}
"""What each published configuration file sets other than `DINO_4scale.py`."""
