"""Checks of field values that the configuration classes share."""

from __future__ import annotations

import math
import types
import typing
from typing import Any, Literal


def check_types(config: Any) -> None:
    """Refuse values that do not have the type of their field's annotation."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _has_type(value, hint):
            expected = str(hint).replace("typing.", "") if typing.get_args(hint) else hint.__name__
            raise ValueError(f"{name} must be {expected}, got {value!r}")


def require_at_least(minimum: int, config: Any, *names: str) -> None:
    """Refuse numbers below `minimum`, infinity and NaN. None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not minimum <= value < math.inf:
            raise ValueError(f"{name} must be at least {minimum} and finite, got {value}")


def require_fraction(config: Any, name: str) -> None:
    """Refuse numbers outside [0, 1]. None passes."""
    value = getattr(config, name)
    if value is not None and not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def _has_type(value: Any, hint: Any) -> bool:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_has_type(value, option) for option in arguments)
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str) and value in arguments
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_has_type(item, arguments[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)
