from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine.helpers import tiny_config, write_shapes

from msdetr.cli import main as cli
from msdetr.config import TrainConfig
from msdetr.engine.distributed import Worker
from msdetr.engine.run import build_trainer
from msdetr.engine.trainer import Trainer
from msdetr.weights import load_weights


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run of one step with EMA weights."""
    root = tmp_path_factory.mktemp("export")
    data = write_shapes(root / "data", num_train=4, num_val=1)
    train = TrainConfig(epochs=1, batch_size=4, eval_every=0, ema_decay=0.5)
    config = tiny_config(data, root / "run", train=train)
    trainer = build_trainer(config, Worker(device=torch.device("cpu")))
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [[], ["--no-ema"]], ids=["ema", "weights"])
def test_export(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    checkpoint = trainer.config.output / "checkpoints" / "step-00000001"
    output = tmp_path / "new" / "weights.safetensors"
    assert cli.main(["export", str(checkpoint), "--output", str(output), *options]) == 0
    assert f"wrote {len(trainer.model.state_dict())} tensors" in capsys.readouterr().out
    weights = load_weights(output)
    assert weights.config == trainer.config
    assert weights.label_map == trainer.label_map.to_dict()
    assert trainer.ema is not None
    ema = {} if options else trainer.ema.weights
    expected = trainer.model.state_dict() | ema
    assert weights.state_dict.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights.state_dict[name], tensor), name


def test_mistakes_are_exit_status_2(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, reason in (
        (tmp_path / "absent", "there is no weights file"),
        (trainer.config.output, "is not a checkpoint"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["export", str(path), "--output", str(tmp_path / "x.safetensors")])
        assert caught.value.code == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()
