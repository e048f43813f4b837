"""The implementations of a whole detector that are measured against each other.

- `eager-reference`: ours, every op by its plain PyTorch reference.
- `eager`: ours as written: Triton's kernels on a GPU, attention in chunks on a CPU.
- `compiled`: ours with its regions compiled by `torch.compile`.
- `compiled-graphs`: those captured as CUDA graphs.
- `published`: the published code, in float32, on the PyTorch attention that it ships for tests.
- `published-tuned`: the same in a process with the CPU settings of ours.
- `huggingface`: Deformable-DETR of `transformers` with the recipe's sizes: without one-to-many
  supervision, so with less to do in training, and without our weights, so never compared in value.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch

from benchmarks.cli import choose_available
from benchmarks.detector.cases import Case
from benchmarks.detector.hugging_face import why_not_hugging_face

Implementation = Literal[
    "eager-reference",
    "eager",
    "compiled",
    "compiled-graphs",
    "published",
    "published-tuned",
    "huggingface",
]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)
COMPILED: tuple[Implementation, ...] = ("compiled", "compiled-graphs")
ON_CPU: tuple[Implementation, ...] = ("eager", "compiled", "published")
"""Default on a CPU: without `published-tuned`, which needs 10 GB of memory."""
ON_CUDA: tuple[Implementation, ...] = (
    "compiled-graphs",
    "compiled",
    "eager",
    "published",
    "huggingface",
    "eager-reference",
)
"""Default on a GPU, the most interesting first."""


def is_ours(implementation: str) -> bool:
    """Whether it belongs to this project."""
    return not is_published(implementation) and implementation != "huggingface"


def is_published(implementation: str) -> bool:
    """Whether it is the published code."""
    return implementation in ("published", "published-tuned")


def is_tuned(implementation: str) -> bool:
    """Whether its process has, on a CPU, the settings of `train.py` and `evaluate.py`."""
    return is_ours(implementation) or implementation == "published-tuned"


def choose_implementations(
    names: Sequence[Implementation], device: torch.device, published: Path | None
) -> list[Implementation]:
    """The implementations that were asked for, or by default all that can run here.

    The published code comes first, as ours load its initial weights.

    Raises:
        ValueError: one that was asked for cannot run here.
    """
    default = ON_CPU if device.type == "cpu" else ON_CUDA
    chosen = choose_available(
        names, default, lambda name: _why_unavailable(name, device, published)
    )
    return sorted(chosen, key=lambda name: not is_published(name))


def why_not(implementation: Implementation, case: Case) -> str | None:
    """Why an implementation that can run here has no such case, or None."""
    if is_published(implementation) and case.dtype != "float32":
        return "it has no mixed precision"
    if implementation == "huggingface":
        return why_not_hugging_face(case.config.model)
    return None


def _why_unavailable(
    name: Implementation, device: torch.device, published: Path | None
) -> str | None:
    if is_published(name) and published is None:
        return "give its folder by --published"
    if name == "huggingface" and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if name == "compiled-graphs" and device.type != "cuda":
        return "CUDA graphs need a GPU"
    return None
