"""Builds the published code from its folder, patched to run on current packages.

It is not part of this project: the user provides the folder.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from benchmarks.detector.cases import normalized_pixels
from msdetr.config import RunConfig, config_to_dict
from msdetr.published import config_from_published_args
from msdetr.structures import ImageBatch


def published_flags(config: RunConfig) -> list[str]:
    """The published command-line flags of a recipe, where they differ from the defaults."""
    model = config.model
    values = {
        "dim_feedforward": model.feedforward_dim,
        "num_queries": model.num_queries,
        "dropout": model.dropout,
        "cls_loss_coef": config.loss.class_weight,
        "lr_drop": config.optimizer.lr_drop_epoch,
    }
    switches = {
        "with_box_refine": model.box_refine,
        "two_stage": model.two_stage,
        "mixed_selection": model.mixed_selection,
        "look_forward_twice": model.look_forward_twice,
        "use_ms_detr": model.one_to_many == "internal",
        "use_aux_ffn": model.one_to_many_ffn,
    }
    flags = [f"--{name}" for name, on in switches.items() if on]
    return flags + [f"--{name}={value}" for name, value in values.items()]


def build_published(
    folder: Path, config: RunConfig, device: torch.device
) -> tuple[Any, nn.Module, Any, Any]:
    """Arguments, model, criterion and post-processing, built by the published code itself.

    Raises:
        ValueError: the published code cannot express the recipe.
    """
    main = _import_published(folder)
    parser = main.get_args_parser()
    args = parser.parse_args([*published_flags(config), "--device", device.type])
    _check_same_recipe(args, config)
    # Its backbone downloads ImageNet weights on the main process only.
    importlib.import_module("models.backbone").is_main_process = lambda: False  # type: ignore[attr-defined]
    with contextlib.redirect_stdout(io.StringIO()):
        model, criterion, postprocessors = main.build_model(args)
    return args, model, criterion, postprocessors["bbox"]


def published_images(images: ImageBatch) -> Any:
    """Unpadded images as its data loader returns them: normalised, with a mask."""
    pixels = list(normalized_pixels(images))
    return importlib.import_module("util.misc").nested_tensor_from_tensor_list(pixels)


def _import_published(folder: Path) -> ModuleType:
    """Import the published `main.py` into this process, patched to run on current packages.

    All patches are made here:

    - The compiled extension is mocked, and its autograd function is replaced by the PyTorch
      attention of the same module.
    - Data sets and evaluation, which need further packages, are mocked.
    - Deprecation warnings (`meshgrid` without `indexing`, `pretrained`) are silenced.
    """
    warnings.filterwarnings("ignore", category=UserWarning)
    for name in ("MultiScaleDeformableAttention", "datasets", "datasets.samplers", "engine"):
        sys.modules[name] = MagicMock(name=name)
    sys.path.insert(0, str(folder.resolve()))
    main = importlib.import_module("main")
    attention = importlib.import_module("models.ops.functions.ms_deform_attn_func")

    def apply(
        value: Tensor, shapes: Tensor, _: Tensor, locations: Tensor, weights: Tensor, __: int
    ) -> Any:
        return attention.ms_deform_attn_core_pytorch(value, shapes, locations, weights)

    attention.MSDeformAttnFunction.apply = staticmethod(apply)
    return main


def _check_same_recipe(args: Any, config: RunConfig) -> None:
    """Raise ValueError if the published arguments, read back, are not the recipe."""
    ours, published = config_to_dict(config), config_to_dict(config_from_published_args(args))
    differences = [
        f"{part}.{field} is {value!r} in the recipe and {published[part][field]!r} there"
        for part in ("model", "assignment", "loss", "optimizer")
        for field, value in ours[part].items()
        if value != published[part][field]
    ]
    if differences:
        raise ValueError("the published code has no such recipe: " + "; ".join(differences))


def published_groups(model: nn.Module, args: Any) -> list[dict[str, Any]]:
    """Parameter groups by name, as in the published `main.py`."""
    backbone, projections, rest = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if any(part in name for part in args.lr_backbone_names):
            backbone.append(parameter)
        elif any(part in name for part in args.lr_linear_proj_names):
            projections.append(parameter)
        else:
            rest.append(parameter)
    return [
        {"params": rest, "lr": args.lr},
        {"params": backbone, "lr": args.lr_backbone},
        {"params": projections, "lr": args.lr * args.lr_linear_proj_mult},
    ]


def by_published_name(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss terms per layer by their published names: `one_to_many/class` [N] becomes
    `loss_ce_0_o2m`, `loss_ce_1_o2m`, ..., `loss_ce_o2m`.

    H-DETR reports its terms, `loss_ce_one2many` and so on, times lambda. Ours are without it. The
    selected proposals have the suffix of DINO beside contrastive denoising, else that of LW-DETR.
    """
    kinds = {"class": "loss_ce", "bbox": "loss_bbox", "giou": "loss_giou"}
    names = {
        "one_to_one": "{kind}{layer}",
        "one_to_many": "{kind}{layer}_o2m",
        "hybrid": "{kind}{layer}_one2many",
        "denoising": "tgt_{kind}{layer}",
        "contrastive": "{kind}_dn{layer}",
        "encoder": "{kind}_enc",
        "encoder_selected": "{kind}_interm" if "contrastive/class" in terms else "{kind}_enc",
    }
    named = {}
    for name, values in terms.items():
        branch, kind = name.split("/")
        for layer, value in enumerate(values):
            index = "" if layer == len(values) - 1 else f"_{layer}"
            named[names[branch].format(kind=kinds[kind], layer=index)] = value
    return named
