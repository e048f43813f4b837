"""Conversion of configurations to plain JSON types and back, and fields of earlier versions."""

from __future__ import annotations

import dataclasses
import functools
import logging
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

ConfigT = TypeVar("ConfigT")

logger = logging.getLogger(__name__)

_RENAMED_FIELDS = {
    "one_to_many_cost_box": "one_to_many_iou_weight",
    "one_to_many_cost_class": "one_to_many_class_score_weight",
}
"""Fields of earlier versions and their names today. They are still accepted."""


def current_name(name: str) -> str:
    """The name of a field today. A field that was renamed is warned about once per process."""
    if name in _RENAMED_FIELDS:
        _warn_renamed(name)
    return _RENAMED_FIELDS.get(name, name)


@functools.cache
def _warn_renamed(name: str) -> None:
    logger.warning("the field %s is now called %s", name, _RENAMED_FIELDS[name])


def config_to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON types, nested as the dataclasses are."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return typing.cast(dict[str, Any], plain(dataclasses.asdict(config)))


def config_from_dict(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """The inverse of `config_to_dict`. Absent fields keep their defaults.

    Raises:
        ValueError: `values` has a field that `cls` does not know, a value that it refuses, or a
            field under both its names.
    """
    hints = typing.get_type_hints(cls)
    renamed = {current_name(name): value for name, value in values.items()}
    if len(renamed) < len(values):
        raise ValueError(f"{cls.__name__} has a field under its former and its present name")
    unknown = sorted(set(renamed) - set(hints))
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
    return cls(**{name: _parse_value(hints[name], value) for name, value in renamed.items()})


def _parse_value(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option):
            return config_from_dict(typing.cast(type[Any], option), value)
        if option is Path:
            return Path(value)
        if typing.get_origin(option) is tuple and isinstance(value, list):
            return tuple(value)
        if option is float and type(value) is int:
            return float(value)
    return value
