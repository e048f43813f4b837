from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from engine.helpers import TINY_MODEL
from torch import nn

from msdetr.config import ModelConfig, OptimizerConfig
from msdetr.engine.optimizer.clipping import clip_gradients
from msdetr.engine.optimizer.groups import build_optimizer, check_groups, parameter_groups
from msdetr.engine.optimizer.schedule import learning_rate_factor, set_learning_rate
from msdetr.engine.optimizer.state import load_optimizer_state, optimizer_state_by_name
from msdetr.model.attention import MSDeformAttn
from msdetr.model.detector import Detector, build_detector

ONE_STAGE = dataclasses.replace(
    TINY_MODEL, two_stage=False, mixed_selection=False, one_to_many="none", one_to_many_ffn=False
)
CONFIG = OptimizerConfig(lr=1e-2, backbone_lr=1e-3, reference_lr_factor=0.5)


def names_by_learning_rate(model: Detector, config: OptimizerConfig) -> dict[float, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        group["lr"]: {names[id(p)] for p in group["params"]}
        for group in parameter_groups(model, config)
    }


@pytest.mark.parametrize("model_config", [TINY_MODEL, ONE_STAGE], ids=["two-stage", "one-stage"])
def test_groups_follow_the_modules(model_config: ModelConfig) -> None:
    model = build_detector(model_config)
    groups = names_by_learning_rate(model, CONFIG)
    assert set(groups) == {1e-2, 1e-3, 5e-3}
    assert groups[1e-3] == {n for n, _ in model.named_parameters() if n.startswith("backbone.")}
    num_attentions = sum(isinstance(m, MSDeformAttn) for m in model.modules())
    expected_reference = 2 * num_attentions + (0 if model_config.two_stage else 2)
    assert len(groups[5e-3]) == expected_reference
    assert all("sampling_offsets" in n or "reference_points" in n for n in groups[5e-3])
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


def test_equal_learning_rates_share_a_group() -> None:
    config = OptimizerConfig(lr=2e-4, backbone_lr=2e-5, reference_lr_factor=0.1)
    model = build_detector(TINY_MODEL)
    assert sorted(names_by_learning_rate(model, config)) == [2e-5, 2e-4]


def test_frozen_parameters_are_in_no_group() -> None:
    model = build_detector(dataclasses.replace(TINY_MODEL, train_backbone=False))
    groups = names_by_learning_rate(model, CONFIG)
    assert 1e-3 not in groups
    assert not any(n.startswith("backbone.") for names in groups.values() for n in names)


def test_check_groups_finds_what_is_wrong() -> None:
    model = nn.Linear(2, 2)
    both = [model.weight, model.bias]
    check_groups([{"params": both}], model)
    with pytest.raises(AssertionError, match=r"in several \['weight'\]"):
        check_groups([{"params": both}, {"params": [model.weight]}], model)
    with pytest.raises(AssertionError, match=r"in none \['bias'\]"):
        check_groups([{"params": [model.weight]}], model)
    model.bias.requires_grad_(False)
    with pytest.raises(AssertionError, match=r"not trainable \['bias'\]"):
        check_groups([{"params": both}], model)
    model.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        check_groups([], model)


def test_step_schedule_is_the_published_one() -> None:
    config = OptimizerConfig(schedule="step", lr_drop_epoch=11)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    reference = torch.optim.lr_scheduler.StepLR(optimizer, 11)
    for epoch in range(25):
        for step in (epoch * 7, epoch * 7 + 6):
            factor = learning_rate_factor(step, steps_per_epoch=7, total_steps=175, config=config)
            assert factor == pytest.approx(reference.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        reference.step()


def test_cosine_schedule_falls_from_one_to_zero() -> None:
    config = OptimizerConfig(schedule="cosine")
    factors = [
        learning_rate_factor(step, steps_per_epoch=10, total_steps=40, config=config)
        for step in (0, 10, 20, 40, 50)
    ]
    assert factors == pytest.approx([1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, 0.0, 0.0])


def test_warmup_is_linear_and_ends() -> None:
    config = OptimizerConfig(warmup_steps=4)
    factors = [
        learning_rate_factor(step, steps_per_epoch=100, total_steps=100, config=config)
        for step in range(6)
    ]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_learning_rate_is_relative_to_each_group() -> None:
    optimizer = build_optimizer(build_detector(TINY_MODEL), CONFIG)
    before = [group["lr"] for group in optimizer.param_groups]
    for factor in (0.5, 0.1):  # not cumulative
        set_learning_rate(optimizer, factor)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([x * 0.1 for x in before])


def test_sgd_has_momentum_and_weight_decay() -> None:
    model = build_detector(TINY_MODEL)
    optimizer = build_optimizer(model, OptimizerConfig(name="sgd", weight_decay=0.3))
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(g["momentum"], g["weight_decay"]) for g in optimizer.param_groups} == {(0.9, 0.3)}
    adamw = build_optimizer(model, OptimizerConfig(weight_decay=0.2))
    assert isinstance(adamw, torch.optim.AdamW)
    assert {g["weight_decay"] for g in adamw.param_groups} == {0.2}


@pytest.mark.parametrize("max_norm", [0.0, 0.1, 100.0])
def test_clipping(max_norm: float) -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    norm = clip_gradients(parameters, max_norm)
    assert norm.shape == ()
    assert float(norm) == pytest.approx(math.sqrt(7 * 4))
    clipped = math.sqrt(sum(float((p.grad**2).sum()) for p in parameters if p.grad is not None))
    expected = max_norm if max_norm == 0.1 else math.sqrt(28)
    assert clipped == pytest.approx(expected, rel=1e-4)


def test_optimizer_state_survives_regrouping() -> None:
    model = build_detector(TINY_MODEL)
    optimizer = build_optimizer(model, CONFIG)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    states = optimizer_state_by_name(optimizer, model)
    regrouped = build_optimizer(model, OptimizerConfig(lr=1e-3, backbone_lr=1e-3, weight_decay=0.5))
    assert len(regrouped.param_groups) != len(optimizer.param_groups)
    load_optimizer_state(regrouped, model, states)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            assert torch.equal(value, regrouped.state[parameter][name])
    assert {g["weight_decay"] for g in regrouped.param_groups} == {0.5}


def test_optimizer_state_of_another_model_is_refused() -> None:
    model = build_detector(TINY_MODEL)
    optimizer = build_optimizer(model, CONFIG)
    with pytest.raises(ValueError, match="not trained here"):
        load_optimizer_state(optimizer, model, {"other.weight": {}})


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_rates_on_the_device_take_the_same_steps(name: str) -> None:
    config = OptimizerConfig(name=name, lr=1e-2, backbone_lr=1e-3)
    models = [build_detector(TINY_MODEL) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, rates_on_device in zip(models, (False, True), strict=True):
        optimizer = build_optimizer(model, config, rates_on_device=rates_on_device)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert all(torch.is_tensor(rate) is rates_on_device for rate in rates)
        for factor in (1.0, 0.5):
            set_learning_rate(optimizer, factor)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        if rates_on_device:  # A graph reads them at fixed addresses.
            after = [group["lr"] for group in optimizer.param_groups]
            assert all(a is b for a, b in zip(after, rates, strict=True))
    for expected, actual in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(actual, expected)
