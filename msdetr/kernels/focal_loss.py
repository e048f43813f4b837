"""Sigmoid focal loss: its sum per layer, and the gradient of that sum.

Maths. A negative logit x (every logit except that of its query's class) has the loss
(1 - alpha) t(x), a positive logit has the loss alpha t(-x), where

    t(z)  = p^gamma softplus(z),  p = sigmoid(z)
    t'(z) = p^gamma (gamma q softplus(z) + p),  q = 1 - p

The gradients are (1 - alpha) t'(x) and -alpha t'(-x). Everything follows from e = exp(-|z|), which
cannot overflow: 1 / (1 + e) and e / (1 + e) are p and q, and softplus(z) is max(z, 0) + log(1 + e).
If gamma is not 0, 1 or 2, the power is computed from log p = -softplus(-z), also at p = 0.

Mapping. A layer is a row of B * Q * K logits, split into chunks of V = 1, 2, 4 or 8 logits: one
load each. A program takes CHUNKS of them; the grid is (programs, layers). The K logits of a query
start anywhere in a chunk, so a chunk overlaps up to SPAN queries. Their classes become two bit
masks of the chunk's places: which are positive, and which are ignored. No value of K leaves lanes
idle, and there is one division per chunk instead of one per logit.

Traffic. Forward reads logits and classes and writes one float32 per program, which PyTorch sums in
a fixed order. Backward reads the same and one float32 per layer, and writes the gradient. No
intermediate result is stored.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdetr.structures import IGNORED

_IGNORED = tl.constexpr(IGNORED)
_ELEMENTS = 2048
"""Logits per program: 16 per thread, of four warps."""


class _Layers(NamedTuple):
    """N layers of logits; an argument of both kernels."""

    logits: Any  # [N, B, Q, K]
    target: Any  # [N, B, Q]
    num_chunks: Any  # of a layer
    num_queries: Any  # B * Q
    alpha: Any
    rest: Any  # 1 - alpha


@triton.jit
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1, to 1.5 units in the last place.

    `tl.log` takes three times as long, and is not accurate where 1 + x rounds to 1.
    """
    # Minimax polynomial of log(1 + x) / x: the maximum relative error is 3.3e-8.
    y = 0.0053648243 * x - 0.030065792
    y = y * x + 0.079204536
    y = y * x - 0.13753802
    y = y * x + 0.19153655
    y = y * x - 0.24857164
    y = y * x + 0.33321323
    y = y * x - 0.49999648
    y = y * x + 1.0
    return y * x


@triton.jit
def _sigmoid_and_softplus(z, GAMMA: tl.constexpr):
    """p^gamma, p, q = 1 - p and softplus(z) of the module's docstring."""
    e = tl.exp(-tl.abs(z))
    log = _log1p(e)
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    p = tl.where(z >= 0.0, larger, smaller)
    q = tl.where(z >= 0.0, smaller, larger)
    if GAMMA == 0.0:
        power = tl.full(z.shape, 1.0, tl.float32)
    elif GAMMA == 1.0:
        power = p
    elif GAMMA == 2.0:
        power = p * p
    else:
        power = tl.exp(-GAMMA * (tl.maximum(-z, 0.0) + log))
    return power, p, q, tl.maximum(z, 0.0) + log


@triton.jit
def _locate(layers, K: tl.constexpr, V: tl.constexpr, CHUNKS: tl.constexpr, SPAN: tl.constexpr):
    """Layer of this program, offsets of its logits [CHUNKS, V], mask of those that exist
    [CHUNKS, 1], of those that are ignored and of those that are positive [CHUNKS, V]."""
    layer = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * CHUNKS  # in the layer
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < tl.minimum(layers.num_chunks - first, CHUNKS).to(tl.int32)
    # The program's first query needs 64 bits; queries of chunks are relative to it.
    first_query = first * V // K
    column = (first * V - first_query * K).to(tl.int32) + chunk * V
    query = column // K
    column -= query * K  # of the chunk's first logit
    targets = layers.target + (layer * layers.num_queries + first_query) + query
    # A bit for each place in the chunk.
    ignored = tl.zeros((CHUNKS,), tl.int32)
    positive = tl.zeros((CHUNKS,), tl.int32)
    for i in tl.static_range(SPAN):
        # The i-th query that the chunk overlaps, if there are that many.
        overlaps = inside & (i * K < column + V)
        target = tl.load(targets + i, mask=overlaps, other=-1)
        # Checked before the conversion to 32 bits: classes that do not exist are background.
        exists = (target >= 0) & (target < K)
        first_place = i * K - column
        place_of_class = target.to(tl.int32) + first_place
        exists = exists & (place_of_class >= 0) & (place_of_class < V)
        positive = positive | tl.where(exists, 1 << place_of_class, 0)
        places = -1 << tl.minimum(tl.maximum(first_place, 0), V)  # of this query and the next ones
        ignored = tl.where(target == _IGNORED, ignored | places, ignored & ~places)
    place = tl.arange(0, V)[None, :]
    offset = (layer * layers.num_chunks + first) * V + (chunk * V)[:, None] + place
    bit = 1 << place
    is_ignored, is_positive = (ignored[:, None] & bit) != 0, (positive[:, None] & bit) != 0
    return layer, offset, inside[:, None], is_ignored, is_positive


@triton.jit
def focal_forward_kernel(
    layers,
    partial_ptr,  # [N, programs]
    GAMMA: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The loss of a program's logits; see `msdetr.ops.focal_loss`."""
    layer, offset, inside, ignored, positive = _locate(layers, K, V, CHUNKS, SPAN)
    x = tl.load(layers.logits + offset, mask=inside, other=-float("inf")).to(tl.float32)
    # The loss of a negative logit of minus infinity is 0.
    x = tl.where(ignored, -float("inf"), x)
    power, _, _, softplus = _sigmoid_and_softplus(tl.where(positive, -x, x), GAMMA)
    loss = tl.where(positive, layers.alpha, layers.rest) * (power * softplus)
    tl.store(partial_ptr + layer * tl.num_programs(0) + tl.program_id(0), tl.sum(loss))


@triton.jit
def focal_backward_kernel(
    layers,
    grad_output_ptr,  # [N]
    stride_grad,
    grad_logits_ptr,  # [N, B, Q, K]
    GAMMA: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The gradient of a program's logits."""
    layer, offset, inside, ignored, positive = _locate(layers, K, V, CHUNKS, SPAN)
    x = tl.load(layers.logits + offset, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(ignored, -float("inf"), x)  # The gradient is 0.
    grad_output = tl.load(grad_output_ptr + layer * stride_grad)
    power, p, q, softplus = _sigmoid_and_softplus(tl.where(positive, -x, x), GAMMA)
    weight = tl.where(positive, -layers.alpha * grad_output, layers.rest * grad_output)
    grad = weight * (power * (GAMMA * (q * softplus) + p))
    tl.store(grad_logits_ptr + offset, grad.to(grad_logits_ptr.dtype.element_ty), mask=inside)


def forward(logits: Tensor, target_class: Tensor, alpha: float, gamma: float) -> Tensor:
    """[N] float32, from logits [N, B, Q, K] and classes [N, B, Q], both contiguous."""
    num_layers = logits.shape[0]
    if not logits.numel():
        return logits.new_zeros(num_layers, dtype=torch.float32)
    grid, layers, constants = _plan(logits, target_class, alpha, gamma)
    partial = logits.new_empty(grid[::-1], dtype=torch.float32)
    focal_forward_kernel[grid](layers, partial, **constants)
    return partial.sum(1)


def backward(
    grad_output: Tensor, logits: Tensor, target_class: Tensor, alpha: float, gamma: float
) -> Tensor:
    """The gradient of `logits`, in their type; `grad_output` [N] may be strided."""
    grad_logits = torch.empty_like(logits)
    if not logits.numel():
        return grad_logits
    grid, layers, constants = _plan(logits, target_class, alpha, gamma)
    stride = grad_output.stride(0)
    focal_backward_kernel[grid](layers, grad_output, stride, grad_logits, **constants)
    return grad_logits


def _plan(
    logits: Tensor, target_class: Tensor, alpha: float, gamma: float
) -> tuple[tuple[int, int], _Layers, dict[str, Any]]:
    """The grid, the common argument of the kernels, and the compile-time constants."""
    num_layers, batch, queries, classes = logits.shape
    size = batch * queries * classes
    chunk = math.gcd(size, 16 // logits.element_size())
    num_chunks = size // chunk
    constants = {
        "GAMMA": float(gamma),
        "K": classes,
        "V": chunk,
        "CHUNKS": _ELEMENTS // chunk,
        # In the logits of a query, chunks start at multiples of the common divisor.
        "SPAN": triton.cdiv(chunk - math.gcd(classes, chunk), classes) + 1,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    grid = (triton.cdiv(num_chunks, _ELEMENTS // chunk), num_layers)
    layers = _Layers(logits, target_class, num_chunks, batch * queries, alpha, 1.0 - alpha)
    return grid, layers, constants
