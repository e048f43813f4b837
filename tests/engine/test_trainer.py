from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.helpers import RELATIVES, TINY_MODEL, assignment_of, tiny_config

from msdetr.config import (
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    config_to_dict,
)
from msdetr.engine import trainer as trainer_module
from msdetr.engine.checkpoint import find_checkpoints, load_checkpoint
from msdetr.engine.distributed import Worker
from msdetr.engine.finite import FiniteCheck, NonFiniteError
from msdetr.engine.optimizer.state import optimizer_state_by_name
from msdetr.engine.prefetch import StepInput, on_device
from msdetr.engine.run import build_trainer
from msdetr.engine.tensor_files import TensorsInMemory
from msdetr.engine.trainer import Trainer
from msdetr.evaluation.coco_metrics import CocoResult
from msdetr.model.detector import Detector, build_detector
from msdetr.structures import Batch, ImageBatch, Targets
from msdetr.supervision.criterion import Criterion
from msdetr.weights import load_weights

CPU = torch.device("cpu")
WORKER = Worker(device=CPU)


def train(config: RunConfig) -> tuple[Trainer, CocoResult | None]:
    trainer = build_trainer(config, WORKER)
    return trainer, trainer.train()


def train_config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"epochs": 2, "batch_size": 4, "log_every": 2, "eval_every": 0} | changes)


def rows(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    lines = (config.output / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def steps(config: RunConfig) -> list[int]:
    return [step for step, _ in find_checkpoints(config.output)]


def assert_same_run(first: Trainer, second: Trainer) -> None:
    """Weights, optimizer state and EMA weights are bitwise equal."""
    assert first.step == second.step
    for (name, a), (_, b) in zip(
        first.model.named_parameters(), second.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        state_a, state_b = first.optimizer.state[a], second.optimizer.state[b]
        assert state_a.keys() == state_b.keys()
        assert all(torch.equal(state_a[key], state_b[key]) for key in state_a), name
    assert (first.ema is None) == (second.ema is None)
    if first.ema is not None and second.ema is not None:
        for name, average in first.ema.weights.items():
            assert torch.equal(average, second.ema.weights[name]), name


def test_a_run_leaves_everything_that_was_promised(shapes: Path, tmp_path: Path) -> None:
    config = tiny_config(
        shapes,
        tmp_path / "run",
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=5),
        train=train_config(eval_every=1),
    )
    trainer, result = train(config)
    assert (trainer.steps_per_epoch, trainer.step) == (3, 6)
    written = json.loads((config.output / "config.json").read_text())
    assert written == config_to_dict(trainer.config)
    assert written["model"]["num_classes"] == 3

    logged = rows(config, "train")
    assert [row["step"] for row in logged] == [2, 3, 4, 6]
    assert set(logged[0]) == {
        *("kind", "step", "epoch", "lr", "loss", "grad_norm"),
        *(f"{b}/{t}" for b in ("one_to_one", "one_to_many", "encoder") for t in _TERMS),
        *("images_per_second", "data_wait_share"),
    }
    # The learning rate of the step itself, in a warm-up of five steps.
    assert [row["lr"] for row in logged] == pytest.approx([4e-4, 6e-4, 8e-4, 1e-3])
    assert result is not None
    evaluations = rows(config, "eval")
    assert [row["step"] for row in evaluations] == [3, 6]
    assert {name: evaluations[1][name] for name in result.metrics} == result.metrics

    checkpoint = load_checkpoint(config.output / "checkpoints" / "step-00000006")
    progress = checkpoint.progress
    assert (progress.epoch, progress.world_size) == (2, 1)
    assert progress.label_map["names"] == ["red", "green", "blue"]
    assert progress.config == written
    weights = load_weights(config.output / "weights.safetensors")
    assert weights.config == trainer.config
    assert weights.label_map == progress.label_map
    stored = checkpoint.weights()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(weights.state_dict[name], tensor)
        assert torch.equal(stored[name], tensor)


_TERMS = ("class", "bbox", "giou")


def test_training_learns(shapes: Path, tmp_path: Path) -> None:
    config = tiny_config(
        shapes,
        tmp_path / "run",
        optimizer=OptimizerConfig(lr=4e-3, backbone_lr=4e-3),
        train=train_config(epochs=10, log_every=3),
    )
    train(config)
    losses = [row["loss"] for row in rows(config, "train")]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("stop", "name"),
    [
        (2, "ms-hybrid"),
        (3, "ms-detr"),
        (4, "ms-group"),
        (2, "dino"),
        (3, "ms-dn"),
        (4, "deta"),
    ],
)
def test_resume_is_exact(shapes: Path, tmp_path: Path, stop: int, name: str) -> None:
    # Dropout, flips, sizes, order, noise and the draws of matchers are all random here.
    model = RELATIVES.get(name, TINY_MODEL)
    ema = {"ema_decay": 0.9, "ema_warmup_steps": 2}
    straight = tiny_config(
        shapes,
        tmp_path / "straight",
        model=dataclasses.replace(model, num_classes=None),
        assignment=assignment_of(model),
        train=train_config(max_steps=5, **ema),
    )
    stopped = dataclasses.replace(
        straight, output=tmp_path / "resumed", train=train_config(max_steps=stop, **ema)
    )
    resumed = dataclasses.replace(stopped, train=straight.train, resume="auto")
    expected, _ = train(straight)
    train(stopped)
    actual, _ = train(resumed)
    assert_same_run(expected, actual)
    # Both log at steps 4 and 5; the losses there are those of the same steps.
    assert rows(resumed, "train")[-1]["loss"] == rows(straight, "train")[-1]["loss"]


def test_checkpoints_within_an_epoch_and_resume_from_a_named_one(
    shapes: Path, tmp_path: Path
) -> None:
    config = tiny_config(
        shapes,
        tmp_path / "run",
        train=train_config(checkpoint_every=2, keep_checkpoints=10, max_steps=5),
    )
    expected, _ = train(config)
    assert steps(config) == [2, 3, 4, 5]
    # The checkpoint of step 2 does not end a logging interval.
    assert [row["step"] for row in rows(config, "train")] == [2, 3, 4, 5]
    named = dataclasses.replace(
        config,
        output=tmp_path / "other",
        resume=str(config.output / "checkpoints" / "step-00000002"),
    )
    actual, _ = train(named)
    assert_same_run(expected, actual)


def test_ema_weights_are_exported_and_can_be_dropped(
    shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(shapes, tmp_path / "run", train=train_config(max_steps=2, ema_decay=0.9))
    first, _ = train(config)
    assert first.ema is not None
    exported = load_weights(config.output / "weights.safetensors").state_dict
    for name, tensor in (first.model.state_dict() | first.ema.weights).items():
        assert torch.equal(exported[name], tensor), name
    assert not torch.equal(exported["level_embed"], first.model.level_embed)

    without = dataclasses.replace(config, train=train_config(max_steps=3), resume="auto")
    with caplog.at_level(logging.WARNING):
        second = build_trainer(without, WORKER)
    assert "are dropped: no ema_decay" in caplog.text
    assert second.ema is None
    second.train()
    again = dataclasses.replace(config, resume="auto")
    with caplog.at_level(logging.WARNING):
        third = build_trainer(again, WORKER)
    assert "has no EMA weights: they start from its weights" in caplog.text
    assert third.ema is not None
    assert torch.equal(third.ema.weights["level_embed"], second.model.level_embed)


def test_tensors_that_a_checkpoint_lacks_are_named(shapes: Path, tmp_path: Path) -> None:
    config = tiny_config(shapes, tmp_path / "run", train=train_config(max_steps=1, ema_decay=0.9))
    trainer, _ = train(config)
    checkpoint = load_checkpoint(find_checkpoints(config.output)[-1][1])
    tensors = {
        name: x for name, x in trainer.state.tensors().items() if name != "average.level_embed"
    }
    incomplete = dataclasses.replace(checkpoint, tensors=TensorsInMemory(tensors))
    with pytest.raises(ValueError, match=r"step-00000001 lacks average\.level_embed"):
        trainer.load(incomplete)
    tensors = {name: x for name, x in tensors.items() if name != "model.level_embed"}
    incomplete = dataclasses.replace(checkpoint, tensors=TensorsInMemory(tensors))
    with pytest.raises(ValueError, match="missing: level_embed"):
        trainer.load(incomplete)


def test_a_run_of_an_earlier_version_goes_on(shapes: Path, tmp_path: Path) -> None:
    straight = tiny_config(shapes, tmp_path / "straight", train=train_config(max_steps=4))
    stopped = tiny_config(shapes, tmp_path / "run", train=train_config(max_steps=2))
    expected, _ = train(straight)
    trainer, _ = train(stopped)
    ((_, folder),) = find_checkpoints(stopped.output)
    progress = load_checkpoint(folder).progress
    shutil.rmtree(folder)
    content = {
        "model": trainer.model.state_dict(),
        "optimizer": optimizer_state_by_name(trainer.optimizer, trainer.model),
        **vars(progress),
    }
    torch.save(content, folder.with_suffix(".pt"))
    actual, _ = train(dataclasses.replace(straight, output=stopped.output, resume="auto"))
    assert_same_run(expected, actual)


def test_newest_checkpoints_are_kept(shapes: Path, tmp_path: Path) -> None:
    config = tiny_config(
        shapes, tmp_path / "run", train=train_config(checkpoint_every=1, keep_checkpoints=2)
    )
    train(config)
    assert steps(config) == [5, 6]


@pytest.mark.parametrize(
    ("every", "max_steps", "expected"), [(0, None, []), (2, None, [6]), (1, 4, [3, 4])]
)
def test_when_evaluations_happen(
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
    max_steps: int | None,
    expected: list[int],
) -> None:
    evaluated: list[int] = []
    monkeypatch.setattr(Trainer, "evaluate", lambda self: evaluated.append(self.step))
    monkeypatch.setattr(Trainer, "train_step", _skip_step)
    config = tiny_config(
        shapes, tmp_path / "run", train=train_config(eval_every=every, max_steps=max_steps)
    )
    train(config)
    assert evaluated == expected


def _skip_step(self: Trainer, batches: list[Batch]) -> None:
    self.step += 1
    self.meter.add(torch.zeros(()), torch.zeros(()), {})


def test_without_evaluation_no_validation_set_is_needed(shapes: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(shapes, root)
    shutil.rmtree(root / "val2017")
    config = tiny_config(root, tmp_path / "run")
    assert build_trainer(config, WORKER).val_data is None
    evaluating = dataclasses.replace(
        config, output=tmp_path / "other", train=train_config(eval_every=1)
    )
    with pytest.raises(ValueError, match="val2017"):
        build_trainer(evaluating, WORKER)


def test_finished_training_says_so(
    shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(shapes, tmp_path / "run", train=train_config(max_steps=2))
    train(config)
    before = (config.output / "metrics.jsonl").read_bytes()
    with caplog.at_level(logging.INFO):
        trainer, result = train(dataclasses.replace(config, resume="auto"))
    assert "training is finished at step 2 of 2" in caplog.text
    assert (trainer.step, result) == (2, None)
    assert (config.output / "metrics.jsonl").read_bytes() == before


def test_resume_auto_starts_where_there_is_nothing(
    shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(shapes, tmp_path / "run", resume="auto")
    with caplog.at_level(logging.INFO):
        assert build_trainer(config, WORKER).step == 0
    assert "starting a new run" in caplog.text


def test_runs_do_not_mix(shapes: Path, tmp_path: Path) -> None:
    config = tiny_config(
        shapes, tmp_path / "run", train=train_config(checkpoint_every=1, max_steps=2)
    )
    train(config)
    with pytest.raises(ValueError, match="--resume auto, or choose another --output"):
        build_trainer(config, WORKER)
    older = config.output / "checkpoints" / "step-00000001"
    with pytest.raises(ValueError, match="remove the later ones"):
        build_trainer(dataclasses.replace(config, resume=str(older)), WORKER)


def test_number_of_classes(shapes: Path, tmp_path: Path) -> None:
    def num_classes(given: int | None) -> int | None:
        model = dataclasses.replace(TINY_MODEL, num_classes=given)
        config = tiny_config(shapes, tmp_path / "run", model=model)
        return build_trainer(config, WORKER).config.model.num_classes

    assert num_classes(None) == 3
    assert num_classes(10) == 10
    with pytest.raises(ValueError, match="num_classes is 2, but the annotation file needs 3"):
        num_classes(2)


def test_batch_size_must_fit_the_processes(shapes: Path, tmp_path: Path) -> None:
    config = tiny_config(shapes, tmp_path / "run")
    model = build_detector(TINY_MODEL)
    data = build_trainer(config, WORKER).train_data
    worker = Worker(device=torch.device("cpu"), rank=0, world_size=3)
    with pytest.raises(ValueError, match=r"train\.batch_size \(4\).*divisible by 3"):
        Trainer(config, model, data, None, worker)


def test_same_seed_same_weights(shapes: Path, tmp_path: Path) -> None:
    def weight(seed: int) -> torch.Tensor:
        config = tiny_config(shapes, tmp_path / "run", seed=seed)
        return build_trainer(config, WORKER).model.level_embed.detach()

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))


def test_non_finite_step_stops_the_run(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(
        shapes, tmp_path / "run", train=train_config(checkpoint_every=1, accumulation_steps=2)
    )
    trainer = build_trainer(config, WORKER)
    real_step, seen = Trainer.train_step, []

    def poisoned_step(self: Trainer, step_input: StepInput) -> None:
        batches = list(step_input.host)
        if self.step == 1:  # the second step
            pixels = batches[0].images.pixels.float() / 255
            pixels[0, 0, 5, 5] = float("nan")
            batches[0] = batches[0]._replace(images=batches[0].images._replace(pixels=pixels))
            seen.extend(image_id for batch in batches for image_id in batch.image_ids.tolist())
            self.weights_before = {k: v.clone() for k, v in self.model.state_dict().items()}
        real_step(self, on_device(batches, CPU))

    monkeypatch.setattr(Trainer, "train_step", poisoned_step)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    assert "of step 2 is not finite" in str(caught.value)
    assert len(seen) == 4  # of both micro-batches
    assert f"rank 0: image ids {seen}" in str(caught.value)
    assert steps(config) == [1]
    good = load_checkpoint(find_checkpoints(config.output)[-1][1])
    assert good.progress.step == 1
    stored = good.weights()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, trainer.weights_before[name])  # type: ignore[attr-defined]
        assert torch.equal(tensor, stored[name])


def test_a_bad_step_does_not_change_the_ema_weights(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(shapes, tmp_path / "run", train=train_config(ema_decay=0.5))
    trainer = build_trainer(config, WORKER)
    assert trainer.ema is not None
    batches = next(trainer._load_steps())
    trainer.train_step(on_device(batches, CPU))
    before = {name: average.clone() for name, average in trainer.ema.weights.items()}
    with torch.no_grad():
        trainer.model.level_embed += 1.0  # so that the EMA weights would change
    pixels = torch.full(batches[0].images.pixels.shape, torch.nan)
    bad = batches[0]._replace(images=batches[0].images._replace(pixels=pixels))
    with pytest.raises(NonFiniteError):
        trainer.train_step(on_device([bad], CPU))
    for name, average in trainer.ema.weights.items():
        assert torch.equal(average, before[name]), name
    trainer.finite = FiniteCheck(WORKER)
    trainer.train_step(on_device(batches, CPU))
    assert not torch.equal(trainer.ema.weights["level_embed"], before["level_embed"])


def test_ema_weights_are_evaluated(
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    evaluated: list[torch.Tensor] = []
    real = trainer_module.evaluate_detector

    def recorded(model: Detector, *args: Any, **options: Any) -> CocoResult | None:
        evaluated.append(model.level_embed.detach().clone())
        return real(model, *args, **options)

    monkeypatch.setattr(trainer_module, "evaluate_detector", recorded)
    config = tiny_config(
        shapes,
        tmp_path / "run",
        train=train_config(epochs=1, eval_every=1, ema_decay=0.9, ema_warmup_steps=0),
    )
    with caplog.at_level(logging.INFO):
        trainer, _ = train(config)
    assert trainer.ema is not None
    assert torch.equal(evaluated[0], trainer.ema.weights["level_embed"])
    assert not torch.equal(evaluated[0], trainer.model.level_embed)
    assert "evaluated 5 images with the EMA weights" in caplog.text


def test_activation_checkpointing_changes_nothing(shapes: Path, tmp_path: Path) -> None:
    runs = [
        train(
            tiny_config(
                shapes,
                tmp_path / parts,
                train=train_config(max_steps=2, activation_checkpointing=parts),
            )
        )[0]
        for parts in ("none", "all")
    ]
    assert not runs[0].model.encoder.activation_checkpointing
    assert runs[1].model.encoder.activation_checkpointing
    assert_same_run(*runs)


def test_bfloat16_keeps_weights_and_losses_in_float32(shapes: Path, tmp_path: Path) -> None:
    config = tiny_config(
        shapes, tmp_path / "run", train=train_config(max_steps=2, precision="bfloat16")
    )
    trainer, _ = train(config)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    exact = dataclasses.replace(config, output=tmp_path / "exact", train=train_config(max_steps=2))
    train(exact)
    loss, reference = (rows(c, "train")[-1]["loss"] for c in (config, exact))
    assert loss != reference
    assert loss == pytest.approx(reference, rel=0.05)


_VARIANTS = {
    "ms-detr": TINY_MODEL,
    "one-stage": dataclasses.replace(TINY_MODEL, two_stage=False, mixed_selection=False),
    "output": dataclasses.replace(
        TINY_MODEL, decoder_order="self_cross", one_to_many="output", one_to_many_ffn=False
    ),
    "deformable": dataclasses.replace(
        TINY_MODEL,
        decoder_order="self_cross",
        one_to_many="none",
        one_to_many_ffn=False,
        two_stage=False,
        mixed_selection=False,
        box_refine=False,
        look_forward_twice=False,
    ),
    "learned positions": dataclasses.replace(TINY_MODEL, position_embedding="learned"),
    **RELATIVES,
}


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize("num_targets", [0, 2])
@pytest.mark.parametrize("model_config", _VARIANTS.values(), ids=_VARIANTS)
def test_every_parameter_gets_a_gradient(
    model_config: ModelConfig, num_targets: int, auxiliary: bool
) -> None:
    # Distributed training waits for the gradient of every parameter, and would hang without one.
    model = build_detector(model_config).train()
    images = ImageBatch(torch.randn(1, 3, 64, 64), torch.tensor([[64, 64]]))
    boxes = torch.rand(1, 8, 4) * 0.3 + 0.2
    targets = Targets(torch.zeros(1, 8, dtype=torch.int64), boxes, torch.tensor([num_targets]))
    criterion = Criterion(assignment_of(model_config), LossConfig(auxiliary=auxiliary))
    criterion(model(images, targets), targets).total.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []


def test_the_step_stays_short() -> None:
    assert len(inspect.getsource(Trainer.train_step).splitlines()) < 60
    assert len(inspect.getsource(Trainer.train).splitlines()) < 60
