"""Parameter groups, the optimizer and its learning rate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from msdetr.config import OptimizerConfig
from msdetr.engine.parallel import full_tensor
from msdetr.model.attention import MSDeformAttn
from msdetr.model.detector import Detector

SGD_MOMENTUM = 0.9


def parameter_groups(model: Detector, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trainable parameters, grouped by learning rate.

    The backbone has `backbone_lr`; the sampling offsets of deformable attention and the reference
    points of one-stage queries `lr * reference_lr_factor`; everything else `lr`. Parts with equal
    hyper-parameters share a group. Frozen parameters are in none.

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
    """AdamW, or SGD with momentum; one fused kernel per group on the CPU and on CUDA.

    `rates_on_device` keeps learning rates in tensors, which a CUDA graph reads at each replay.
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


def learning_rate_factor(
    step: int, *, steps_per_epoch: int, total_steps: int, config: OptimizerConfig
) -> float:
    """Factor on every group's learning rate at `step` (0 is the first).

    A pure function: nothing to save, nothing to restore. `total_steps` is the length of the whole
    schedule (epochs x steps per epoch), of which a run may do only a part.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "step":
        factor = 0.1 ** (step // steps_per_epoch // config.lr_drop_epoch)
    else:
        factor = 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total_steps)))
    return float(warmup * factor)


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its base."""
    for group in optimizer.param_groups:
        rate = group["base_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to a total norm of at most `max_norm` (0: leave them as they are).

    Returns the norm before scaling, of all shards where there are some; 0-dim, on the device.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = full_tensor(torch.nn.utils.get_total_norm(gradients, foreach=True))
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm


def optimizer_state_by_name(optimizer: Optimizer, model: nn.Module) -> dict[str, dict[str, Any]]:
    """The optimizer's state per parameter name, without hyper-parameters.

    Names outlive a change of the grouping, which follows the learning rates.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {names[parameter]: dict(state) for parameter, state in optimizer.state.items()}


def optimizer_state_targets(
    model: nn.Module, states: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Tensors to read optimizer state into, sharded as the parameters are.

    Args:
        model: whose parameters the state belongs to.
        states: what there is to read, `NAME.KEY` with a parameter's name, of any content.

    Raises:
        ValueError: `model` has no such parameter.
    """
    parameters = dict(model.named_parameters())
    targets: dict[str, dict[str, Tensor]] = {}
    for full_name, like in states.items():
        name, _, key = full_name.rpartition(".")
        if name not in parameters:
            raise ValueError(f"the optimizer state is of parameters that do not exist here: {name}")
        parameter = parameters[name].detach()
        targets.setdefault(name, {})[key] = (
            torch.empty_like(parameter)
            if like.shape == parameter.shape
            else torch.empty_like(like, device=parameter.device)
        )
    return targets


def load_optimizer_state(
    optimizer: Optimizer, model: nn.Module, states: dict[str, dict[str, Any]]
) -> None:
    """Put back what `optimizer_state_by_name` gave; hyper-parameters stay the optimizer's own.

    Raises:
        ValueError: the state is of parameters that the optimizer does not have.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[p] for group in optimizer.param_groups for p in group["params"]]
    foreign = sorted(set(states) - set(ordered))
    if foreign:
        raise ValueError(
            f"the optimizer state is of parameters that are not trained here: {foreign[:5]}"
        )
    optimizer.load_state_dict(
        {
            # A parameter that never had a gradient has no state.
            "state": {index: states[name] for index, name in enumerate(ordered) if name in states},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )


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
