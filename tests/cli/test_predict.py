from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine.helpers import tiny_config, write_shapes
from PIL import Image

from msdetr.cli import evaluate, predict
from msdetr.config import TrainConfig
from msdetr.engine.distributed import Worker
from msdetr.engine.run import build_trainer


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("predict") / "data"
    return write_shapes(root, num_train=4, num_val=3)


@pytest.fixture(scope="module")
def weights(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    train = TrainConfig(epochs=1, batch_size=4, eval_every=0)
    config = tiny_config(shapes, tmp_path_factory.mktemp("runs") / "run", train=train)
    build_trainer(config, Worker(device=torch.device("cpu"))).train()
    return config.output / "weights.safetensors"


def test_predictions_are_those_of_the_evaluation(
    weights: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shapes / "val2017"
    options = ["--checkpoint", str(weights), "--output", str(tmp_path), "--device", "cpu"]
    options += ["--score-threshold", "0"]
    assert predict.main([*options, "--images", str(folder)]) == 0
    assert f"in 3 images: {tmp_path}" in capsys.readouterr().out
    rows = json.loads((tmp_path / "predictions.json").read_text())
    assert [Path(row["file"]).name for row in rows] == [f"{i:04d}.png" for i in range(3)]

    evaluate.main(["--checkpoint", str(weights), "--data.root", str(shapes)])
    results = json.loads((weights.parent / "evaluation" / "results.json").read_text())
    result = [detection for row in rows for detection in row["detections"]]
    assert len(result) == len(results) > 0
    for detection, expected in zip(result, results, strict=True):
        assert detection["score"] == pytest.approx(expected["score"], rel=1e-4)
        assert detection["bbox"] == pytest.approx(expected["bbox"], abs=1e-2)
    assert {d["name"] for d in result} <= {"red", "green", "blue"}
    with Image.open(tmp_path / rows[0]["drawing"]) as drawing:
        assert drawing.format == "PNG"


def test_threshold_and_names(weights: Path, shapes: Path, tmp_path: Path) -> None:
    file = shapes / "val2017" / "0000.png"
    other = tmp_path / "0000.jpg"
    with Image.open(file) as image:
        image.convert("L").save(other)  # grey, another size policy is not needed
    options = ["--checkpoint", str(weights), "--output", str(tmp_path / "out")]
    options += ["--images", str(file), str(other), "--score-threshold", "1"]
    assert predict.main(options) == 0
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [row["detections"] for row in rows] == [[], []]
    assert [row["drawing"] for row in rows] == ["0000.png", "0000-2.png"]
    assert all((tmp_path / "out" / row["drawing"]).is_file() for row in rows)


@pytest.mark.parametrize("case", ["threshold", "nothing", "empty", "broken"])
def test_mistakes_are_exit_status_2(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    images, threshold, reason = {
        "threshold": ("broken.jpg", "1.5", "score_threshold must be in"),
        "nothing": ("absent", "0.5", "there is no image or folder"),
        "empty": ("empty", "0.5", "there is no image in"),
        "broken": ("broken.jpg", "0.5", "cannot decode"),
    }[case]
    options = ["--checkpoint", str(weights), "--output", str(tmp_path / "out")]
    options += ["--images", str(tmp_path / images), "--score-threshold", threshold]
    with pytest.raises(SystemExit) as caught:
        predict.main(options)
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err


def test_output_names_are_unique(tmp_path: Path) -> None:
    files = []
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / folder / "x.png")
        files.append(tmp_path / folder / "x.png")
    shutil.copy(files[0], tmp_path / "a" / "notes.txt")
    named = predict.find_images([tmp_path / "a", files[1], tmp_path / "c"])
    assert named == {"x": files[0], "x-2": files[1], "x-3": files[2]}
