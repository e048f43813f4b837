"""Sigmoid focal loss: its sum per layer, and the gradient of that.

Maths. A logit x that should be low, which is every one but those of the queries' own classes, costs
(1 - alpha) t(x); one that should be high costs alpha t(-x), where

    t(z)  = p^gamma softplus(z),  p = sigmoid(z)
    t'(z) = p^gamma (gamma q softplus(z) + p),  q = 1 - p

and the gradients are (1 - alpha) t'(x) and -alpha t'(-x). All of it follows from e = exp(-|z|),
which cannot overflow: 1 / (1 + e) and e / (1 + e) are p and q, softplus(z) is max(z, 0) +
log(1 + e), and where gamma is not 0, 1 or 2, log p = -softplus(-z) gives the power, at p = 0 too.

Mapping. A layer is a row of B * Q * K logits, cut into chunks of V = 1, 2, 4 or 8 that divide it:
one load. A program takes CHUNKS of them; grid: (programs, layers). A query's K logits begin
anywhere in a chunk, so a chunk meets up to SPAN queries; the class of each becomes a place in the
chunk, to be compared with 0 ... V - 1. No K leaves lanes idle, and there is a division per chunk,
not per logit.

Traffic. Forward reads logits and classes and writes one float32 per program; PyTorch adds them up,
always in the same order. Backward reads the same, and one float32 per layer where it is, and writes
the gradient. Nothing is kept in between.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 2048
"""Logits per program: 16 per thread, of four warps."""


@triton.jit
def _log1p(x):
    """log(1 + x), 0 <= x <= 1, to 1.5 units in the last place; log itself costs three times as
    much, and is not accurate where 1 + x rounds to 1."""
    # Minimax polynomial of log(1 + x) / x: its largest relative error is 3.3e-8.
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
def _locate(
    target_ptr,
    num_chunks,
    num_queries,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Of this program: its layer, the offset of its logits [CHUNKS, V], which of them there are
    [CHUNKS, 1], and which are of their query's own class [CHUNKS, V]."""
    layer = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * CHUNKS  # in the layer
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < tl.minimum(num_chunks - first, CHUNKS).to(tl.int32)
    # The program's first query takes 64-bit numbers; those of chunks are counted from there.
    first_query = first * V // K
    column = (first * V - first_query * K).to(tl.int32) + chunk * V
    query = column // K
    column -= query * K  # of the chunk's first logit
    targets = target_ptr + (layer * num_queries + first_query) + query
    place = tl.arange(0, V)[None, :]
    own = tl.zeros((CHUNKS, V), tl.int1)
    for i in tl.static_range(SPAN):
        # The i-th query that the chunk meets, if there are that many.
        met = inside & (i * K < column + V)
        target = tl.load(targets + i, mask=met, other=-1)
        # Before it loses its upper half: classes that do not exist are background.
        exists = (target >= 0) & (target < K)
        own_place = tl.where(exists, target.to(tl.int32) + (i * K - column), -1)
        own = own | (place == own_place[:, None])
    offset = (layer * num_chunks + first) * V + (chunk * V)[:, None] + place
    return layer, offset, inside[:, None], own


@triton.jit
def focal_forward_kernel(
    logits_ptr,  # [N, B, Q, K]
    target_ptr,  # [N, B, Q]
    partial_ptr,  # [N, programs]
    num_chunks,  # per layer
    num_queries,  # B * Q
    alpha,
    rest,  # 1 - alpha
    GAMMA: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The loss of a program's logits; see `msdetr.ops.focal_loss`."""
    layer, offset, inside, own = _locate(target_ptr, num_chunks, num_queries, K, V, CHUNKS, SPAN)
    # A logit of minus infinity costs nothing as background.
    x = tl.load(logits_ptr + offset, mask=inside, other=-float("inf")).to(tl.float32)
    power, _, _, softplus = _sigmoid_and_softplus(tl.where(own, -x, x), GAMMA)
    loss = tl.where(own, alpha, rest) * (power * softplus)
    tl.store(partial_ptr + layer * tl.num_programs(0) + tl.program_id(0), tl.sum(loss))


@triton.jit
def focal_backward_kernel(
    grad_output_ptr,  # [N]
    logits_ptr,  # [N, B, Q, K]
    target_ptr,  # [N, B, Q]
    grad_logits_ptr,  # [N, B, Q, K]
    stride_grad,
    num_chunks,  # per layer
    num_queries,  # B * Q
    alpha,
    rest,  # 1 - alpha
    GAMMA: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The gradient of a program's logits."""
    layer, offset, inside, own = _locate(target_ptr, num_chunks, num_queries, K, V, CHUNKS, SPAN)
    x = tl.load(logits_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    grad_output = tl.load(grad_output_ptr + layer * stride_grad)
    power, p, q, softplus = _sigmoid_and_softplus(tl.where(own, -x, x), GAMMA)
    weight = tl.where(own, -alpha * grad_output, rest * grad_output)
    grad = weight * (power * (GAMMA * (q * softplus) + p))
    tl.store(grad_logits_ptr + offset, grad.to(grad_logits_ptr.dtype.element_ty), mask=inside)


def forward(logits: Tensor, target_class: Tensor, alpha: float, gamma: float) -> Tensor:
    """[N] float32, from logits [N, B, Q, K] and classes [N, B, Q], both contiguous."""
    num_layers = logits.shape[0]
    if not logits.numel():
        return logits.new_zeros(num_layers, dtype=torch.float32)
    grid, sizes, constants = _plan(logits, gamma)
    partial = logits.new_empty(grid[::-1], dtype=torch.float32)
    focal_forward_kernel[grid](
        logits, target_class, partial, *sizes, alpha, 1.0 - alpha, **constants
    )
    return partial.sum(1)


def backward(
    grad_output: Tensor, logits: Tensor, target_class: Tensor, alpha: float, gamma: float
) -> Tensor:
    """The gradient of `logits`, in their type; all are contiguous but `grad_output` [N]."""
    grad_logits = torch.empty_like(logits)
    if not logits.numel():
        return grad_logits
    grid, sizes, constants = _plan(logits, gamma)
    focal_backward_kernel[grid](
        grad_output,
        logits,
        target_class,
        grad_logits,
        grad_output.stride(0),
        *sizes,
        alpha,
        1.0 - alpha,
        **constants,
    )
    return grad_logits


def _plan(logits: Tensor, gamma: float) -> tuple[tuple[int, int], tuple[int, int], dict[str, Any]]:
    """The grid, (chunks, queries) of a layer, and what the kernels are compiled for."""
    layers, batch, queries, classes = logits.shape
    size = batch * queries * classes
    chunk = math.gcd(size, 16 // logits.element_size())
    num_chunks = size // chunk
    constants = {
        "GAMMA": float(gamma),
        "K": classes,
        "V": chunk,
        "CHUNKS": _ELEMENTS // chunk,
        # Chunks begin at multiples of the common divisor in a query's logits.
        "SPAN": triton.cdiv(chunk - math.gcd(classes, chunk), classes) + 1,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    grid = (triton.cdiv(num_chunks, _ELEMENTS // chunk), layers)
    return grid, (num_chunks, batch * queries), constants
