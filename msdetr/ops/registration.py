"""Registration of operators with PyTorch: every `torch.ops.msdetr.*` is defined by `register_op`.

The operators are opaque: compiled and exported code calls them as eager code does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("msdetr", "FRAGMENT")


def register_op(
    schema: str,
    implementation: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
    autocast: Sequence[int] = (),
    devices: Sequence[str] = ("CPU", "CUDA"),
    tags: Sequence[torch.Tag] = (),
) -> None:
    """Define an operator of the namespace `msdetr`.

    Args:
        schema: name, arguments and results, as `torch.library.Library.define` takes them. The first
            argument is a tensor.
        implementation: computes the results. On a GPU it runs with the device of the first argument
            as the current device, because Triton launches on the current device.
        fake: returns empty results of the right shapes, dtypes and strides.
        backward: formula of the gradients, `backward(ctx, *grad_outputs)`. None: the results have
            no gradient.
        save: saves in `ctx` what `backward` needs, `save(ctx, inputs, output)`.
        autocast: positions of the arguments that autocast converts. The other arguments keep their
            types. Empty: autocast does not change the operator.
        devices: dispatch keys of the devices that `implementation` serves.
        tags: properties of the operator.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=tuple(tags))
    for device in devices:
        runs_on_gpu = device == "CUDA"
        _LIBRARY.impl(name, _on_device(implementation) if runs_on_gpu else implementation, device)
        if autocast:
            function = _with_autocast(name, autocast, device.lower())
            _LIBRARY.impl(name, function, f"Autocast{device}")
    torch.library.register_fake(f"msdetr::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"msdetr::{name}", backward, setup_context=save, lib=_LIBRARY
        )


def no_second_derivative(op: str) -> Callable[..., NoReturn]:
    """A gradient formula for backward operators: it raises NotImplementedError.

    Without a formula, PyTorch would return wrong second derivatives silently.
    """

    def backward(ctx: Any, *grad_outputs: Tensor | None) -> NoReturn:
        raise NotImplementedError(f"{op} has no second derivative: use impl='reference'")

    return backward


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(tensor: Tensor, *args: Any) -> Any:
        with torch.cuda.device(tensor.device):
            return function(tensor, *args)

    return run


def _with_autocast(name: str, positions: Sequence[int], device_type: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        lowered = [
            _lower(arg, device_type) if position in positions else arg
            for position, arg in enumerate(args)
        ]
        with torch.autocast(device_type, enabled=False):
            return getattr(torch.ops.msdetr, name)(*lowered)

    return run


def _lower(tensor: Tensor, device_type: str) -> Tensor:
    if tensor.device.type != device_type or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))
