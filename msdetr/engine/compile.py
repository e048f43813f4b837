"""Compilation of the training step by `torch.compile`, region by region.

A region is a method that compiles into one graph (`fullgraph`), so that a graph break is an error
and not a slower step. Layers of one kind share their graphs: a new shape costs one compilation per
kind of region, not per layer. Shapes are static, except in the criterion, whose graphs soon accept
any number of targets and tokens. Distributed wrappers and activation checkpointing stay outside of
the graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from msdetr.config import CompileConfig
from msdetr.model.detector import Detector
from msdetr.supervision.criterion import Criterion

_MAX_GRAPHS = 4096
"""Graphs of one method. Torch's own limit is low, and it stops compiling beyond it."""


class CompileError(RuntimeError):
    """The model cannot be compiled here. The message says why, and how to train without."""


class Region(NamedTuple):
    """A method that compiles into one graph."""

    owner: nn.Module
    method: str
    dynamic: bool | None = False
    """False: a graph for each shape. None: the second shape makes a graph for all that follow."""


def is_compiled(config: CompileConfig, device: torch.device) -> bool:
    """Whether a run on `device` compiles its step."""
    return config.mode == "on" or (config.mode == "auto" and device.type == "cuda")


def compiled_regions(model: Detector, criterion: Criterion) -> list[Region]:
    """The compiled regions of a training step, in the order in which they first run."""
    position = model.decoder.query_position
    return [
        Region(model, "normalize"),
        Region(model.backbone, "forward"),
        Region(model, "flatten"),
        Region(model.encoder, "reference_points"),
        *(Region(layer, "forward") for layer in model.encoder.layers),
        Region(model.query_selection, "forward"),
        *([Region(model, "with_denoising")] if model.denoising is not None else []),
        *([Region(position, "forward")] if position is not None else []),
        *(Region(layer, "forward") for layer in model.decoder.layers),
        Region(model.decoder, "predict"),
        Region(criterion, "forward", dynamic=None),
    ]


def compile_step(model: Detector, criterion: Criterion, *, backend: str = "inductor") -> None:
    """Compile all regions in place, each at its first call with a new shape.

    Names of parameters and modules do not change. Evaluation mode counts as another shape.
    """
    # Layers share their code and its limit, which is meant for unintended recompilations.
    torch._dynamo.config.recompile_limit = _MAX_GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = _MAX_GRAPHS
    for owner, method, dynamic in compiled_regions(model, criterion):
        compiled = torch.compile(
            getattr(owner, method), fullgraph=True, dynamic=dynamic, backend=backend
        )
        setattr(owner, method, compiled)


def num_graphs() -> int:
    """Graphs that this process has compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def eager_code() -> contextlib.AbstractContextManager[None]:
    """A context in which compiled regions run eagerly, for the many shapes of an evaluation."""
    stance: contextlib.AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


@contextlib.contextmanager
def explain_compile_errors() -> Iterator[None]:
    """Turn the errors of `torch.compile` in this context into a `CompileError`."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise CompileError(
            f"the model cannot be compiled here: {error}\n--compile off trains without compilation"
        ) from error
