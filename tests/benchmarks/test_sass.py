"""Parsing of machine code, and the fields of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import msdetr
from benchmarks.codegen.compiler import Code
from benchmarks.codegen.fields import measured_fields, warps_per_sm
from benchmarks.codegen.point_loops import find_loops, inner_loop
from benchmarks.codegen.sass import (
    Instruction,
    Resources,
    access_width,
    function_at,
    is_retried,
    is_wide_fence,
    parse_resources,
    parse_sass,
)

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
    functions = [function_at(str(path), line) for line in range(1, 13)]
    assert functions == [None] * 4 + ["a"] * 5 + ["b"] * 3
    assert function_at(str(tmp_path / "gone.py"), 1) is None


def test_kernels_of_another_checkout_are_those_of_this_one() -> None:
    """Triton's cache may hold code that names the files of a checkout that is gone."""
    kernels = Path(msdetr.__file__).parent / "kernels"
    lines = (kernels / "scene.py").read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if text.startswith("def load_queries"))
    for path in (kernels / "scene.py", Path("/gone/msdetr/kernels/scene.py")):
        assert function_at(str(path), line + 3) == "load_queries"


def test_inner_loop_is_the_smallest_with_most_accesses() -> None:
    # The branch out of the loop and the one to itself form no loops.
    assert find_loops(parse_sass(SASS, lambda path, line: None)) == [range(2, 11)]
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


def test_access_width() -> None:
    widths = {"LDG.E": 32, "LDG.E.U8": 8, "LDG.E.S16": 16, "LDG.E.64.CONSTANT": 64}
    widths |= {"LDG.E.LTC128B": 32, "STG.E.128": 128, "LDG.E.ENL2.256": 256}
    assert {opcode: access_width(opcode) for opcode in widths} == widths


def test_spills_are_stack_and_local_memory() -> None:
    usage = " Function f:\n  REG:{} STACK:{} SHARED:1024 LOCAL:{} CONSTANT[0]:656 TEXTURE:0\n"
    assert parse_resources(usage.format(80, 0, 0)) == Resources(80, 0)
    assert parse_resources(usage.format(255, 40, 8)) == Resources(255, 48)
    with pytest.raises(ValueError, match="no resource usage"):
        parse_resources("cuobjdump fatal")


def test_atomics_that_retry_and_fences_of_the_gpu() -> None:
    opcodes = {"ATOMG.E.CAS.STRONG.GPU", "ATOMS.CAST.SPIN", "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU"}
    assert set(filter(is_retried, opcodes)) == opcodes - {"REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU"}
    wide = {"MEMBAR.SC.GPU", "MEMBAR.ALL.GPU", "MEMBAR.SC.SYS", "CCTL.IVALL"}
    narrow = {"MEMBAR.ALL.CTA", "FENCE.VIEW.ASYNC.S", "ERRBAR", "CCTL.IV"}
    assert set(filter(is_wide_fence, wide | narrow)) == wide


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
    row = measured_fields(CODE, sass, Resources(80, 16), "sm_90")
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
        "instructions_per_unit": 4.5,  # 16 rows and one point per warp: two units
        "row_loads": {"16": 1, "128": 3},
        "scalar_row_loads": 1,
        "loads": {"16": 1, "32": 1, "64": 1, "128": 3},
        "stores": {"128": 1},
        "atomics": {"ATOMG.E.CAS.STRONG.GPU": 1, "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU": 1},
        "ptx_atomics": {
            "red.global.gpu.relaxed.add.v4.f32": 2,
            "atom.global.acq_rel.gpu.cas.b16": 1,
        },
        "retried_atomics": 1,
        "fences": {"MEMBAR.SC.GPU": 1},
        "barriers": 2,
    }


def test_a_kernel_without_points_is_counted_in_total(sass: str) -> None:
    row = measured_fields(CODE._replace(kernel="splat_kernel"), sass, Resources(80, 0), "sm_90")
    assert row["instructions"] == 18
    assert row["instructions_per_unit"] is None
    assert row["scalar_row_loads"] is None


@pytest.mark.parametrize(
    ("architecture", "registers", "shared_bytes", "num_warps", "tensor_columns", "warps"),
    [
        ("sm_90", 32, 0, 1, 0, 32),  # the maximum number of programs
        ("sm_90", 80, 0, 4, 0, 24),
        ("sm_90", 81, 0, 4, 0, 20),  # registers are allocated in units of eight per thread
        ("sm_90", 64, 100 * 1024, 4, 0, 8),
        ("sm_80", 64, 100 * 1024, 4, 0, 4),
        ("sm_100", 32, 0, 4, 128, 16),
    ],
)
def test_warps_per_multiprocessor(
    architecture: Any,
    registers: int,
    shared_bytes: int,
    num_warps: int,
    tensor_columns: int,
    warps: int,
) -> None:
    assert warps == warps_per_sm(
        architecture,
        registers=registers,
        shared_bytes=shared_bytes,
        num_warps=num_warps,
        tensor_columns=tensor_columns,
    )
