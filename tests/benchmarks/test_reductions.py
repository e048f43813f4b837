"""The microbenchmarks of additions to rows and reads of rows, without a GPU's times."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.attention import reductions as bench
from benchmarks.attention.reductions import (
    MAP_WIDTH,
    NUM_HEADS,
    STEPS,
    Case,
    Options,
    launch,
    main,
    make_tensors,
    measure,
    memory_instruction,
    plan,
    row_index,
)
from benchmarks.device_time import Timing

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
CPU = torch.device("cpu")
STRIP = 8 * MAP_WIDTH * NUM_HEADS


@pytest.mark.parametrize("piece_bytes", [32, 64])
def test_reduction_adds_rows(piece_bytes: int) -> None:
    case = Case("reduction", "tile", torch.float32, 64, piece_bytes, 1)
    index, rows, sums = make_tensors(case, DEVICE)
    index = index[:2]
    launch(case, index, rows, sums)
    expected = torch.bincount(index.flatten(), minlength=case.num_rows)
    assert torch.equal(rows, expected[:, None].expand_as(rows).float())


@pytest.mark.parametrize("piece_bytes", [16, 32, 64])
def test_gather_reads_rows(piece_bytes: int) -> None:
    case = Case("gather", "random", torch.bfloat16, 64, piece_bytes, 1)
    index, rows, sums = make_tensors(case, DEVICE)
    index = index[:2]
    rows.copy_(torch.randint(8, rows.shape))
    launch(case, index, rows, sums)
    read = rows[index.long()].float()  # [programs, STEPS, 64, elements]
    pieces = read.unflatten(-1, (-1, piece_bytes // 2))
    assert torch.equal(sums[:2], pieces.sum((1, 3)))


@pytest.mark.parametrize("order", ["tile", "row", "random"])
def test_rows_are_in_range(order: str) -> None:
    index = row_index(order, 2 * STRIP, CPU)
    assert index.shape == (2 * STRIP // 64, STEPS, 64)
    assert index.dtype == torch.int32
    assert 0 <= index.min() < index.max() < 2 * STRIP


@pytest.mark.parametrize("order", ["tile", "row"])
def test_programs_take_every_query_of_a_head_once(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SPREAD", 0.0)
    index = row_index(order, 2 * STRIP, CPU)
    own = index[:, 0]  # the corner at the query itself
    assert torch.equal(own.flatten().sort().values, torch.arange(2 * STRIP, dtype=torch.int32))
    heads = own % NUM_HEADS
    assert torch.equal(heads, (torch.arange(len(own)) % NUM_HEADS)[:, None].expand(-1, 64).int())
    pixel = own // NUM_HEADS
    x, y = pixel % MAP_WIDTH, pixel // MAP_WIDTH
    height = (y.amax(1) - y.amin(1) + 1).tolist()
    if order == "tile":
        assert set(height) == {8}
        assert set((x.amax(1) - x.amin(1) + 1).tolist()) == {8}
    else:
        assert set((pixel.amax(1) - pixel.amin(1) + 1).tolist()) == {64}
        assert max(height) <= 2


def test_samples_surround_their_query() -> None:
    index = row_index("row", 4 * STRIP, CPU).long() // NUM_HEADS
    query = torch.arange(4 * STRIP // NUM_HEADS).view(-1, 1, 64).repeat_interleave(NUM_HEADS, 0)
    distance = index % MAP_WIDTH - query % MAP_WIDTH
    # Offsets of 2 pixels, floored, and the corner beside: a mean of 0 away from the border.
    inner = (query % MAP_WIDTH > 12) & (query % MAP_WIDTH < MAP_WIDTH - 12)
    distance = distance[inner.expand_as(distance)].double()
    assert abs(float(distance.mean())) < 0.05
    assert float(distance.std()) == pytest.approx((4 + 1 / 12 + 1 / 4) ** 0.5, rel=0.05)


def test_plan_has_every_case_once() -> None:
    cases = plan(Options())
    assert len(set(cases)) == len(cases)
    assert [case.footprint_mb for case in cases] == sorted(case.footprint_mb for case in cases)
    reductions = {(c.dtype, c.row_bytes, c.piece_bytes) for c in cases if c.kernel == "reduction"}
    pairs = {(64, 32), (64, 64), (128, 32), (128, 64), (128, 128)}
    assert reductions == {(d, *pair) for d in (torch.bfloat16, torch.float32) for pair in pairs}
    assert {c.piece_bytes for c in cases if c.kernel == "gather"} == {16, 32, 64}
    for case in cases:
        assert case.row_bytes % case.piece_bytes == 0
        assert case.num_rows % STRIP == 0
        assert case.num_rows * case.row_bytes == pytest.approx(case.footprint_mb * 1e6, rel=0.1)


@pytest.mark.parametrize(
    ("kernel", "ptx", "instruction"),
    [
        (
            "reduction",
            "ld.global.b32 {%r1}\n\t@%p1 red.global.gpu.relaxed.add.v4.f32 [%rd1], {",
            "red.global.gpu.relaxed.add.v4.f32",
        ),
        (
            "reduction",
            "atom.global.gpu.relaxed.add.noftz.v8.bf16 {%x}\nred.global.add.f32 [%rd2]",
            "atom.global.gpu.relaxed.add.noftz.v8.bf16",
        ),
        ("gather", "ld.global.b32 {%r1}\nld.global.v4.b32 {%r2}", "ld.global.v4.b32"),
        ("reduction", "ld.global.b32 {%r1}", "none"),
    ],
)
def test_widest_instruction_is_found(kernel: str, ptx: str, instruction: str) -> None:
    assert memory_instruction(kernel, ptx) == instruction


def test_rates_and_time_budget(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = SimpleNamespace(asm={"ptx": "red.global.add.v4.f32 ld.global.v4.b32"})
    monkeypatch.setattr(bench, "launch", lambda *_: compiled)
    times = iter([0.0, 0.0, 1.0, 5.0])
    rows = list(
        measure(
            Options(footprints=(1,), time_budget=2.0),
            CPU,
            lambda calls: Timing("none", [1e-3] * 3),
            clock=lambda: next(times),
        )
    )
    first, second = rows
    assert (first["kernel"], second["kernel"]) == ("gather", "reduction")
    # One strip of rows: 21 tiles of 64 queries, 8 heads.
    visits = 21 * NUM_HEADS * STEPS * 64
    assert second["gigarows_per_second"] == pytest.approx(visits / 1e-3 / 1e9)
    assert second["gigabytes_per_second"] == pytest.approx(64 * visits / 1e-3 / 1e9)
    assert second["instruction"] == "red.global.add.v4.f32"
    assert {"p20_us", "p80_us", "device", "torch", "triton", "commit"} <= second.keys()
    assert "left out" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2
    assert "there is none here" in capsys.readouterr().err


@pytest.mark.gpu
def test_rates_on_a_gpu() -> None:
    options = Options(footprints=(1,), repetitions=3)
    cases = plan(options)
    with bench.work_on(DEVICE):
        for case in (cases[0], cases[1]):
            row = bench.measure_case(case, DEVICE, lambda calls: bench.time_calls(calls, DEVICE))
            assert row["timer"] == "graph"
            assert 1 < row["gigabytes_per_second"] < 1e5
            assert ".v" in row["instruction"]
