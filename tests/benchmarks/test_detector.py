"""The benchmarks of a whole detector, at sizes that take a second."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import bench_inference, bench_train_step, comparison
from benchmarks.detector.bench_train_step import Options
from benchmarks.common import PhaseTimer, percentiles
from benchmarks.detector.comparison import (
    TOLERANCES,
    Setup,
    add_speedups,
    check_same_values,
    collect,
    compare,
    too_slow,
    without_tf32,
)
from benchmarks.detector.cases import NUM_CLASSES, Case, random_batch
from benchmarks.detector.flops import detector_flops, peak_flops
from benchmarks.detector.implementations import Implementation, choose_implementations, why_not
from benchmarks.gpu_counts import covered
from benchmarks.detector.inference import OurPass
from benchmarks.detector.published import published_flags
from benchmarks.detector.train import HuggingFaceStep, OurStep
from msdetr.config import config_to_dict
from msdetr.engine.compile import compile_step
from msdetr.presets import PRESETS
from msdetr.published import config_from_published_args

CPU = torch.device("cpu")
TINY_CASE = Case(preset="tiny", batch=1, height=64, width=64)
TINY = ["--presets", "tiny", "--height", "64", "--width", "64", "--device", "cpu"]
NONE = type(None)
ROW_FIELDS = {
    "benchmark": str,
    "preset": str,
    "implementation": str,
    "dtype": str,
    "batch": int,
    "height": int,
    "width": int,
    "images_per_second": float,
    "seconds_p50": float,
    "seconds_p80": float,
    "repetitions": int,
    "speedup_over_published": NONE,
    "speedup_over_eager": float,
    "kernels": NONE,
    "gpu_idle_share": NONE,
    "host_reads": NONE,
    "graph_breaks": NONE,
    "recompiles": NONE,
    "model_flops": int,
    "model_flops_per_second": float,
    "model_flops_utilisation": NONE,
    "peak_memory_mb": float,
    "tuned_process": bool,
    "device": str,
    "torch": str,
    "triton": (str, NONE),
    "commit": str,
    "threads": int,
}
"""Of `eager` on a CPU."""
PHASES = ("forward", "criterion", "backward", "optimizer")
NEEDS_PUBLISHED = pytest.mark.skipif(
    "MSDETR_PUBLISHED" not in os.environ,
    reason="set MSDETR_PUBLISHED to a checkout of the published code",
)
NEEDS_TRANSFORMERS = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


@pytest.fixture
def compiles_without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code runs by its operators: the same graphs in a tenth of the time."""
    quick = functools.partial(compile_step, backend="aot_eager")
    monkeypatch.setattr("msdetr.engine.trainer.compile_step", quick)
    monkeypatch.setattr("benchmarks.inference_passes.compile_step", quick)


def make_setup(implementation: Implementation, case: Case = TINY_CASE) -> Setup:
    return Setup(implementation, case, CPU, None, Path("no/weights"))


def test_tiny_steps_write_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "rows.json"
    arguments = [*TINY, "--batches", "1", "--implementations", "eager"]
    arguments += ["--steps", "2", "--warmup", "1", "--output", str(path)]
    assert bench_train_step.main(arguments) == 0

    (row,) = json.loads(path.read_text())
    phases = {f"{phase}_seconds" for phase in (*PHASES, "forward_backward")}
    assert row.keys() == ROW_FIELDS.keys() | phases
    for name, kind in ROW_FIELDS.items():
        assert isinstance(row[name], kind), name
    assert (row["benchmark"], row["preset"], row["implementation"]) == (
        "train_step",
        "tiny",
        "eager",
    )
    assert (row["batch"], row["height"], row["width"], row["repetitions"]) == (1, 64, 64, 2)
    assert row["forward_backward_seconds"] is None
    assert all(row[f"{phase}_seconds"] > 0 for phase in PHASES)
    # Two steps: their medians are means, which add up, but for what follows the update.
    known = sum(row[f"{phase}_seconds"] for phase in PHASES)
    assert 0.9 * row["seconds_p50"] < known < row["seconds_p50"] <= row["seconds_p80"]
    assert row["images_per_second"] == pytest.approx(1 / row["seconds_p50"])
    assert row["speedup_over_eager"] == 1.0
    assert row["peak_memory_mb"] > 50
    printed = capsys.readouterr().out
    assert "images_per_second" in printed
    assert "gpu_idle_share" not in printed  # a column of Nones


def test_tiny_passes_write_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    arguments = [*TINY, "--batches", "2", "--dtypes", "float32", "--passes", "2"]
    arguments += ["--implementations", "eager", "eager-reference", "--output", str(path)]
    assert bench_inference.main(arguments) == 0

    rows = json.loads(path.read_text())
    assert [row["implementation"] for row in rows] == ["eager", "eager-reference"]
    for row in rows:
        assert row.keys() == ROW_FIELDS.keys()
        for name, kind in ROW_FIELDS.items():
            assert isinstance(row[name], kind), name
        assert row["benchmark"] == "inference"
        assert row["images_per_second"] == pytest.approx(2 / row["seconds_p50"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--presets", "huge"], "known are ms-detr-r50-300"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--warmup", "-1"], "warmup must not be negative"),
        (["--batches", "0"], "batch must be at least 1"),
        (["--published", "no/such/folder"], "has no package `models`"),
        ([*TINY, "--implementations", "compiled-graphs"], "CUDA graphs need a GPU"),
        ([*TINY, "--implementations", "published"], "give its folder by --published"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench_train_step.main(arguments)
    assert exit_.value.code == 2
    assert reason in capsys.readouterr().err.replace("\n", " ")


def test_cases_are_all_combinations() -> None:
    options = Options(
        presets=("tiny", "ms-detr-r50-300"), batches=(1, 2), dtypes=("float32", "bfloat16")
    )
    cases = [(case.preset, case.batch, case.dtype) for case in options.cases]
    assert len(set(cases)) == len(cases) == 8
    assert cases[0] == ("tiny", 1, "float32")


def test_what_a_cpu_measures_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_implementations((), CPU, None) == ["eager", "compiled"]
    assert "without published: give its folder" in capsys.readouterr().out
    # Ours start from its weights.
    assert choose_implementations((), CPU, Path())[0] == "published"


def test_what_has_no_such_case() -> None:
    low = dataclasses.replace(TINY_CASE, dtype="bfloat16")
    assert why_not("published", low) == "it has no mixed precision"
    assert why_not("published", TINY_CASE) is None
    assert why_not("huggingface", TINY_CASE) == "it has no backbone 'convnet'"
    assert why_not("eager", low) is None


def test_batch_is_a_function_of_the_case() -> None:
    case = Case(preset="tiny", batch=3, height=48, width=80, num_targets=5)
    batch = random_batch(case)
    assert batch.images.pixels.shape == (3, 3, 48, 80)
    assert batch.images.pixels.dtype == torch.uint8
    assert batch.targets.count.tolist() == [5, 5, 5]
    assert batch.targets.labels.max() < NUM_CLASSES
    centers, sides = batch.targets.boxes[:, :5].chunk(2, dim=-1)
    assert (sides > 0).all()
    assert (centers - sides / 2 >= -1e-6).all()
    assert (centers + sides / 2 <= 1 + 1e-6).all()
    assert torch.equal(batch.images.pixels, random_batch(case).images.pixels)
    other = random_batch(dataclasses.replace(case, seed=1))
    assert not torch.equal(batch.images.pixels, other.images.pixels)


@pytest.mark.parametrize("name", ["ms-detr-r50-300", "ms-detr-pp-r50-300", "ms-detr-pp-r50-900"])
def test_flags_say_the_whole_recipe(name: str) -> None:
    config = Case(preset=name).config
    read_back = config_to_dict(config_from_published_args(published_flags(config)))
    recipe = config_to_dict(config)
    for part in ("model", "assignment", "loss", "optimizer"):
        assert read_back[part] == recipe[part]


def test_every_preset_is_an_option() -> None:
    for name, preset in PRESETS.items():
        assert Case(preset=name).config.optimizer == preset.config.optimizer


@pytest.mark.usefixtures("compiles_without_inductor")
def test_compiled_step_computes_the_same_and_compiles_once() -> None:
    eager, compiled = (OurStep(make_setup(name)) for name in ("eager", "compiled"))
    found, expected = compiled.values(), eager.values()
    assert len(expected) > 10
    check_same_values(found, expected, tolerance=1e-4)
    compiled.run(1)
    compiled.end_warm_up()
    (step,) = compiled.run(1)
    assert step["total"] == pytest.approx(sum(v for k, v in step.items() if k != "total"))
    assert step.keys() >= set(PHASES)
    facts = compiled.facts(step["total"])
    assert (facts["graph_breaks"], facts["recompiles"]) == (0, 0)


@pytest.mark.usefixtures("compiles_without_inductor")
def test_compiled_pass_computes_the_same() -> None:
    eager, compiled = (OurPass(make_setup(name)) for name in ("eager", "compiled"))
    found, expected = compiled.values(), eager.values()
    assert found is not None
    assert expected is not None
    check_same_values(found, expected, tolerance=1e-4)


def test_steps_train() -> None:
    step = OurStep(make_setup("eager"))
    before = step.values()["total"]
    step.run(12)  # the recipe warms its learning rate up
    assert step.values()["total"] < before


def test_low_precision_is_computed_in() -> None:
    case = dataclasses.replace(TINY_CASE, dtype="bfloat16")
    low, full = OurPass(make_setup("eager", case)), OurPass(make_setup("eager"))
    found, expected = low.values(), full.values()
    assert found is not None
    assert expected is not None
    assert check_same_values(found, expected, tolerance=TOLERANCES["bfloat16"]) > 0


def test_values_that_agree_pass() -> None:
    difference = check_same_values(
        {"total": 2.0, "loss_ce": 0.5}, {"total": 2.0 * (1 + 1e-5), "loss_ce": 0.5}, tolerance=1e-3
    )
    assert difference == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize(
    "expected",
    [
        {"total": 2.0, "loss_ce": 0.5 * (1 + 2e-3)},
        {"total": 2.0, "loss_ce": float("nan")},
        {"total": 2.0},
    ],
)
def test_values_that_differ_are_refused(expected: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="loss_ce"):
        check_same_values({"total": 2.0, "loss_ce": 0.5}, expected, tolerance=1e-3)


def test_values_are_compared_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with without_tf32():
        assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.enabled
    assert torch.backends.cudnn.allow_tf32


def test_no_process_starts_after_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(presets=("tiny",), time_budget=5.0, device="cpu", implementations=("eager",))
    ticks = iter([0.0, 6.0])
    rows = compare(
        options.cases,
        options,
        OurStep,
        benchmark="train_step",
        repetitions=1,
        clock=lambda: next(ticks),
    )
    assert list(rows) == []
    assert "time budget used up before eager" in capsys.readouterr().out


def test_on_a_gpu_one_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measure(setups: Sequence[Setup], *_: object) -> list[dict[str, object]]:
        (setup,) = setups
        if setup.implementation == "compiled-graphs":
            raise RuntimeError("not captured")
        return [{**_row(setup.implementation, setup.case.dtype, 10.0), "seconds_p50": 0.2}]

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(comparison, "resolve_device", lambda _: gpu)
    monkeypatch.setattr(comparison, "_measure", measure)
    options = Options(implementations=("compiled-graphs", "eager"), time_budget=1e3)
    rows = compare(options.cases, options, OurStep, benchmark="train_step", repetitions=1)
    path = tmp_path / "rows.json"
    with pytest.raises(ValueError, match=r"^compiled-graphs of Case.*: not captured$"):
        collect(rows, path)
    assert [row["implementation"] for row in json.loads(path.read_text())] == ["eager"]


def _row(implementation: str, dtype: str, rate: float, batch: int = 2) -> dict[str, object]:
    return {
        "implementation": implementation,
        "preset": "tiny",
        "batch": batch,
        "height": 64,
        "width": 64,
        "dtype": dtype,
        "images_per_second": rate,
    }


def test_speedups() -> None:
    rows = [
        _row("published", "float32", 2.0),
        _row("eager", "float32", 2.5),
        _row("compiled", "float32", 4.0),
        _row("eager", "bfloat16", 5.0),
        _row("compiled", "bfloat16", 7.5),
        _row("compiled", "float32", 1.0, batch=8),
    ]
    add_speedups(rows)
    assert [row["speedup_over_published"] for row in rows] == [1.0, 1.25, 2.0, 2.5, 3.75, None]
    assert [row["speedup_over_eager"] for row in rows] == [0.8, 1.0, 1.6, 1.0, 1.5, None]
    assert too_slow(rows, 2.0) == ["tiny, batch 8, float32: not compared with the published code"]
    assert too_slow(rows[:3], 2.5) == ["tiny, batch 2, float32: 2.00 x, not 2.5 x"]


def test_operations_are_those_of_the_published_tables() -> None:
    # Zhu et al. 2021, table 1: 173 G multiply-adds on images of COCO, with the sampling.
    case = Case(preset="deformable-detr-r50", batch=1, height=800, width=1066)
    forward = detector_flops(case, training=False)
    assert 0.9 < forward / (2 * 173e9) < 1.0
    # Backward takes twice as much, but for the frozen stem.
    assert 2.5 < detector_flops(case, training=True) / forward < 3.0


def test_operations_grow_with_the_batch() -> None:
    two = detector_flops(dataclasses.replace(TINY_CASE, batch=2), training=True)
    assert two == pytest.approx(2 * detector_flops(TINY_CASE, training=True), rel=1e-3)


def test_peaks() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.5e12
    assert peak_flops("NVIDIA H100 PCIe", "float32") == 378e12
    assert peak_flops("AMD EPYC", "float32") is None


def test_spans_that_overlap_count_once() -> None:
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.0)]) == 4.0
    assert covered([]) == 0.0


def test_percentiles() -> None:
    assert percentiles([3.0, 1.0, 2.0]) == (2.0, pytest.approx(2.6))


def test_phases_follow_each_other() -> None:
    timer = PhaseTimer(CPU)
    timer.start()
    timer.lap("first")
    timer.lap("second")
    assert list(timer.seconds()) == ["first", "second"]
    timer.start(wait=False)
    timer.lap("other")
    assert list(timer.seconds()) == ["other"]


@NEEDS_TRANSFORMERS
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
def test_recorded_calls_on_a_gpu(build: type[OurStep] | type[OurPass]) -> None:
    cuda = torch.device("cuda", 0)
    eager, recorded = (
        build(make_setup(name)._replace(device=cuda)) for name in ("eager", "compiled-graphs")
    )
    found, expected = recorded.values(), eager.values()
    assert found is not None
    assert expected is not None
    check_same_values(found, expected, tolerance=TOLERANCES["float32"])
    recorded.run(3)
    recorded.end_warm_up()
    total = recorded.run(3)[-1]["total"]
    facts = recorded.facts(total)
    assert (facts["host_reads"], facts["recompiles"], facts["graph_breaks"]) == (0, 0, 0)
    assert facts["kernels"] > 100
    assert 0.0 <= facts["gpu_idle_share"] < 1.0


@NEEDS_PUBLISHED
@pytest.mark.parametrize("which", ["train_step", "inference"])
def test_against_the_published_code(tmp_path: Path, which: str) -> None:
    path = tmp_path / "rows.json"
    size = ["--batches", "1", "--height", "128", "--width", "160", "--warmup", "0"]
    where = ["--device", "cpu", "--published", os.environ["MSDETR_PUBLISHED"]]
    which = ["--implementations", "eager", "published", "--output", str(path)]
    if which == "train_step":
        assert bench_train_step.main([*size, *where, *which, "--steps", "1"]) == 0
    else:
        assert bench_inference.main([*size, *where, *which, "--passes", "1"]) == 0
    rows = json.loads(path.read_text())
    assert [row["implementation"] for row in rows] == ["published", "eager"]
    assert all(row["speedup_over_published"] > 0 for row in rows)


@NEEDS_PUBLISHED
def test_a_recipe_that_the_published_code_lacks_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        bench_train_step.main([*TINY, "--published", os.environ["MSDETR_PUBLISHED"]])
    assert "model.backbone is 'convnet' in the recipe" in capsys.readouterr().err
