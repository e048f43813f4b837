"""The implementations of deformable attention that are measured against each other.

Each computes the same output from value, offsets, logits and reference points. Computing locations
and weights from offsets and logits is part of its work, and so are casts. An implementation that
takes locations and weights gets offsets and logits as two tensors, like the outputs of the two
linear layers of its models. As slices of one projection they would cost it a copy in backward.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention.cases import Inputs, attention_weights, sampling_locations
from msdetr.ops.dispatch import resolve_impl
from msdetr.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused

Run = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Implementation:
    """A way to compute deformable attention."""

    name: str
    build: Callable[[], Run]
    """Imports its packages, and returns the function [B, Q, M * D] of the inputs."""
    takes_projection: bool = False
    """Whether it takes offsets and logits as one tensor."""
    package: str | None = None
    """Package that must be installed."""
    kernel: str | None = None
    """Op whose kernel must be able to run."""
    needs_gpu: bool = False
    has_backward: bool = True

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run here, or None."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.needs_gpu and device.type != "cuda":
            return "it needs a GPU"
        if self.kernel is not None:
            try:
                resolve_impl(self.kernel, "triton", device)
            except NotImplementedError as error:
                return str(error)
        return None

    @property
    def version(self) -> str | None:
        """Version of its package."""
        return None if self.package is None else importlib.metadata.version(self.package)

    def leaves(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The tensors whose gradients it computes."""
        if self.takes_projection:
            return inputs.value, inputs.projection
        return inputs.value, inputs.offsets, inputs.logits

    def gradients(
        self, output: Tensor, inputs: Inputs, *, retain_graph: bool = False
    ) -> tuple[Tensor, ...]:
        """Gradients of `leaves`."""
        return torch.autograd.grad(
            output, self.leaves(inputs), inputs.grad_output, retain_graph=retain_graph
        )


def external_op(path: str) -> Implementation:
    """An op given as `module:function`, with the usual signature.

    It is called with value [B, S, M, D], spatial shapes [L, 2] int64 on the device, sampling
    locations [B, Q, M, L, P, 2] float32 and attention weights [B, Q, M, L, P] in the type of value.
    """
    return Implementation(path, functools.partial(_build_external, path))


def _build_external(path: str) -> Run:
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"op {path!r}: {error}") from error

    def run(inputs: Inputs) -> Tensor:
        weights = attention_weights(inputs).to(inputs.value.dtype)
        locations = sampling_locations(inputs)
        output: Tensor = function(inputs.value, inputs.table.shapes, locations, weights)
        return output.flatten(2)

    return run


def _fused(inputs: Inputs) -> Tensor:
    return ms_deform_attn_fused(
        inputs.value, inputs.levels, inputs.projection, inputs.reference_points, impl="triton"
    )


def _standard(inputs: Inputs) -> Tensor:
    return ms_deform_attn(
        inputs.value,
        inputs.levels,
        sampling_locations(inputs),
        attention_weights(inputs),
        impl="triton",
    )


def _reference(inputs: Inputs) -> Tensor:
    return ms_deform_attn_fused(
        inputs.value, inputs.levels, inputs.projection, inputs.reference_points, impl="reference"
    )


def _compiled(build: Callable[[], Run]) -> Run:
    # Backward is timed alone, repeatedly on one graph, so compiled code must keep its inputs.
    config: Any = importlib.import_module("torch._functorch.config")
    config.donated_buffer = False
    torch.compiler.reset()  # Each case has its own shapes, and the number of graphs is limited.
    compiled: Run = torch.compile(build(), fullgraph=True, dynamic=False)
    return compiled


def _build_deformops(*, float32_sums: bool = False) -> Run:
    msda = importlib.import_module("deformops.registry").msda  # The import registers the op.
    op: Callable[..., Tensor] = torch.ops.deformops.msda_softmax
    if float32_sums:
        op = functools.partial(msda, softmax=True, fp32acc=True)

    def run(inputs: Inputs) -> Tensor:
        heads = inputs.value.shape[2]
        output: Tensor = op(
            inputs.value,
            inputs.table.shapes,
            inputs.table.starts,
            sampling_locations(inputs),
            inputs.logits.unflatten(-1, (heads, -1)),
        )
        return output

    return run


def _build_libreyolo() -> Run:
    module = importlib.import_module("libreyolo.kernels.attention.ms_deform_attn_triton")
    # The check of its arguments reads the shapes from the device, which a capture does not allow.
    vars(module)["_supported_inputs"] = lambda *_: True

    @torch.no_grad()
    def run(inputs: Inputs) -> Tensor:
        output: Tensor | None = module.triton_ms_deform_attn(
            inputs.value,
            inputs.table.shapes,
            sampling_locations(inputs),
            attention_weights(inputs),
        )
        if output is None:
            raise RuntimeError("its kernel failed")
        return output

    return run


def _build_transformers() -> Run:
    name = "transformers.models.deformable_detr.modeling_deformable_detr"
    attention = importlib.import_module(name).MultiScaleDeformableAttention()

    def run(inputs: Inputs) -> Tensor:
        # It samples in the type of the locations, which must be float32.
        output: Tensor = attention(
            inputs.value.to(torch.float32),
            inputs.table.shapes,
            list(inputs.levels),
            inputs.table.starts,
            sampling_locations(inputs),
            attention_weights(inputs),
            64,
        )
        return output.to(inputs.value.dtype)

    return run


_ALL = (
    Implementation(
        "msdetr-fused", lambda: _fused, takes_projection=True, kernel="ms_deform_attn_fused"
    ),
    Implementation("deformops", _build_deformops, package="deformops", needs_gpu=True),
    Implementation("reference", lambda: _reference, takes_projection=True),
    Implementation("msdetr", lambda: _standard, kernel="ms_deform_attn"),
    Implementation(
        "deformops-fp32acc",
        functools.partial(_build_deformops, float32_sums=True),
        package="deformops",
        needs_gpu=True,
    ),
    Implementation(
        "reference-compiled",
        functools.partial(_compiled, lambda: _reference),
        takes_projection=True,
        needs_gpu=True,
    ),
    Implementation("transformers", _build_transformers, package="transformers"),
    Implementation(
        "libreyolo", _build_libreyolo, package="libreyolo", needs_gpu=True, has_backward=False
    ),
)

IMPLEMENTATIONS = {implementation.name: implementation for implementation in _ALL}
"""By name, the most interesting first."""
OURS = ("msdetr-fused", "msdetr")
