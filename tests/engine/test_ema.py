from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from msdetr.engine.ema import WeightEMA

FINITE, NOT_FINITE = torch.tensor(True), torch.tensor(False)


def make_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_the_ema_of_a_sequence() -> None:
    model = make_model()
    expected = {name: p.double() for name, p in trained(model).items()}
    ema = WeightEMA(model, decay=0.9, warmup_steps=3)
    for step in range(1, 8):
        move(model)
        ema.set_step(step)
        ema.update(FINITE)
        decay = 0.9 * (1 - math.exp(-step / 3))
        expected = {
            name: decay * expected[name] + (1 - decay) * p.double()
            for name, p in trained(model).items()
        }
    assert ema.weights.keys() == expected.keys() == {"1.weight", "1.bias", "2.weight", "2.bias"}
    for name, average in ema.weights.items():
        assert average.dtype == torch.float32
        assert torch.allclose(average.double(), expected[name], rtol=0, atol=1e-6), name


def test_a_bad_step_changes_nothing() -> None:
    model = make_model()
    ema = WeightEMA(model, decay=0.5, warmup_steps=0)
    ema.set_step(1)
    before = copy.deepcopy(ema.weights)
    move(model)
    ema.update(NOT_FINITE)
    assert all(torch.equal(before[name], average) for name, average in ema.weights.items())
    ema.update(FINITE)
    assert not any(torch.equal(before[name], average) for name, average in ema.weights.items())


def test_decay_warms_up() -> None:
    ema = WeightEMA(make_model(), decay=0.99, warmup_steps=100)
    decays = [ema.decay_at(step) for step in (1, 10, 100, 10_000)]
    assert decays == sorted(decays)
    assert decays[0] == pytest.approx(0.99 / 100, rel=0.01)
    assert decays[2] == pytest.approx(0.99 * (1 - 1 / math.e))
    assert decays[3] == pytest.approx(0.99)
    assert WeightEMA(make_model(), decay=0.99, warmup_steps=0).decay_at(1) == 0.99


def test_applying_is_undone_also_after_an_error() -> None:
    model = make_model()
    ema = WeightEMA(model, decay=0.9, warmup_steps=0)
    initial, averages = trained(model), copy.deepcopy(ema.weights)
    move(model)
    weights = trained(model)
    storages = [p.data_ptr() for p in model.parameters()]
    applied: list[dict[str, Tensor]] = []

    def evaluate() -> None:
        with ema.applied():
            assert [p.data_ptr() for p in model.parameters()] == storages
            applied.append(trained(model))
            raise RuntimeError("evaluation")

    with pytest.raises(RuntimeError, match="evaluation"):
        evaluate()
    assert all(torch.equal(tensor, initial[n]) for n, tensor in applied[0].items())
    assert all(torch.equal(tensor, weights[n]) for n, tensor in trained(model).items())
    assert all(torch.equal(tensor, averages[n]) for n, tensor in ema.weights.items())
    ema.restart()
    assert all(torch.equal(tensor, weights[n]) for n, tensor in ema.weights.items())
