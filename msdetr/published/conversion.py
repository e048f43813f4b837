"""From published arguments to a `RunConfig`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from msdetr.config import RunConfig
from msdetr.published import deformable, deta, dino, dn_detr
from msdetr.published.command_lines import (
    PUBLISHED_NUM_PROCESSES,
    Implementation,
    infer_implementation,
)
from msdetr.published.parsing import complete, parse_flags
from msdetr.published.shared import Recipe, starting_weights


class _Family(NamedTuple):
    """How one command line is converted."""

    unsupported: Callable[[argparse.Namespace], list[str]]
    recipe: Callable[[argparse.Namespace, int], Recipe]


def _deformable(implementation: Implementation) -> _Family:
    return _Family(
        deformable.unsupported, partial(deformable.recipe, implementation=implementation)
    )


_FAMILIES: dict[Implementation, _Family] = {
    "ms-detr": _deformable("ms-detr"),
    "ms-detr-impl-a": _deformable("ms-detr-impl-a"),
    "deformable-detr": _deformable("deformable-detr"),
    "h-deformable-detr": _deformable("h-deformable-detr"),
    "dn-dab-deformable-detr": _Family(dn_detr.unsupported, dn_detr.recipe),
    "dino": _Family(dino.unsupported, dino.recipe),
    "deta": _Family(deta.unsupported, deta.recipe),
}


def config_from_published_args(
    args: argparse.Namespace | Mapping[str, object] | Sequence[str],
    *,
    implementation: Implementation | None = None,
    overrides: Mapping[str, object] | None = None,
) -> RunConfig:
    """The configuration with the meaning of these published arguments.

    Args:
        args: the `args` of a published checkpoint, values by attribute name (such as the keys of a
            configuration file of DINO), or a list of flags such as
            `["--two_stage", "--num_queries", "300"]`. Absent arguments have the published default,
            absent keys of DINO that of `DINO_4scale.py`.
        implementation: the command line they belong to. None infers it from their names
            (`infer_implementation`) and takes `ms-detr` for a flag list.
        overrides: values by attribute name that replace those of `args`.

    Raises:
        ValueError: a flag is unknown or names something that is not supported here, a value has
            the wrong type, or the values contradict each other.
    """
    if isinstance(args, (argparse.Namespace, Mapping)):
        implementation = implementation or infer_implementation(args)
        given = dict(vars(args) if isinstance(args, argparse.Namespace) else args)
    else:
        implementation = implementation or "ms-detr"
        given = parse_flags(args, implementation)
    given |= overrides or {}
    values = complete(given, implementation)
    family = _FAMILIES[implementation]
    reasons = family.unsupported(values)
    if reasons:
        raise ValueError(f"published arguments that are not supported: {'; '.join(reasons)}")
    recipe = family.recipe(values, values.batch_size * _num_processes(given, implementation))
    return RunConfig(
        **recipe._asdict(),
        output=Path(values.output_dir) if values.output_dir else RunConfig().output,
        weights=starting_weights(values),
        device="cpu" if values.device == "cpu" else "auto",
        seed=values.seed,
    )


def _num_processes(given: Mapping[str, Any], implementation: Implementation) -> int:
    if "world_size" in given:
        return int(given["world_size"])
    if given.get("distributed") is False:
        return 1
    return PUBLISHED_NUM_PROCESSES[implementation]
