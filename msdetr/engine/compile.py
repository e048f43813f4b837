"""Compilation of the training step, part by part, by `torch.compile`.

A part is a method that compiles into one graph (`fullgraph`): a graph break is an error, never a
slower step. Layers of one kind share their graphs, so a shape costs one compilation per kind of
part, not per layer. Shapes are static; of the criterion alone, the graphs soon serve any number of
targets and tokens. Distributed wrappers and activation checkpointing stay outside of the graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from msdetr.config import CompileConfig
from msdetr.losses.criterion import Criterion
from msdetr.model.detector import Detector

_MOST_GRAPHS = 4096
"""Graphs of one method. Beyond its own, low limit torch would stop compiling."""


class CompileError(RuntimeError):
    """Part of the model cannot be compiled here; says why, and how to train without."""


class Part(NamedTuple):
    """A method that compiles into one graph."""

    owner: nn.Module
    method: str
    dynamic: bool | None = False
    """False: a graph for each shape. None: the second shape makes a graph for all that follow."""


def is_compiled(config: CompileConfig, device: torch.device) -> bool:
    """Whether a run on `device` compiles its step."""
    return config.mode == "on" or (config.mode == "auto" and device.type == "cuda")


def parts(model: Detector, criterion: Criterion) -> list[Part]:
    """The compiled parts of a training step, in the order in which they run."""
    return [
        Part(model, "normalize"),
        Part(model.backbone, "forward"),
        Part(model, "flatten"),
        Part(model.encoder, "reference_points"),
        *(Part(layer, "forward") for layer in model.encoder.layers),
        Part(model.query_selection, "forward"),
        *(Part(layer, "forward") for layer in model.decoder.layers),
        Part(model.decoder, "predict"),
        Part(criterion, "forward", dynamic=None),
    ]


def compile_step(model: Detector, criterion: Criterion, *, backend: str = "inductor") -> None:
    """Compile all `parts` in place: each when it first meets a shape.

    Names of parameters and modules do not change. Evaluation mode is a shape of its own.
    """
    # Layers share code and with it a limit, which is meant for graphs that differ by accident.
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = _MOST_GRAPHS
    for owner, method, dynamic in parts(model, criterion):
        compiled = torch.compile(
            getattr(owner, method), fullgraph=True, dynamic=dynamic, backend=backend
        )
        setattr(owner, method, compiled)


def num_graphs() -> int:
    """Graphs that this process has compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def eager_code() -> contextlib.AbstractContextManager[None]:
    """A context in which compiled parts run as they are written: for the many shapes and the few
    passes of an evaluation."""
    stance: contextlib.AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


@contextlib.contextmanager
def explain_compile_errors() -> Iterator[None]:
    """Turn what `torch.compile` raises in this context into a `CompileError`."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise CompileError(
            f"the model cannot be compiled here: {error}\n--compile off trains without compilation"
        ) from error
