"""What the codegen benchmark reads out of machine code, and what it objects to."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.codegen import (
    CASES,
    POINT_LOOPS,
    TABLE,
    Code,
    Instruction,
    Options,
    Resources,
    access_width,
    check,
    describe,
    find_faults,
    find_loops,
    find_regressions,
    function_at,
    inner_loop,
    is_retried,
    is_wide_fence,
    main,
    parse_resources,
    parse_sass,
    ptx_atomics,
    row_key,
    warps_per_sm,
)
from benchmarks.common import Row

ROOT = Path(__file__).resolve().parents[1]

SOURCE = """\
def _add_sample(rows):
    load(rows)


def forward_kernel(rows):
    for level in range(4):
        _add_sample(rows)
"""
# A loop over levels with the four corners of one point, one of them by 16 bits.
SASS = """\
	.section	.text.forward_kernel,"ax",@progbits
.text.forward_kernel:
	//## File "{path}", line 6
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R0, desc[UR4][R2.64] ;
.L_x_0:
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   LDG.E.64 R8, desc[UR4][R2.64] ;
	//## File "{path}", line 2
        /*0040*/              @!P1 LDG.E.128 R4, desc[UR4][R2.64+0x20] ;
        /*0050*/              @UP2 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0060*/                   LDG.E.LTC128B.128 R4, desc[UR4][R2.64] ;
        /*0070*/                   LDG.E.U16 R9, desc[UR4][R2.64] ;
	//## File "{path}", line 7
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/                   STL [R1], R9 ;
        /*00a0*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*00b0*/                   REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R4 ;
        /*00c0*/                   ATOMG.E.CAS.STRONG.GPU PT, R6, [R2], R6, R7 ;
        /*00d0*/                   MEMBAR.SC.GPU ;
        /*00e0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00f0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0100*/                   EXIT ;
.L_x_2:
        /*0110*/                   BRA `(.L_x_2);
        /*0120*/                   NOP;
.L_x_3:
"""
PTX = """\
	@%p1 red.global.gpu.relaxed.add.v4.f32 [ %rd1 + 0 ], {%f1, %f2, %f3, %f4};
	@%p1 red.global.gpu.relaxed.add.v4.f32 [ %rd2 + 0 ], {%f1, %f2, %f3, %f4};
	atom.global.acq_rel.gpu.cas.b16 %rs1, [%rd3], %rs2, %rs3;
	redux.sync.add.s32 %r1, %r2, %r3;
	ld.shared.b32 %r1, [%r2]; // colored.add.x
"""


@pytest.fixture
def sass(tmp_path: Path) -> str:
    path = tmp_path / "kernel.py"
    path.write_text(SOURCE)
    return SASS.format(path=path)


def test_instructions_know_their_source_and_their_targets() -> None:
    seen = []

    def function_at(path: str, line: int) -> str:
        seen.append((path, line))
        return f"f{line}"

    code = parse_sass(SASS.format(path="/a/b.py"), function_at)
    assert seen == [("/a/b.py", line) for line in (6, 2, 7)]
    assert len(code) == 18  # and no padding
    assert code[0] == Instruction("LDC", "f6")
    assert code[2] == Instruction("BRA", "f6", target=11)
    assert code[7] == Instruction("LDG.E.U16", "f2")
    assert code[10] == Instruction("BRA", "f7", target=2)
    assert code[13].opcode == "MEMBAR.SC.GPU"
    assert code[17] == Instruction("BRA", "f7", target=17)


def test_lines_behind_a_function_are_its_own(tmp_path: Path) -> None:
    path = tmp_path / "kernel.py"
    path.write_text(
        "import triton\n\n\n@jit\ndef a():\n    load()\n\n\n@jit\ndef b():\n    load()\n"
    )
    found = [function_at(str(path), line) for line in range(1, 13)]
    assert found == [None] * 4 + ["a"] * 5 + ["b"] * 3
    assert function_at(str(tmp_path / "gone.py"), 1) is None


def test_loops_end_with_a_branch_back() -> None:
    # The branch out of the loop and the one to itself are none.
    assert find_loops(parse_sass(SASS, lambda path, line: None)) == [range(2, 11)]


def test_inner_loop_is_the_smallest_with_most_accesses() -> None:
    move, load = Instruction("MOV", "_rows"), Instruction("LDG.E.128", "_rows")
    code = [
        move,
        load,
        Instruction("LDG.E.128", None),
        load,
        load,
        Instruction("BRA", None, target=3),
        Instruction("REDG.E.ADD.F32x4", "_rows"),
        Instruction("BRA", None, target=1),
        Instruction("BRA", None, target=0),
    ]
    assert inner_loop(code, "_rows", 4) == range(1, 8)
    code[1] = code[6] = move
    assert inner_loop(code, "_rows", 2) == range(3, 6)


def test_a_loop_that_is_not_there_is_an_error(sass: str) -> None:
    code = parse_sass(sass, lambda path, line: "_add_sample" if line == 2 else None)
    assert inner_loop(code, "_add_sample", 4) == range(2, 11)
    with pytest.raises(ValueError, match="no loop with 5 memory accesses of _add_sample among 1"):
        inner_loop(code, "_add_sample", 5)
    with pytest.raises(ValueError, match="the code has 0"):
        inner_loop(code, "_renamed", 4)
    with pytest.raises(ValueError, match="among 0"):
        inner_loop([Instruction("LDG.E", "_add_sample")] * 8, "_add_sample", 4)


@pytest.mark.parametrize(
    ("opcode", "bits"),
    [
        ("LDG.E", 32),
        ("LDG.E.U8", 8),
        ("LDG.E.S16", 16),
        ("LDG.E.64.CONSTANT", 64),
        ("LDG.E.LTC128B", 32),
        ("STG.E.128", 128),
        ("LDG.E.ENL2.256", 256),
    ],
)
def test_access_width(opcode: str, bits: int) -> None:
    assert access_width(opcode) == bits


def test_spills_are_stack_and_local_memory() -> None:
    usage = " Function f:\n  REG:{} STACK:{} SHARED:1024 LOCAL:{} CONSTANT[0]:656 TEXTURE:0\n"
    assert parse_resources(usage.format(80, 0, 0)) == Resources(80, 0)
    assert parse_resources(usage.format(255, 40, 8)) == Resources(255, 48)
    with pytest.raises(ValueError, match="no resource usage"):
        parse_resources("cuobjdump fatal")


def test_atomics_of_ptx() -> None:
    assert ptx_atomics(PTX) == {
        "red.global.gpu.relaxed.add.v4.f32": 2,
        "atom.global.acq_rel.gpu.cas.b16": 1,
    }


def test_atomics_that_are_retried() -> None:
    assert is_retried("ATOMG.E.CAS.STRONG.GPU")
    assert is_retried("ATOMS.CAST.SPIN")
    assert not is_retried("REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU")
    assert not is_retried("ATOMS.OR")


def test_fences_that_wait_for_the_gpu() -> None:
    for opcode in ("MEMBAR.SC.GPU", "MEMBAR.ALL.GPU", "MEMBAR.SC.SYS", "CCTL.IVALL"):
        assert is_wide_fence(opcode)
    for opcode in ("MEMBAR.ALL.CTA", "FENCE.VIEW.ASYNC.S", "ERRBAR", "CCTL.IV"):
        assert not is_wide_fence(opcode)


@pytest.mark.parametrize(
    ("architecture", "registers", "shared_bytes", "num_warps", "warps"),
    [
        ("sm_90", 32, 0, 4, 64),
        ("sm_90", 32, 0, 1, 32),  # as many programs as there may be
        ("sm_90", 80, 0, 4, 24),
        ("sm_90", 81, 0, 4, 20),  # registers come in eights per thread
        ("sm_90", 255, 0, 4, 8),
        ("sm_90", 255, 0, 1, 8),
        ("sm_90", 64, 100 * 1024, 4, 8),
        ("sm_80", 64, 100 * 1024, 4, 4),
        ("sm_80", 64, 0, 16, 32),
    ],
)
def test_warps_that_fit(
    architecture: Any, registers: int, shared_bytes: int, num_warps: int, warps: int
) -> None:
    found = warps_per_sm(
        architecture, registers=registers, shared_bytes=shared_bytes, num_warps=num_warps
    )
    assert found == warps


def test_tensor_memory_bounds_the_programs() -> None:
    sizes = {"registers": 32, "shared_bytes": 0, "num_warps": 4}
    assert warps_per_sm("sm_100", **sizes, tensor_columns=128) == 16
    assert warps_per_sm("sm_100", **sizes, tensor_columns=512) == 4


CODE = Code(
    kernel="forward_kernel",
    constants={"P": 1, "BLOCK_Q": 64},
    num_warps=4,
    shared_bytes=2048,
    tensor_columns=0,
    ptx=PTX,
    cubin=b"",
)


def test_a_row_describes_the_code(sass: str) -> None:
    row = describe(CODE, sass, Resources(80, 16), "sm_90")
    assert row == {
        "num_warps": 4,
        "registers": 80,
        "spill_bytes": 16,
        "shared_bytes": 2048,
        "warps_per_sm": 24,
        "instructions": 18,
        "loop_instructions": 9,
        "loop_barriers": 1,
        "loop_spills": 1,
        "instructions_per_unit": 4.5,  # of 16 rows and one point per warp: two units
        "row_loads": {"16": 1, "128": 3},
        "scalar_row_loads": 1,
        "loads": {"16": 1, "32": 1, "64": 1, "128": 3},
        "stores": {"128": 1},
        "atomics": {"ATOMG.E.CAS.STRONG.GPU": 1, "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU": 1},
        "ptx_atomics": ptx_atomics(PTX),
        "retried_atomics": 1,
        "fences": {"MEMBAR.SC.GPU": 1},
        "barriers": 2,
    }


def test_a_kernel_without_points_is_counted_in_total(sass: str) -> None:
    row = describe(CODE._replace(kernel="splat_kernel"), sass, Resources(80, 0), "sm_90")
    assert row["instructions"] == 18
    assert row["instructions_per_unit"] is None
    assert row["scalar_row_loads"] is None


def test_functions_that_read_rows_exist() -> None:
    defined = set()
    for path in (ROOT / "msdetr" / "kernels").glob("*.py"):
        tree = ast.parse(path.read_text())
        defined |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for kernel, loop in POINT_LOOPS.items():
        assert {kernel, loop.row_function} <= defined


CLEAN: Row = {
    "kernel": "forward_kernel",
    "case": "encoder",
    "dtype": "bfloat16",
    "architecture": "sm_90",
    "registers": 80,
    "spill_bytes": 0,
    "warps_per_sm": 24,
    "instructions": 1200,
    "instructions_per_unit": 123.0,
    "scalar_row_loads": 0,
    "retried_atomics": 0,
    "fences": {"MEMBAR.ALL.CTA": 2, "FENCE.VIEW.ASYNC.S": 2},
    "triton": "3.9.0",
}


def test_clean_code_has_no_faults() -> None:
    assert find_faults(CLEAN) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes per thread"),
        ({"spill_bytes": 8, "architecture": "sm_80"}, "spills 8 bytes per thread"),
        ({"retried_atomics": 3}, "has 3 compare-and-swap atomics"),
        ({"retried_atomics": 3, "architecture": "sm_100"}, "has 3 compare-and-swap atomics"),
        ({"fences": {"MEMBAR.SC.GPU": 1}}, "has fences of the whole GPU: MEMBAR.SC.GPU"),
        ({"scalar_row_loads": 4}, "reads value by 4 loads of at most 32 bits"),
        ({"instructions_per_unit": 130.5}, "130.5 instructions per unit, target 130"),
        (
            {"instructions_per_unit": 160.5, "kernel": "points_kernel"},
            "160.5 instructions per unit, target 160",
        ),
    ],
)
def test_faults_are_found(changes: Row, fault: str) -> None:
    assert find_faults({**CLEAN, **changes}) == [fault]


@pytest.mark.parametrize(
    "changes",
    [
        # Without such instructions, sm_80 has to.
        {"retried_atomics": 3, "architecture": "sm_80"},
        {"fences": {"MEMBAR.SC.GPU": 1}, "architecture": "sm_80"},
        # The targets are of one type and architecture.
        {"instructions_per_unit": 150.0, "architecture": "sm_100"},
        {"instructions_per_unit": 150.0, "dtype": "float32"},
        {"instructions_per_unit": 150.0, "kernel": "points_kernel"},
        {"instructions_per_unit": 900.0, "kernel": "value_kernel"},
        {"instructions_per_unit": None, "scalar_row_loads": None, "kernel": "splat_kernel"},
    ],
)
def test_what_is_no_fault(changes: Row) -> None:
    assert find_faults({**CLEAN, **changes}) == []


@pytest.mark.parametrize(
    ("changes", "regressions"),
    [
        ({"instructions_per_unit": 126.6}, []),
        (
            {"instructions_per_unit": 126.75},
            ["instructions_per_unit rose from 123.0 to 126.75"],
        ),
        ({"instructions": 2400}, []),
        ({"registers": 96}, []),
        (
            {"registers": 88, "warps_per_sm": 20},
            ["warps_per_sm fell from 24 to 20 (registers: from 80 to 88)"],
        ),
        ({"instructions_per_unit": 100.0, "warps_per_sm": 28}, []),
    ],
)
def test_regressions_are_found(changes: Row, regressions: list[str]) -> None:
    assert find_regressions({**CLEAN, **changes}, CLEAN) == regressions


def test_a_kernel_without_points_regresses_in_total() -> None:
    stored = {**CLEAN, "instructions_per_unit": None}
    assert find_regressions({**stored, "instructions": 1236}, stored) == []
    (regression,) = find_regressions({**stored, "instructions": 1237}, stored)
    assert regression == "instructions rose from 1200 to 1237"


WORSE = {**CLEAN, "spill_bytes": 8, "instructions_per_unit": 128.0}
WHERE = "forward_kernel encoder bfloat16 sm_90: "


@pytest.mark.parametrize(
    ("stored", "problems"),
    [
        ([CLEAN], ["spills 8 bytes per thread", "instructions_per_unit rose from 123.0 to 128.0"]),
        # Rows of another version of Triton, or none: faults alone.
        ([{**CLEAN, "triton": "3.6.0"}], ["spills 8 bytes per thread"]),
        ([], ["spills 8 bytes per thread"]),
        (
            [{**CLEAN, "architecture": "sm_100"}],
            ["spills 8 bytes per thread", "is not stored: run without --check"],
        ),
    ],
)
def test_check_names_the_offender(stored: Sequence[Row], problems: list[str]) -> None:
    assert check([WORSE], stored) == [WHERE + problem for problem in problems]


def test_check_looks_at_every_row() -> None:
    other = {**CLEAN, "case": "decoder-300"}
    assert check([CLEAN, other], [CLEAN, other]) == []
    assert check([CLEAN, {**other, "spill_bytes": 8}], [CLEAN, other]) == [
        "forward_kernel decoder-300 bfloat16 sm_90: spills 8 bytes per thread"
    ]


def test_cases_differ_by_name_or_type() -> None:
    assert len({(case.name, case.dtype) for case in CASES}) == len(CASES)
    assert Options().is_complete
    assert len(Options().selected) == len(CASES)
    assert not Options(architectures=("sm_90",)).is_complete
    part = Options(cases="decoder-300")
    assert not part.is_complete
    assert {CASES[i].dtype for i in part.selected} == {"bfloat16", "float32", "float16"}
    assert {CASES[i].name for i in part.selected} == {"decoder-300"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--workers", "0"], "workers must be at least 1"),
        (["--cases", "resnet"], "none contains 'resnet'"),
        (["--architectures", "sm_70"], "invalid choice"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert reason in " ".join(capsys.readouterr().err.split())


def test_interpreted_kernels_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_stored_rows_are_of_all_cases() -> None:
    rows = json.loads(TABLE.read_text())
    assert len({row_key(row) for row in rows}) == len(rows)
    stored = {(row["case"], row["dtype"], row["architecture"]) for row in rows}
    assert stored == {
        (case.name, case.dtype, architecture)
        for case in CASES
        for architecture in Options().architectures
    }


def test_compiles_stores_and_checks(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    table = tmp_path / "table.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        where = ["--architectures", "sm_90", "--cases", "decoder-300 float16"]
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.codegen", *where, "--table", str(table), *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    other = {**CLEAN, "case": "other"}
    table.write_text(json.dumps([other]))
    done = run()
    assert done.returncode == 0, done.stderr
    assert "forward_kernel" in done.stdout
    kept, row = json.loads(table.read_text())
    assert kept == other
    assert row_key(row) == ("forward_kernel", "decoder-300", "float16", "sm_90")
    assert row["benchmark"] == "codegen"
    assert {"triton", "torch", "commit"} <= row.keys()
    assert 32 <= row["registers"] <= 255
    assert row["num_warps"] == 1
    # Four points, 16 rows of 64 bytes, four corners: 32 loads of 512 bytes per warp. Line tables
    # are wrong about one now and then.
    assert row["row_loads"].keys() == {"128"}
    assert 30 <= row["row_loads"]["128"] <= 33
    assert row["scalar_row_loads"] == 0
    assert row["loop_instructions"] < row["instructions"]
    assert row["instructions_per_unit"] == pytest.approx(row["loop_instructions"] / 8, abs=0.01)
    assert 50 < row["instructions_per_unit"] < 195

    better = {**row, "instructions_per_unit": row["instructions_per_unit"] / 1.1}
    table.write_text(json.dumps([better]))
    done = run("--check")
    assert done.returncode == 1, done.stderr
    problem = "forward_kernel decoder-300 float16 sm_90: instructions_per_unit rose"
    assert problem in done.stdout
    assert json.loads(table.read_text()) == [better]
