from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from msdetr.engine.distributed import Worker
from msdetr.engine.finite import FiniteCheck, NonFiniteError, guard_update

WORKER = Worker(device=torch.device("cpu"))


def scalar(value: float) -> Tensor:
    return torch.tensor(value)


def test_finite_steps_pass() -> None:
    check = FiniteCheck(WORKER)
    for step in range(1, 4):
        check.record(step, scalar(1.0), scalar(3e38), torch.tensor([step]))
        check.verify()


def test_image_ids_are_kept_until_the_next_check_only() -> None:
    check, image_ids = FiniteCheck(WORKER), torch.tensor([1])
    kept = weakref.ref(image_ids)
    check.record(1, scalar(1.0), scalar(1.0), image_ids)
    del image_ids
    assert kept() is not None
    check.verify()
    assert kept() is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_the_first_bad_step_is_named(where: str, bad: float) -> None:
    check = FiniteCheck(WORKER)
    for step in range(1, 6):  # steps 3 and 5 are bad, nobody looks until step 5
        value = scalar(bad) if step in (3, 5) else scalar(1.0)
        loss, norm = (value, scalar(1.0)) if where == "loss" else (scalar(1.0), value)
        check.record(step, loss, norm, torch.tensor([step * 10, step * 10 + 1]))
    with pytest.raises(
        NonFiniteError, match=rf"the {where} of step 3 .*rank 0: image ids \[30, 31\]"
    ):
        check.verify()


def test_float64_values_beyond_float32_are_finite() -> None:
    check = FiniteCheck(WORKER)
    check.record(1, torch.tensor(1e300, dtype=torch.float64), scalar(1.0), torch.tensor([1]))
    check.verify()


@pytest.mark.parametrize("optimizer_class", [AdamW, SGD])
def test_guarded_fused_update_leaves_weights_and_state(optimizer_class: type) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5))
    options = {"momentum": 0.9} if optimizer_class is SGD else {}
    optimizer = optimizer_class([weight], lr=0.1, fused=True, **options)

    def step(gradient: Tensor) -> None:
        weight.grad = gradient
        guard_update(optimizer, torch.isfinite(gradient.norm()))
        optimizer.step()

    step(torch.ones(5))
    good = weight.detach().clone()
    state = {name: value.clone() for name, value in optimizer.state[weight].items()}
    step(torch.full((5,), float("nan")))
    assert torch.equal(weight, good)
    assert all(torch.equal(optimizer.state[weight][name], state[name]) for name in state)
    step(torch.ones(5))
    assert not torch.equal(weight, good)
    assert torch.isfinite(weight).all()
