"""Parameter groups by learning rate, and the optimizer over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from msdetr.config import OptimizerConfig
from msdetr.model.attention import MSDeformAttn
from msdetr.model.detector import Detector

SGD_MOMENTUM = 0.9


def parameter_groups(model: Detector, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trainable parameters, grouped by learning rate.

    The backbone has `backbone_lr`; the sampling offsets of deformable attention and the reference
    points of one-stage queries have `lr * reference_lr_factor`; all others have `lr`. Parameters of
    equal learning rates share a group. Frozen parameters are in none.

    Raises:
        ValueError: no parameter is trainable.
        AssertionError: the groups overlap or miss a trainable parameter.
    """
    backbone = _trainable(model.backbone.parameters())
    reference = _trainable(_reference_parameters(model))
    grouped = {id(parameter) for parameter in (*backbone, *reference)}
    rest = [p for p in _trainable(model.parameters()) if id(p) not in grouped]
    by_learning_rate: dict[float, list[nn.Parameter]] = {}
    for learning_rate, parameters in (
        (config.lr, rest),
        (config.backbone_lr, backbone),
        (config.lr * config.reference_lr_factor, reference),
    ):
        if parameters:
            # 2e-4 * 0.1 and 2e-5 are one learning rate, though not one floating-point number.
            key = float(f"{learning_rate:.12g}")
            by_learning_rate.setdefault(key, []).extend(parameters)
    groups = [
        {"params": parameters, "lr": learning_rate, "base_lr": learning_rate}
        for learning_rate, parameters in by_learning_rate.items()
    ]
    check_groups(groups, model)
    return groups


def check_groups(groups: list[dict[str, Any]], model: nn.Module) -> None:
    """Assert that `groups` hold every trainable parameter of `model` exactly once.

    Raises:
        ValueError: no parameter is trainable.
        AssertionError: a parameter is in no group, in several, or frozen and in one.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trainable = {id(parameter) for parameter in _trainable(model.parameters())}
    if not trainable:
        raise ValueError("the model has no trainable parameter")
    grouped = Counter(id(parameter) for group in groups for parameter in group["params"])
    several = sorted(names.get(key, "?") for key, count in grouped.items() if count > 1)
    missing = sorted(names[key] for key in trainable - set(grouped))
    foreign = sorted(names.get(key, "?") for key in set(grouped) - trainable)
    if several or missing or foreign:
        raise AssertionError(
            f"parameter groups: in several {several}, in none {missing}, not trainable {foreign}"
        )


def build_optimizer(
    model: Detector, config: OptimizerConfig, *, rates_on_device: bool = False
) -> Optimizer:
    """AdamW, or SGD with momentum, with one fused kernel per group on the CPU and on CUDA.

    `rates_on_device` keeps the learning rates in tensors, which a CUDA graph reads at each replay.
    """
    groups = parameter_groups(model, config)
    if rates_on_device:
        for group in groups:
            device = group["params"][0].device
            group["lr"] = torch.full((), group["base_lr"], device=device)
    options: dict[str, Any] = {"weight_decay": config.weight_decay, "fused": True}
    if config.name == "sgd":
        return SGD(groups, lr=config.lr, momentum=SGD_MOMENTUM, **options)
    return AdamW(groups, lr=config.lr, capturable=rates_on_device, **options)


def _reference_parameters(model: Detector) -> list[nn.Parameter]:
    parameters: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            parameters.extend(module.sampling_offsets.parameters())
    if model.query_selection.reference_points is not None:
        parameters.extend(model.query_selection.reference_points.parameters())
    return parameters


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]
