"""Captured steps. The capture here calls the functions again where a GPU would replay them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from engine.helpers import RELATIVES, TINY_MODEL, tiny_config
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from msdetr.config import (
    AssignmentConfig,
    CompileConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from msdetr.engine.cuda_graphs import GradientBuffer, StepGraphs
from msdetr.engine.distributed import MeanOverRanks, Worker
from msdetr.engine.run import build_trainer
from msdetr.engine.trainer import Trainer

WORKER = Worker(device=torch.device("cpu"))


class Capture:
    """Replays by calling the function again. As on a GPU, a capture changes nothing, and a replay
    writes its results to the tensors of the capture."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.num_captured = 0

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        state = self._state()
        before = [tensor.clone() for tensor in state]
        drawn = torch.get_rng_state(), self.trainer.generator.get_state()
        results = function()
        torch.set_rng_state(drawn[0])
        self.trainer.generator.set_state(drawn[1])
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        for leaf in tree_leaves(results):
            leaf.fill_(torch.nan)
        self.num_captured += 1

        def replay() -> None:
            for leaf, value in zip(tree_leaves(results), tree_leaves(function()), strict=True):
                leaf.copy_(value)

        return replay, results

    def _state(self) -> list[Tensor]:
        trainer = self.trainer
        assert trainer.graphs is not None
        ema = [] if trainer.ema is None else list(trainer.ema.weights.values())
        parameters = [p.data for p in trainer.model.parameters()]
        optimizer = [x for x in tree_leaves(trainer.optimizer.state_dict()) if torch.is_tensor(x)]
        return [trainer.graphs.gradients.flat, *parameters, *ema, *optimizer]


def config(
    data: Path,
    output: Path,
    *,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    model: ModelConfig = TINY_MODEL,
    **train: Any,
) -> RunConfig:
    options = {"epochs": 2, "batch_size": 4, "log_every": 1, "eval_every": 0} | train
    return tiny_config(
        data,
        output,
        # More positives than are kept, so that the result depends on the draw.
        assignment=AssignmentConfig(positive_fraction=0.25, one_to_many_threshold=0.0),
        model=dataclasses.replace(model, num_classes=None, dropout=0.2),
        train=TrainConfig(**options),
        optimizer=OptimizerConfig(name=optimizer),
    )


def capturing(config: RunConfig) -> tuple[Trainer, Capture]:
    """A trainer that captures its steps."""
    trainer = build_trainer(config, WORKER)
    for group in trainer.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    capture = Capture(trainer)
    trainer.graphs = StepGraphs(
        trainer.forward_backward,
        trainer.update,
        trainer._parameters,
        WORKER,
        trainer.generator,
        capture=capture,
    )
    return trainer, capture


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model": RELATIVES["ms-group"], "accumulation_steps": 2, "ema_decay": 0.5},
        {"model": RELATIVES["ms-contrastive"], "accumulation_steps": 2},
        {"model": RELATIVES["ms-dn"]},
    ],
    ids=["plain", "groups and parts", "contrastive and parts", "denoising"],
)
def test_replayed_steps_are_the_steps(
    shapes: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    # As if other ranks had no targets: the two numbers of targets of a step differ.
    monkeypatch.setattr(MeanOverRanks, "wait", lambda mean: mean._sum / 2)
    plain = build_trainer(config(shapes, tmp_path / "plain", optimizer="sgd", **options), WORKER)
    plain.train()
    trainer, capture = capturing(config(shapes, tmp_path / "captured", optimizer="sgd", **options))
    trainer.train()
    assert trainer.step == plain.step > 4
    # A graph per shape (images of 48 and of 64 pixels are both padded to 64), and the update's.
    assert trainer.graphs is not None
    num_shapes = len(trainer.graphs._micro_batches)
    assert capture.num_captured == num_shapes + 1
    assert num_shapes < trainer.step
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], weight)
    if plain.ema is not None:
        assert trainer.ema is not None
        for name, weight in plain.ema.weights.items():
            assert torch.equal(trainer.ema.weights[name], weight)


def test_adamw_with_a_learning_rate_on_the_device(shapes: Path, tmp_path: Path):
    """The learning rate is then a tensor, and the first step rounds differently. Later steps would
    amplify the difference where gradients are close to zero."""
    plain = build_trainer(config(shapes, tmp_path / "plain", max_steps=1), WORKER)
    plain.train()
    trainer, _ = capturing(config(shapes, tmp_path / "captured", max_steps=1))
    trainer.train()
    for name, weight in plain.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], weight, rtol=1e-6, atol=1e-7)


def test_learning_rates_in_tensors_follow_the_schedule(shapes: Path, tmp_path: Path):
    trainer, _ = capturing(config(shapes, tmp_path / "run"))
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    trainer.train()
    factor = trainer._learning_rate_factor(trainer.step - 1)
    for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
        assert group["lr"] is rate
        assert rate.item() == pytest.approx(group["base_lr"] * factor)


def test_gradients_are_laid_out_as_their_parameters():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    buffer = GradientBuffer(list(layer.parameters()))
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()
    layer(torch.randn(2, 3, 5, 5)).square().sum().backward()
    kept = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    assert sum(grad.square().sum() for grad in kept) == pytest.approx(
        buffer.flat.square().sum().item(), rel=1e-5
    )
    assert kept[0].any()
    assert kept[1].any()


def test_graphs_need_cuda(shapes: Path, tmp_path: Path):
    run = dataclasses.replace(
        config(shapes, tmp_path / "run"), compile=CompileConfig(cuda_graphs=True)
    )
    with pytest.raises(ValueError, match=r"compile\.cuda_graphs needs CUDA, this run is on cpu"):
        build_trainer(run, WORKER)


def test_graphs_do_not_take_shards():
    with pytest.raises(ValueError, match="needs parallel ddp"):
        RunConfig(parallel="fsdp", compile=CompileConfig(cuda_graphs=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["off", "on"])
def test_graphs_on_a_gpu(shapes: Path, tmp_path: Path, mode: str):
    """The random numbers are the same: the one-to-many positives to keep are drawn."""
    losses = []
    for cuda_graphs in (False, True):
        run = dataclasses.replace(
            config(shapes, tmp_path / str(cuda_graphs), accumulation_steps=2, ema_decay=0.5),
            model=dataclasses.replace(TINY_MODEL, num_classes=None, dropout=0.0),
            compile=CompileConfig(mode=mode, cuda_graphs=cuda_graphs),
            device="cuda",
        )
        trainer = build_trainer(run, Worker(device=torch.device("cuda", 0)))
        trainer.train()
        rows = map(json.loads, (run.output / "metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows])
    eager, replayed = losses
    assert len(eager) == 6
    # The update is captured at the second step. Adam amplifies rounding, so that runs diverge.
    assert replayed[:3] == pytest.approx(eager[:3], rel=1e-3)
    assert replayed == pytest.approx(eager, rel=3e-2)
