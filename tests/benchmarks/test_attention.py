"""The benchmark of deformable attention: its checks of results, its inputs, and its timers."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import device_time
from benchmarks.attention import bench
from benchmarks.attention import measure as measure_module
from benchmarks.attention.bench import PASSES, TOLERANCES, relative_errors
from benchmarks.attention.cases import (
    DTYPES,
    SHAPES,
    Case,
    Shape,
    attention_weights,
    compulsory_bytes,
    count_touched_rows,
    make_inputs,
    sampling_locations,
)
from benchmarks.attention.implementations import IMPLEMENTATIONS, OURS, external_op
from benchmarks.attention.measure import Options, main, measure, plan
from benchmarks.device_time import percentiles_us, time_calls
from msdetr.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused

CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
TINY = ["--shapes", "tiny", "--batches", "2", "--spreads", "1", "--repetitions", "3"]
TINY += ["--implementations", "reference", "--device", "cpu"]
NUMBERS = itertools.count()
"""Numbers of modules, as a name is imported only once."""


def tiny_case(shape: str = "tiny", dtype: torch.dtype = torch.float32) -> Case:
    return Case(shape, SHAPES[shape], 2, dtype, 1.0)


@pytest.fixture
def write_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write an op that returns an expression, and return its path."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(expression: str) -> str:
        module = f"op_of_a_benchmark_test_{next(NUMBERS)}"
        (tmp_path / f"{module}.py").write_text(
            "from msdetr.ops.ms_deform_attn import ms_deform_attn as op\n\n"
            f"def attend(value, shapes, locations, weights):\n    return {expression}\n"
        )
        return f"{module}:attend"

    return write


def test_reference_writes_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "rows.json"
    assert main([*TINY, "--dtypes", "float32", "--output", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [row["pass"] for row in rows] == list(PASSES)
    for row in rows:
        assert (row["status"], row["queries"]) == ("ok", 16)
        gigabytes = row["compulsory_mb"] * 2**20 / 1e9
        assert row["gigabytes_per_second"] == pytest.approx(gigabytes / (row["p50_us"] / 1e6))
        assert row["roofline_share"] == pytest.approx(
            row["gigabytes_per_second"] / row["copy_gigabytes_per_second"]
        )
    # An error of ours is an error of the run.
    monkeypatch.setattr(measure_module, "OURS", ("reference",))
    monkeypatch.setitem(TOLERANCES, torch.float32, 0.0)
    assert main([*TINY, "--dtypes", "float32"]) == 1


@pytest.mark.parametrize("shape", ["tiny", "tiny-decoder"])
@pytest.mark.parametrize("name", OURS)
def test_kernels_are_right_and_timed(name: str, shape: str) -> None:
    if DEVICE.type == "cpu" and IMPLEMENTATIONS[name].unavailable(CPU):
        pytest.skip("needs Triton's interpreter")
    options = Options(
        shapes=(shape,),
        batches=(1,),
        dtypes=("bfloat16",),
        spreads=(1.0,),
        implementations=(name,),
    )
    (rows,) = measure(options, timer=lambda calls: [1.0, 2.0, 3.0])
    assert [(row["status"], row["p50_us"]) for row in rows] == [("ok", 2e6)] * 3


@pytest.mark.parametrize(
    ("expression", "status"),
    [
        ("op(value, shapes, locations, weights)", "ok"),
        ("op(value, shapes, locations, weights) * 1.1", "wrong: output is off by 1.0e-01"),
        ("op(value.detach(), shapes, locations, weights)", "failed: RuntimeError"),
        ("op(value, shapes, locations, weights) * float('nan')", "wrong: output is off by nan"),
        ("op(value, shapes, locations, weights)[:, 1:]", "failed: "),
        ("1 / 0", "failed: ZeroDivisionError: division by zero"),
    ],
)
def test_a_wrong_op_is_reported_and_not_timed(
    expression: str, status: str, write_op: Callable[[str], str], tmp_path: Path
) -> None:
    path, output = write_op(expression), tmp_path / "rows.json"
    assert main([*TINY, "--dtypes", "bfloat16", "--ops", path, "--output", str(output)]) == 0
    assert "NaN" not in output.read_text()
    rows = [row for row in json.loads(output.read_text()) if row["implementation"] == path]
    assert len(rows) == (3 if status == "ok" else 1)
    for row in rows:
        assert row["status"].startswith(status)
        assert (row["p50_us"] is None) == (status != "ok")


def test_an_implementation_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = dataclasses.replace(IMPLEMENTATIONS["reference"], has_backward=False)
    monkeypatch.setitem(IMPLEMENTATIONS, "reference", forward)
    options = Options(
        shapes=("tiny",),
        batches=(2,),
        spreads=(0.0,),
        dtypes=("float32",),
        implementations=("reference",),
        device="cpu",
    )
    ((row,),) = measure(options, timer=lambda calls: [1.0, 2.0, 3.0])
    assert (row["pass"], row["status"], row["value_error"]) == ("forward", "ok", None)
    assert row["output_error"] < TOLERANCES[torch.float32]


def test_a_broken_process_does_not_stop_the_others(write_op: Callable[[str], str]) -> None:
    ends = external_op(write_op("__import__('os')._exit(1)"))
    reference = IMPLEMENTATIONS["reference"]
    with contextlib.closing(bench.BenchApart(CPU, 2)) as apart:
        rows = [apart.rows(tiny_case(), each) for each in (ends, reference, ends, reference)]
    statuses = [[row["status"] for row in each] for each in rows]
    assert statuses == [["failed: its process ended"], ["ok"] * 3, [], ["ok"] * 3]
    assert rows[0][0].keys() == rows[1][0].keys()


def test_a_lost_device_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_bench", bench.Bench(CPU, lambda calls: [1.0]), raising=False)
    rows, works = bench._rows_of_bench(tiny_case(), "reference")
    assert works
    assert len(rows) == 3

    def lost(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(bench._bench, "rows", lambda *_: [{"status": "failed"}])
    monkeypatch.setattr(torch, "ones", lost)
    assert bench._rows_of_bench(tiny_case(), "reference") == ([{"status": "failed"}], False)


def test_a_wrong_gradient_is_found(write_op: Callable[[str], str]) -> None:
    doubled = "op(2 * value - value.detach(), shapes, locations, weights)"
    implementation = external_op(write_op(doubled))
    errors = relative_errors(tiny_case(), implementation, implementation.build(), CPU)
    assert errors["output"] < 1e-6
    assert errors["value"] == pytest.approx(1.0, rel=1e-4)
    assert errors["projection"] < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coordinates_of_few_bits_are_wrong(
    dtype: torch.dtype, write_op: Callable[[str], str]
) -> None:
    implementation = external_op(write_op("op(value, shapes, locations.to(value.dtype), weights)"))
    case = Case("decoder-900", SHAPES["decoder-900"], 2, dtype, 1.0)
    errors = relative_errors(case, implementation, implementation.build(), CPU)
    assert errors["output"] > TOLERANCES[dtype]


def test_the_most_interesting_comes_first_and_the_budget_ends_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ("msdetr-fused", "deformops", "reference", "msdetr", "transformers")
    pairs = plan(Options(), [IMPLEMENTATIONS[name] for name in names])
    assert len(set(pairs)) == len(pairs) == 3 * 2 * 3 * 4 * 5
    first = pairs[: 3 * 2 * 3]
    assert {implementation.name for _, implementation in first} == set(names[:3])
    assert {(case.dtype, case.spread) for case, _ in first} == {(torch.bfloat16, 0.0)}

    options = Options(
        shapes=("tiny",),
        batches=(1,),
        spreads=(0.0,),
        implementations=("reference",),
        time_budget=10.0,
        device="cpu",
    )
    times = iter([0.0, 0.0, 10.0, 10.5])
    rows = measure(options, timer=lambda calls: [1.0], clock=lambda: next(times))
    assert [new[0]["dtype"] for new in rows] == ["bfloat16", "float32"]
    assert "1 of 3 left out" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", ["tiny", "tiny-decoder"])
def test_inputs_are_the_same_for_both_ops(shape: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(tiny_case(shape, dtype), CPU)
    value = inputs.value.double()
    fused = ms_deform_attn_fused(
        value, inputs.levels, inputs.projection, inputs.reference_points, impl="reference"
    )
    locations, weights = sampling_locations(inputs), attention_weights(inputs)
    assert locations.dtype == weights.dtype == torch.float32
    standard = ms_deform_attn(value, inputs.levels, locations, weights, impl="reference")
    torch.testing.assert_close(standard, fused, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_samples_avoid_pixel_centers(dtype: torch.dtype) -> None:
    shape = Shape(((20, 30), (10, 15), (5, 8)), None, ((20, 30),))
    inputs = make_inputs(Case("encoder", shape, 2, dtype, 2.0), CPU)
    position = sampling_locations(inputs).double() * inputs.table.sizes[:, None] - 0.5
    distance = (position - position.round()).abs()
    # A few per cent of the drawn bfloat16 offsets hit centres.
    assert (distance < 1 / 128).double().mean() < 1e-4


@pytest.mark.parametrize("queries", [None, 2])
def test_touched_rows_are_those_with_a_gradient(queries: int | None) -> None:
    # With two queries, most rows are untouched, also next to the borders.
    shape = Shape(((6, 9), (3, 5)), queries, ((6, 9),), num_heads=2, head_dim=1)
    for seed in range(8):
        inputs = make_inputs(Case("any", shape, 2, torch.float32, 2.0), CPU, seed=seed)
        value = torch.zeros_like(inputs.value).requires_grad_()
        output = ms_deform_attn(
            value, inputs.levels, sampling_locations(inputs), attention_weights(inputs)
        )
        (gradient,) = torch.autograd.grad(output.sum(), value)
        assert count_touched_rows(inputs) == int((gradient > 0).sum()) > 0


def test_compulsory_bytes() -> None:
    inputs = make_inputs(tiny_case("tiny-decoder", torch.bfloat16), CPU)
    # 2 images of 16 tokens and 3 queries; 1 head of 16 channels; 2 levels, 4 points.
    read = count_touched_rows(inputs) * 16 * 2
    projection, reference, output = 2 * 3 * 24 * 2, 2 * 3 * 2 * 4 * 4, 2 * 3 * 16 * 2
    forward = read + projection + reference + output
    backward = forward + 2 * 16 * 16 * 2 + projection
    assert compulsory_bytes(inputs) == {
        "forward": forward,
        "backward": backward,
        "forward+backward": forward + backward,
    }


def test_peers_agree_where_installed() -> None:
    available = [
        IMPLEMENTATIONS[name]
        for name in ("deformops", "transformers")
        if IMPLEMENTATIONS[name].unavailable(DEVICE) is None
    ]
    for peer in available:
        errors = relative_errors(tiny_case(), peer, peer.build(), DEVICE)
        assert max(errors.values()) < TOLERANCES[torch.float32]
    if not available:
        pytest.skip("neither deformops nor transformers can run here")


def test_a_call_that_waits_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch does not recover from a capture that fails."""
    modes = ["default"]

    def reads_the_device() -> None:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(device_time, "_capture", lambda *_, **__: pytest.fail("it was captured"))
    with pytest.raises(RuntimeError, match="synchronizing"):
        device_time.graph_seconds([reads_the_device], replays=2)
    assert modes == ["default", "error", "default"]


def copies(num: int, megabytes: int = 64) -> list[Callable[[], Tensor]]:
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=DEVICE)
    targets = [torch.empty_like(source) for _ in range(num)]
    return [lambda target=target: target.copy_(source) for target in targets]


@pytest.mark.gpu
def test_gpu_timers_agree() -> None:
    with device_time.work_on(DEVICE):
        graph = percentiles_us(device_time.graph_seconds(copies(4), replays=10))["p50_us"]
        twice = [lambda call=call: (call(), call()) for call in copies(4)]
        double = percentiles_us(device_time.graph_seconds(twice, replays=10))["p50_us"]
        host = device_time.host_seconds(copies(4)) * 1e6
        bandwidth = device_time.copy_bytes_per_second(
            DEVICE, lambda calls: time_calls(calls, DEVICE)
        )
    assert double == pytest.approx(2 * graph, rel=0.3)
    assert 0.5 < host < 500
    assert 2 * 64 * 2**20 / (graph / 1e6) == pytest.approx(bandwidth, rel=0.6)


@pytest.mark.gpu
def test_a_failed_capture_leaves_a_device_that_works() -> None:
    x = torch.ones(2**22, device=DEVICE)
    with device_time.work_on(DEVICE):
        with pytest.raises(RuntimeError, match="synchroniz"):
            time_calls([lambda: x.sum().item()], DEVICE)
        assert torch.rand(10, device=DEVICE).isfinite().all()
        assert time_calls([lambda: x.sum()], DEVICE)
    peak = device_time.peak_bytes(lambda: (x + 1) * 2, DEVICE)
    assert peak == pytest.approx(2 * x.numel() * 4, rel=0.01)


@pytest.mark.gpu
def test_benchmark_on_a_gpu() -> None:
    options = Options(
        shapes=("tiny", "tiny-decoder"),
        batches=(2,),
        dtypes=("bfloat16",),
        spreads=(1.0,),
        implementations=(*OURS, "reference"),
        repetitions=3,
    )
    rows = [row for new in measure(options) for row in new]
    assert len(rows) == 2 * 3 * 3
    for row in rows:
        assert row["status"] == "ok", row
        assert row["host_us"] > 0
        assert row["peak_memory_mb"] > 0
