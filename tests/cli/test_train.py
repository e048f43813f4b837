from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engine.helpers import tiny_config, tiny_options, write_shapes

from msdetr.cli import demo, evaluate, train
from msdetr.config import RunConfig, TrainConfig
from msdetr.engine.checkpoint import find_checkpoints
from msdetr.weights import load_weights, save_weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("train") / "data"
    return write_shapes(root, num_train=8, num_val=5)


def short_config(shapes: Path, output: Path) -> RunConfig:
    config = TrainConfig(epochs=1, batch_size=4, log_every=1, eval_every=1)
    return tiny_config(shapes, output, train=config)


def test_train(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = tiny_options(short_config(shapes, tmp_path / "run"))
    assert train.main(options) == 0
    output = capsys.readouterr()
    assert "step 2/2" in output.out
    assert "Average Precision" in output.out
    assert [step for step, _ in find_checkpoints(tmp_path / "run")] == [2]

    with pytest.raises(SystemExit) as caught:
        train.main(options)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err
    assert train.main([*options, "--resume", "auto"]) == 0
    assert "training is finished at step 2 of 2" in capsys.readouterr().out


def test_a_non_finite_loss_is_exit_status_1(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = short_config(shapes, tmp_path / "run")
    assert train.main(tiny_options(config)) == 0
    weights = load_weights(config.output / "weights.safetensors")
    poisoned = {name: torch.full_like(x, torch.nan) for name, x in weights.state_dict.items()}
    save_weights(tmp_path / "bad.safetensors", poisoned, weights.config, weights.label_map)
    second = short_config(shapes, tmp_path / "second")
    options = [*tiny_options(second), "--weights", str(tmp_path / "bad.safetensors")]
    capsys.readouterr()
    assert train.main(options) == 1
    text = capsys.readouterr().out
    assert "of step 1 is not finite (rank 0: image ids [1" in text
    assert find_checkpoints(second.output) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "no train data"),
        (["--data.root", "/nowhere"], "/nowhere/train2017"),
        (["--resume", "/nowhere.pt"], "there is no checkpoint /nowhere.pt"),
        (["--weights", "/nowhere.pth"], "there is no weights file /nowhere.pth"),
        (["--model.num-classes", "2"], "the annotation file needs 3"),
    ],
)
def test_wrong_files_are_exit_status_2(
    shapes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    reason: str,
) -> None:
    if options and options[0] != "--data.root":
        options = ["--data.root", str(shapes), *options]
    with pytest.raises(SystemExit) as caught:
        train.main(["tiny", "--output", str(tmp_path / "run"), *options])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert reason in error
    assert "Traceback" not in error


def start_torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", "2", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=120,
    )


def torchrun(*arguments: str) -> str:
    """The output of a script, which must succeed."""
    run = start_torchrun(*arguments)
    assert run.returncode == 0, run.stderr
    return run.stdout


FAILING_RANK = """
import os, signal, sys, time
from pathlib import Path
from msdetr.cli import train
from msdetr.engine import trainer
from msdetr.engine.trainer import Trainer

def fail(*_, **__):
    Path(sys.argv[1]).write_text(str(time.time()))
    if sys.argv[2] == "step":
        raise RuntimeError("the last rank fails")
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == "1":
    if sys.argv[2] == "step":
        Trainer.forward_backward = fail
    else:
        trainer.save_checkpoint = fail
sys.exit(train.main(sys.argv[3:]))
"""


@pytest.mark.parametrize("where", ["step", "checkpoint"])
def test_a_failing_rank_ends_all(shapes: Path, tmp_path: Path, where: str) -> None:
    # The other rank waits for it in a collective.
    script, failed_at = tmp_path / "failing_rank.py", tmp_path / "time"
    script.write_text(FAILING_RANK)
    config = short_config(shapes, tmp_path / "run")
    config = dataclasses.replace(config, parallel="ddp" if where == "step" else "fsdp")
    options = tiny_options(config)
    run = start_torchrun(str(script), str(failed_at), where, *options)
    seconds = time.time() - float(failed_at.read_text())
    assert run.returncode != 0
    assert seconds < 60
    assert ("the last rank fails" if where == "step" else "Signal 9") in run.stderr
    assert find_checkpoints(tmp_path / "run") == []


def test_two_processes(shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    text = torchrun("train.py", *tiny_options(short_config(shapes, output)))
    assert "2 process(es)" in text
    assert text.count("step 2/2") == 1  # Only rank 0 logs.
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["train", "train", "eval"]

    options = ["--checkpoint", str(output / "weights.safetensors"), "--data.root", str(shapes)]
    options += ["--eval.batch-size", "1"]  # The same batches in both.
    text = torchrun("evaluate.py", *options, "--output", str(tmp_path / "two"))
    assert text.count("Average Precision") == 6
    assert evaluate.main([*options, "--output", str(tmp_path / "one")]) == 0
    # 5 images on 2 processes: every image once, and the same numbers as in one process.
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    # Processes may have different numbers of threads, which round differently.
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        assert (first["image_id"], first["category_id"]) == (
            second["image_id"],
            second["category_id"],
        )
        assert first["score"] == pytest.approx(second["score"], abs=1e-5)
        assert first["bbox"] == pytest.approx(second["bbox"], abs=1e-3)
    assert {entry["image_id"] for entry in one} == set(range(100, 105))
    metrics = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two")]
    assert metrics[0]["metrics"] == pytest.approx(metrics[1]["metrics"], abs=1e-6)
    evaluated = json.loads(lines[-1])
    scored = {name: evaluated[name] for name in metrics[0]["metrics"]}
    assert scored == pytest.approx(metrics[0]["metrics"], abs=1e-3)


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--output", str(tmp_path / "demo"), "--num-train", "16", "--num-val", "3"]
    options += ["--image-size", "64", "--max-steps", "1"]
    written = []
    for _ in range(2):  # The second call trains again on the same data.
        assert demo.main(options) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("demo: AP 0.0")
        assert f"s, {tmp_path / 'demo'})" in last
        image = next((tmp_path / "demo" / "data" / "train2017").iterdir())
        run = tmp_path / "demo" / "run" / "config.json"
        written.append((image.stat().st_mtime_ns, run.stat().st_mtime_ns))
    assert written[0][0] == written[1][0]
    assert written[0][1] < written[1][1]
    assert (tmp_path / "demo" / "predictions.png").read_bytes()[:4] == b"\x89PNG"
