"""Loading a state dict into a model, all of it or nothing."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from msdetr.config import ModelConfig
from msdetr.model.checkpoint_adapter.names import published_name


def load_state(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load our state dict into the model, all of it or nothing.

    Raises:
        ValueError: keys are missing or unexpected or have another shape; every one is listed,
            with its published name.
    """
    check_state(model, state_dict)
    model.load_state_dict(dict(state_dict), strict=True)


def check_state(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Compare names and shapes with those of the model, without reading values.

    Raises:
        ValueError: as `load_state`.
    """
    config = getattr(model, "config", None)
    expected = model.state_dict()
    problems = []
    for key in sorted(expected.keys() - state_dict.keys()):
        problems.append(f"missing: {_both_names(key, config)}")
    for key in sorted(state_dict.keys() - expected.keys()):
        problems.append(f"unexpected: {_both_names(key, config)}")
    for key in sorted(expected.keys() & state_dict.keys()):
        actual, needed = tuple(state_dict[key].shape), tuple(expected[key].shape)
        if actual != needed:
            problems.append(f"shape {actual} instead of {needed}: {_both_names(key, config)}")
    if problems:
        raise ValueError("these weights do not fit the model:\n  " + "\n  ".join(problems))


def _both_names(our_name: str, config: ModelConfig | None) -> str:
    try:
        return f"{our_name} (published: {published_name(our_name, config)})"
    except ValueError:
        return our_name
