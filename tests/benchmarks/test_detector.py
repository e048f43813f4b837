"""The benchmarks of a whole detector, at sizes that take a second."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import table
from benchmarks.detector import comparison, inference, profile, train
from benchmarks.detector.cases import Case
from benchmarks.detector.comparison import (
    TOLERANCES,
    Setup,
    add_speedups,
    check_same_values,
    collect,
    compare,
    too_slow,
)
from benchmarks.detector.flops import detector_flops, peak_flops
from benchmarks.detector.implementations import Implementation, choose_implementations
from benchmarks.detector.inference import OurPass
from benchmarks.detector.published import published_flags
from benchmarks.detector.train import HuggingFaceStep, Options, OurStep
from benchmarks.launches import covered
from msdetr.config import config_to_dict
from msdetr.engine.compile import compile_step
from msdetr.published import config_from_published_args

CPU = torch.device("cpu")
TINY_CASE = Case(preset="tiny", batch=1, height=64, width=64)
TINY = ["--presets", "tiny", "--height", "64", "--width", "64", "--device", "cpu"]
PHASES = ("forward", "criterion", "backward", "optimizer")
NEEDS_PUBLISHED = pytest.mark.skipif(
    "MSDETR_PUBLISHED" not in os.environ,
    reason="set MSDETR_PUBLISHED to a checkout of the published code",
)


def make_setup(implementation: Implementation, case: Case = TINY_CASE) -> Setup:
    return Setup(implementation, case, CPU, None, Path("no/weights"))


def test_tiny_steps_write_rows(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.json"
    arguments = [*TINY, "--batches", "1", "--implementations", "eager"]
    arguments += ["--steps", "2", "--warmup", "1", "--output", str(path)]
    assert train.main(arguments) == 0
    (row,) = json.loads(path.read_text())
    assert (row["benchmark"], row["preset"], row["repetitions"]) == ("train_step", "tiny", 2)
    assert row["forward_backward_seconds"] is None
    # The medians of two steps are means, which add up, except for the time after the update.
    known = sum(row[f"{phase}_seconds"] for phase in PHASES)
    assert 0.9 * row["seconds_p50"] < known < row["seconds_p50"] <= row["seconds_p80"]
    assert row["images_per_second"] == pytest.approx(1 / row["seconds_p50"])
    assert row["speedup_over_eager"] == 1.0
    assert row["model_flops_per_second"] == row["model_flops"] / row["seconds_p50"]


def test_tiny_passes_write_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    arguments = [*TINY, "--batches", "2", "--dtypes", "float32", "--passes", "2"]
    arguments += ["--implementations", "eager", "eager-reference", "--output", str(path)]
    assert inference.main(arguments) == 0
    rows = json.loads(path.read_text())
    assert [row["implementation"] for row in rows] == ["eager", "eager-reference"]
    for row in rows:
        assert row["benchmark"] == "inference"
        assert row["images_per_second"] == pytest.approx(2 / row["seconds_p50"])
    assert table.main([str(path)]) == 0


def test_a_profile_lists_what_takes_time(tmp_path: Path) -> None:
    path, trace = tmp_path / "rows.json", tmp_path / "trace.json.gz"
    arguments = ["--preset", "tiny", "--height", "64", "--width", "64", "--device", "cpu"]
    arguments += ["--batch", "1", "--warmup", "1", "--steps", "2"]
    assert profile.main([*arguments, "--output", str(path), "--trace", str(trace)]) == 0
    rows = json.loads(path.read_text())
    times = [row["us"] for row in rows]
    assert times == sorted(times, reverse=True)
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    (products,) = (row for row in rows if row["kernel"] == "aten::mm")
    assert products["launches"] > 10
    assert trace.stat().st_size > 1000


def test_the_published_code_runs_first() -> None:
    """Ours load its initial weights."""
    assert choose_implementations((), CPU, None) == ["eager", "compiled"]
    assert choose_implementations((), CPU, Path())[0] == "published"


@pytest.mark.parametrize("name", ["ms-detr-r50-300", "ms-detr-pp-r50-300", "ms-detr-pp-r50-900"])
def test_flags_express_the_whole_recipe(name: str) -> None:
    config = Case(preset=name).config
    read_back = config_to_dict(config_from_published_args(published_flags(config)))
    recipe = config_to_dict(config)
    for section in ("model", "assignment", "loss", "optimizer"):
        assert read_back[section] == recipe[section]


@pytest.mark.parametrize("build", [OurStep, OurPass])
def test_compiled_code_computes_the_same_and_compiles_once(
    build: type[OurStep] | type[OurPass], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same graphs as inductor's, in a tenth of the time.
    quick = functools.partial(compile_step, backend="aot_eager")
    monkeypatch.setattr("msdetr.engine.trainer.compile_step", quick)
    monkeypatch.setattr("benchmarks.detector.inference.compile_step", quick)
    eager, compiled = (build(make_setup(name)) for name in ("eager", "compiled"))
    values = compiled.values()
    assert len(values) >= 10
    check_same_values(values, eager.values(), tolerance=1e-4)
    compiled.run(1)
    compiled.end_warm_up()
    (durations,) = compiled.run(1)
    facts = compiled.facts(durations["total"])
    assert (facts["graph_breaks"], facts["recompiles"]) == (0, 0)


def test_steps_train() -> None:
    step = OurStep(make_setup("eager"))
    before = step.values()["total"]
    step.run(12)  # the recipe warms its learning rate up
    assert step.values()["total"] < before


def test_bfloat16_is_used() -> None:
    case = dataclasses.replace(TINY_CASE, dtype="bfloat16")
    low, full = OurPass(make_setup("eager", case)), OurPass(make_setup("eager"))
    assert check_same_values(low.values(), full.values(), tolerance=TOLERANCES["bfloat16"]) > 0


@pytest.mark.parametrize(
    "expected",
    [
        {"total": 2.0, "loss_ce": 0.5 * (1 + 2e-3)},
        {"total": 2.0, "loss_ce": float("nan")},
        {"total": 2.0},
    ],
)
def test_values_that_differ_are_refused(expected: dict[str, float]) -> None:
    values = {"total": 2.0, "loss_ce": 0.5}
    close = {"total": 2.0 * (1 + 1e-5), "loss_ce": 0.5}
    assert check_same_values(values, close, tolerance=1e-3) == pytest.approx(1e-5, rel=1e-3)
    with pytest.raises(ValueError, match="loss_ce"):
        check_same_values(values, expected, tolerance=1e-3)


def test_on_a_gpu_a_failure_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measure(setups: Sequence[Setup], *_: object) -> list[dict[str, Any]]:
        (setup,) = setups
        if setup.implementation == "compiled-graphs":
            raise RuntimeError("not captured")
        return [{**rate_row(setup.implementation, setup.case.dtype, 10.0), "seconds_p50": 0.2}]

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(comparison, "resolve_device", lambda _: gpu)
    monkeypatch.setattr(comparison, "_measure", measure)
    options = Options(implementations=("compiled-graphs", "eager"), time_budget=1e3)
    rows = compare(options.cases, options, OurStep, benchmark="train_step", repetitions=1)
    path = tmp_path / "rows.json"
    with pytest.raises(ValueError, match=r"^compiled-graphs of Case.*: not captured$"):
        collect(rows, path)
    assert [row["implementation"] for row in json.loads(path.read_text())] == ["eager"]


def rate_row(implementation: str, dtype: str, rate: float, batch: int = 2) -> dict[str, Any]:
    row = {"implementation": implementation, "dtype": dtype, "images_per_second": rate}
    return {**row, "preset": "tiny", "batch": batch, "height": 64, "width": 64}


def test_speedups_and_their_check() -> None:
    rows = [
        rate_row("published", "float32", 2.0),
        rate_row("eager", "float32", 2.5),
        rate_row("compiled", "float32", 4.0),
        rate_row("eager", "bfloat16", 5.0),
        rate_row("compiled", "bfloat16", 7.5),
        rate_row("compiled", "float32", 1.0, batch=8),
    ]
    add_speedups(rows)
    assert [row["speedup_over_published"] for row in rows] == [1.0, 1.25, 2.0, 2.5, 3.75, None]
    assert [row["speedup_over_eager"] for row in rows] == [0.8, 1.0, 1.6, 1.0, 1.5, None]
    assert too_slow(rows, 2.0) == ["tiny, batch 8, float32: not compared with the published code"]
    assert too_slow(rows[:3], 2.5) == ["tiny, batch 2, float32: 2.00 x, not 2.5 x"]


def test_operations_are_those_of_the_published_tables() -> None:
    # Zhu et al. 2021, table 1: 173 G multiply-adds on images of COCO, sampling included.
    case = Case(preset="deformable-detr-r50", batch=1, height=800, width=1066)
    forward = detector_flops(case, training=False)
    assert 0.9 < forward / (2 * 173e9) < 1.0
    # Backward takes twice as much, except for the frozen stem.
    assert 2.5 < detector_flops(case, training=True) / forward < 3.0
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.5e12
    assert peak_flops("NVIDIA H100 PCIe", "float32") == 378e12
    assert peak_flops("AMD EPYC", "float32") is None


def test_overlapping_spans_count_once() -> None:
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.0)]) == 4.0


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
def test_a_step_of_hugging_face() -> None:
    case = Case(preset="deformable-detr-r50-two-stage", batch=1, height=128, width=160)
    step = HuggingFaceStep(make_setup("huggingface", case))
    stages = {
        name.split("stages.")[1][0]
        for name, p in step.model.named_parameters()
        if p.requires_grad and ".backbone." in name
    }
    assert stages == {"1", "2", "3"}
    (durations,) = step.run(1)
    assert durations.keys() >= set(PHASES)


@pytest.mark.gpu
@pytest.mark.parametrize("build", [OurStep, OurPass])
def test_captured_calls_on_a_gpu(build: type[OurStep] | type[OurPass]) -> None:
    cuda = torch.device("cuda", 0)
    eager, captured = (
        build(make_setup(name)._replace(device=cuda)) for name in ("eager", "compiled-graphs")
    )
    check_same_values(captured.values(), eager.values(), tolerance=TOLERANCES["float32"])
    captured.run(3)
    captured.end_warm_up()
    facts = captured.facts(captured.run(3)[-1]["total"])
    assert (facts["host_reads"], facts["recompiles"], facts["graph_breaks"]) == (0, 0, 0)
    assert facts["kernels"] > 100
    assert 0.0 <= facts["gpu_idle_share"] < 1.0


@NEEDS_PUBLISHED
@pytest.mark.parametrize(("main", "calls"), [(train.main, "--steps"), (inference.main, "--passes")])
def test_against_the_published_code(tmp_path: Path, main: Any, calls: str) -> None:
    path = tmp_path / "rows.json"
    arguments = ["--batches", "1", "--height", "128", "--width", "160", "--warmup", "0"]
    arguments += ["--device", "cpu", "--published", os.environ["MSDETR_PUBLISHED"], calls, "1"]
    arguments += ["--implementations", "eager", "published", "--output", str(path)]
    assert main(arguments) == 0
    rows = json.loads(path.read_text())
    assert [row["implementation"] for row in rows] == ["published", "eager"]
    assert all(row["speedup_over_published"] > 0 for row in rows)


@NEEDS_PUBLISHED
def test_a_recipe_that_the_published_code_lacks_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        train.main([*TINY, "--published", os.environ["MSDETR_PUBLISHED"]])
    assert "model.backbone is 'convnet' in the recipe" in capsys.readouterr().err
