from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.helpers import tiny_config, write_shapes

from msdetr.cli import evaluate
from msdetr.config import EvalConfig, TrainConfig
from msdetr.engine.distributed import Worker
from msdetr.engine.run import build_trainer
from msdetr.model.checkpoint_adapter import ours_to_published
from msdetr.model.detector import build_detector
from msdetr.published import config_from_published_args
from msdetr.weights import load_weights, save_weights


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate") / "data"
    return write_shapes(root, num_train=4, num_val=5)


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step."""
    config = tiny_config(
        shapes,
        tmp_path_factory.mktemp("runs") / "run",
        train=TrainConfig(epochs=1, batch_size=4, eval_every=1),
        eval=EvalConfig(batch_size=2, max_detections=7),
    )
    build_trainer(config, Worker(device=torch.device("cpu"))).train()
    return config.output


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def test_evaluate(
    run: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data.root", str(shapes), "--device", "cpu"]
    checkpoint = run / "checkpoints" / "step-00000001"
    assert evaluate.main(["--checkpoint", str(checkpoint), *options]) == 0
    table = capsys.readouterr().out
    assert table.count("Average Precision") == table.count("Average Recall") == 6
    assert all(name in table for name in ("red", "green", "blue"))

    folder = checkpoint.parent / "evaluation"  # where it goes by default
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = read(folder, "metrics.json")
    assert metrics["metrics"].items() <= rows[-1].items()  # as the run scored itself
    assert metrics["num_images"] == 5
    results = read(folder, "results.json")
    assert len(results) == 5 * 7  # the run's own max_detections
    assert {entry["category_id"] for entry in results} <= {5, 6, 7}
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score"}

    weights = run / "weights.safetensors"
    options += ["--output", str(tmp_path)]
    assert evaluate.main([f"--checkpoint={weights}", *options]) == 0
    assert read(tmp_path, "results.json") == results
    options += ["--eval.max-detections", "1", "--eval.batch-size", "5"]
    assert evaluate.main(["--checkpoint", str(weights), *options]) == 0
    best = [entry["score"] for entry in read(tmp_path, "results.json")]
    assert best == pytest.approx([entry["score"] for entry in results[::7]], rel=1e-4)


def test_the_images_are_prepared_as_in_training(run: Path, shapes: Path, tmp_path: Path) -> None:
    options = ["--checkpoint", str(run / "weights.safetensors"), "--data.root", str(shapes)]
    parsed, detector = evaluate._parse(options, "evaluate.py")
    assert parsed.data.test_size == detector.config.data.test_size == 64
    assert parsed.data.root == shapes
    assert parsed.data.train_annotations is None


def test_suppression_is_an_option(run: Path, shapes: Path, tmp_path: Path) -> None:
    weights = load_weights(run / "weights.safetensors")
    for name, tensor in weights.state_dict.items():
        if re.fullmatch(r"heads\.bbox_embed\.\d+\.layers\.2\.bias", name):
            tensor[2:] = 9.0  # boxes as large as the image: they overlap
    save_weights(tmp_path / "w.safetensors", weights.state_dict, weights.config, weights.label_map)
    options = ["--checkpoint", str(tmp_path / "w.safetensors"), "--data.root", str(shapes)]
    options += ["--output", str(tmp_path)]
    evaluate.main(options)
    assert len(read(tmp_path, "results.json")) == 5 * 7
    evaluate.main([*options, "--eval.nms-iou-threshold", "0.1"])
    assert len(read(tmp_path, "results.json")) < 5 * 7


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"use_dn": True, "scalar": 2},
        {"dn_number": 12},
        {"assign_first_stage": True, "assign_second_stage": True, "two_stage": True},
    ],
    ids=["deformable-detr", "dn-detr", "dino", "deta"],
)
def test_published_checkpoint(shapes: Path, tmp_path: Path, given: dict[str, object]) -> None:
    # Its labels are category ids: 5, 6 and 7 here.
    sizes = {"hidden_dim": 16, "nheads": 2, "dim_feedforward": 32, "num_queries": 8}
    args = argparse.Namespace(enc_layers=1, dec_layers=2, **sizes, **given)
    config = config_from_published_args(args).model
    model = build_detector(config, initialize_backbone=False)
    path = tmp_path / "published.pth"
    content = {"model": ours_to_published(model.state_dict(), config), "args": args, "epoch": 49}
    torch.save(content, path)
    options = ["--checkpoint", str(path), "--data.root", str(shapes)]
    assert evaluate.main([*options, "--data.test-size", "64"]) == 0
    metrics = read(tmp_path / "evaluation", "metrics.json")
    assert [row["name"] for row in metrics["per_class"]] == ["red", "green", "blue"]


@pytest.mark.parametrize("case", ["no checkpoint", "no data", "categories", "damaged", "option"])
def test_mistakes_are_exit_status_2(
    run: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    weights = run / "weights.safetensors"
    other = tmp_path / "other"
    options, reason = {
        "no checkpoint": ([], "--checkpoint"),
        "no data": (["--checkpoint", str(weights)], "no val data"),
        "categories": (["--checkpoint", str(weights), "--data.root", str(other)], "'purple' here"),
        "damaged": (["--checkpoint", str(tmp_path / "half.pt")], "half.pt"),
        "option": (["--checkpoint", str(weights), "--eval.batch-sizes", "1"], "--eval.batch-size"),
    }[case]
    if case == "categories":
        shutil.copytree(shapes, other)
        file = other / "annotations" / "instances_val2017.json"
        file.write_text(file.read_text().replace('"red"', '"purple"'))
    whole = weights.read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit) as caught:
        evaluate.main(options)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert reason in error
    assert "Traceback" not in error
