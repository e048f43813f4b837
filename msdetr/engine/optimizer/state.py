"""Optimizer state by parameter name, for checkpoints.

Names stay valid when the grouping changes, which follows the learning rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def optimizer_state_by_name(optimizer: Optimizer, model: nn.Module) -> dict[str, dict[str, Any]]:
    """The optimizer's state per parameter name, without hyper-parameters."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {names[parameter]: dict(state) for parameter, state in optimizer.state.items()}


def optimizer_state_targets(
    model: nn.Module, states: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Empty tensors to read optimizer state into, sharded as the parameters are.

    Args:
        model: whose parameters the state belongs to.
        states: the tensors to read, named `PARAMETER.KEY`; only their shapes and dtypes count.

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
    """Restore the state of `optimizer_state_by_name`. Hyper-parameters keep their present values.

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
