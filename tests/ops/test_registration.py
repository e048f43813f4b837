"""The helper that registers operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from msdetr.ops.registration import _on_device


def test_kernels_run_with_the_device_of_their_first_argument(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton launches on the current device, which need not be that of the tensors."""
    current: list[torch.device] = []

    @contextmanager
    def device(of: torch.device) -> Iterator[None]:
        current.append(of)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)

    def kernel(x: Tensor, factor: float) -> tuple[Tensor, list[torch.device]]:
        return x * factor, list(current)

    x = torch.ones(2)
    result, devices = _on_device(kernel)(x, 3.0)
    assert result.tolist() == [3.0, 3.0]
    assert devices == [x.device]
    assert not current
