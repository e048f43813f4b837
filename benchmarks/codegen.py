"""Machine code of the Triton kernels, looked at without a GPU: `python -m benchmarks.codegen`.

The project's own launchers run on tensors without storage, in front of a driver that stands in for
a GPU: what is compiled is what they would launch there, with the constants that they choose. The
code is then disassembled, and a row says what it costs.

Of a kernel that visits points in a loop, instructions are counted per unit: one sampling point of
eight (query, head) rows, per warp. The best published kernels (deformops) take 195 of them forward
and 390 backward, in bfloat16 on sm_90.

A run stores its rows in `benchmarks/results/codegen.json`. With `--check` it stores nothing: it
fails if code spills, has atomics that retry or fences that wait for the GPU, reads `value` in
small pieces, misses a target, or has become worse than the stored rows.
"""

from __future__ import annotations

import ast
import bisect
import contextlib
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from tqdm import tqdm

from benchmarks.common import Row, environment, print_table, write_rows
from benchmarks.ms_deform_attn_cases import SHAPES
from msdetr.cli.options import parse_options, user_errors

TABLE = Path(__file__).with_name("results") / "codegen.json"
TOLERANCE = 1.03
"""Instructions that a kernel may have, relative to the stored row."""
ROWS_PER_UNIT = 8

Architecture = Literal["sm_80", "sm_90", "sm_100"]
ARCHITECTURES: tuple[Architecture, ...] = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A use of kernels. Add those of other kernels to `CASES`."""

    name: str
    dtype: str
    """Name of the type that the use computes with."""
    launch: Callable[[], None]
    """Calls launchers, with tensors on the device "meta"."""


@dataclass(frozen=True, kw_only=True)
class PointLoop:
    """How to read a kernel whose inner loop visits P points of BLOCK_Q rows at a time."""

    row_function: str
    """The device function that reads rows of `value`, or adds to rows of its gradient."""
    target: float | None = None
    """Most instructions per unit, in bfloat16 on sm_90."""


POINT_LOOPS = {
    "forward_kernel": PointLoop(row_function="_add_sample", target=130.0),
    "points_kernel": PointLoop(row_function="_dot_with_corner", target=160.0),
    "value_kernel": PointLoop(row_function="_add_to_corner"),
}
"""By kernel. Of others, instructions are counted in total."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compile the kernels for some architectures, and describe their code."""

    check: bool = False
    """Compare with the stored rows instead of storing; status 1 if anything is wrong."""
    architectures: tuple[Architecture, ...] = ARCHITECTURES
    """Compile for these."""
    cases: str = ""
    """Compile the cases whose name and dtype contain this text."""
    table: Path = TABLE
    """JSON file of the stored rows."""
    workers: int = 2
    """Processes that compile."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if not self.architectures:
            raise ValueError(f"architectures: none; known are {', '.join(ARCHITECTURES)}")
        if not self.selected:
            known = ", ".join(map(_case_title, CASES))
            raise ValueError(f"cases: none contains {self.cases!r}; known are {known}")

    @property
    def selected(self) -> list[int]:
        """Positions in `CASES`."""
        return [i for i, case in enumerate(CASES) if self.cases in _case_title(case)]

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left out."""
        return len(self.selected) == len(CASES) and set(self.architectures) == set(ARCHITECTURES)


def _case_title(case: Case) -> str:
    return f"{case.name} {case.dtype}"


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """Arguments of deformable attention."""

    shape: str
    """Name in `SHAPES`."""
    dtype: torch.dtype
    batch: int = 2
    reference_dim: int
    """Coordinates of a reference point; 0: the standard op, with float32 locations and weights."""
    need_reference: bool = False
    """Whether reference points have a gradient."""
    deterministic: bool = False
    launchers: tuple[str, ...] = ("forward", "points", "value")


def launch_attention(call: AttentionCall) -> None:
    """Launch the kernels of deformable attention, forward and backward."""
    from msdetr.kernels import ms_deform_attn as kernels

    shape = SHAPES[call.shape]
    num_levels, num_points = len(shape.levels), shape.num_points
    samples = shape.num_heads * num_levels * num_points
    rows = (call.batch, shape.num_tokens if shape.num_queries is None else shape.num_queries)
    empty = functools.partial(torch.empty, device="meta")
    value = empty(call.batch, shape.num_tokens, shape.num_heads, shape.head_dim, dtype=call.dtype)
    if call.reference_dim:
        # Offsets and logits are slices of one projection, and so are their gradients.
        projection = empty(*rows, 3 * samples, dtype=call.dtype)
        offsets, logits = projection.split((2 * samples, samples), dim=2)
        reference = empty(*rows, num_levels, call.reference_dim)
        points = kernels.Points(offsets, logits, reference, num_points)
        valid_sizes = empty(call.batch, num_levels, 2, dtype=torch.int64)
    else:
        locations, weights = empty(*rows, 2 * samples), empty(*rows, samples)
        points = kernels.Points(locations, weights, None, num_points)
        valid_sizes = None
    if "forward" in call.launchers:
        kernels.forward(value, shape.levels, points, valid_sizes)
    backward = (
        empty(*rows, shape.num_heads * shape.head_dim, dtype=call.dtype),
        value,
        shape.levels,
        points,
        valid_sizes,
    )
    if "points" in call.launchers:
        # What is written to has the strides of what is read.
        gradients = (points.points, points.weights)
        kernels.backward_points(*backward, *gradients, need_reference=call.need_reference)
    if "value" in call.launchers:
        kernels.backward_value(*backward, deterministic=call.deterministic)


def _attention_case(name: str, dtype: str, **call: Any) -> Case:
    arguments = AttentionCall(dtype=getattr(torch, dtype), **call)
    return Case(name=name, dtype=dtype, launch=functools.partial(launch_attention, arguments))


def _attention_cases() -> Iterator[Case]:
    encoder = {"shape": "encoder", "reference_dim": 2}
    decoder = {"shape": "decoder-300", "reference_dim": 4}
    standard = {"shape": "encoder", "reference_dim": 0}
    for dtype in ("bfloat16", "float32"):
        # The longest to compile come first.
        yield _attention_case("encoder", dtype, **encoder)
        yield _attention_case(
            "encoder-deterministic", dtype, **encoder, deterministic=True, launchers=("value",)
        )
        yield _attention_case("decoder-300", dtype, **decoder)
        yield _attention_case("decoder-900", dtype, shape="decoder-900", batch=16, reference_dim=4)
        # Its reference points are learned.
        yield _attention_case(
            "decoder-one-stage",
            dtype,
            shape="decoder-300",
            reference_dim=2,
            need_reference=True,
            launchers=("points",),
        )
        yield _attention_case("standard-op", dtype, **standard)
    for name, call in (("encoder", encoder), ("decoder-300", decoder), ("standard-op", standard)):
        yield _attention_case(name, "float16", **call, launchers=("forward",))


def launch_assignment(layers: int, queries: int, slots: int, dtype: torch.dtype) -> None:
    """Assignment of decoder layers, both kinds; of one layer, the encoder's, one-to-one alone."""
    from msdetr.kernels import linear_assignment, matching_cost, one_to_many

    batch = 2

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    predictions = (
        empty(layers, batch, queries, 91, dtype=dtype),
        empty(layers, batch, queries, 4),
    )
    labels, boxes = empty(batch, slots, dtype=torch.int64), empty(batch, slots, 4)
    count = empty(batch, dtype=torch.int64)
    is_encoder = layers == 1
    match_labels = None if is_encoder else labels
    cost = matching_cost.matching_cost(
        *predictions,
        match_labels,
        boxes,
        count,
        cost_class=0.0 if is_encoder else 2.0,
        cost_bbox=5.0,
        cost_giou=2.0,
        alpha=0.25,
        worst=1e6,
    )
    linear_assignment.linear_assignment(cost.transpose(2, 3), count, match_labels)
    if is_encoder:
        return
    one_to_many.one_to_many(
        *predictions,
        labels,
        boxes,
        count,
        empty(layers, batch, queries),
        k=6,
        threshold=0.4,
        limit=queries // 4,
        cost_box=0.7,
        cost_class=0.3,
        worst=-1.0,
    )


def launch_focal_loss(queries: int, dtype: torch.dtype) -> None:
    """Forward and backward of six layers."""
    from msdetr.kernels import focal_loss

    logits = torch.empty(6, 2, queries, 91, dtype=dtype, device="meta")
    target_class = torch.empty(6, 2, queries, dtype=torch.int64, device="meta")
    grad = torch.empty(6, dtype=torch.float32, device="meta")
    focal_loss.forward(logits, target_class, 0.25, 2.0)
    focal_loss.backward(grad, logits, target_class, 0.25, 2.0)


def _training_cases() -> Iterator[Case]:
    assignments = (
        ("assignment-300", 6, 300, 20),
        ("assignment-900", 6, 900, 100),
        ("assignment-crowd", 6, 300, 512),  # more targets than queries
        ("assignment-encoder", 1, 22223, 100),
    )
    for name, layers, queries, slots in assignments:
        launch = functools.partial(launch_assignment, layers, queries, slots, torch.bfloat16)
        yield Case(name=name, dtype="bfloat16", launch=launch)
    for dtype in ("bfloat16", "float32"):
        focal = functools.partial(launch_focal_loss, 300, getattr(torch, dtype))
        yield Case(name="focal-loss", dtype=dtype, launch=focal)


CASES: tuple[Case, ...] = (*_attention_cases(), *_training_cases())


# From a case to code.


class Code(NamedTuple):
    """A compiled kernel."""

    kernel: str
    constants: Mapping[str, Any]
    """Keyword arguments of the launch."""
    num_warps: int
    shared_bytes: int
    tensor_columns: int
    """Of tensor memory (sm_100)."""
    ptx: str
    cubin: bytes


class _OfflineDriver:
    """What Triton asks of a GPU's driver before it compiles."""

    def __init__(self, architecture: Architecture) -> None:
        self._capability = int(architecture.removeprefix("sm_"))

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps what it compiled by device.

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)


def compile_case(case: Case, architecture: Architecture) -> list[Code]:
    """Code of the kernels that a case launches, in order.

    Replaces Triton's driver: for a process that does nothing else.
    """
    from triton import knobs
    from triton.runtime import JITFunction, driver

    from msdetr.kernels import ms_deform_attn as launchers
    from msdetr.kernels import ms_deform_attn_configs as configs

    codes = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        if "enable_fp_fusion" not in constants:
            raise ValueError(f"{kernel.__name__}: enable_fp_fusion is left to Triton's default")
        code = run(kernel, *args, grid=grid, warmup=True, **constants)
        codes.append(
            Code(
                kernel=kernel.__name__,
                constants=constants,
                num_warps=code.metadata.num_warps,
                shared_bytes=code.metadata.shared,
                tensor_columns=getattr(code.metadata, "tmem_size", 0),
                ptx=code.asm["ptx"],
                cubin=code.asm["cubin"],
            )
        )

    driver.set_active(_OfflineDriver(architecture))
    knobs.compilation.disable_line_info = False  # It says which function reads what.
    # What was decided for another architecture.
    configs.forget()
    launchers.plan_direct.cache_clear()
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(configs, "architecture", return_value=architecture),
    ):
        case.launch()
    return codes


class Instruction(NamedTuple):
    """A machine instruction."""

    opcode: str
    function: str | None
    """The Python function that it comes from."""
    target: int | None = None
    """Position of the instruction that it branches to."""

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_LABEL = re.compile(r"^(\.L\w+):")
_BRANCH = re.compile(r"`\((\.L\w+)\)")
_SOURCE = re.compile(r'//## File "([^"]+)", line (\d+)')


def parse_sass(text: str, function_at: Callable[[str, int], str | None]) -> tuple[Instruction, ...]:
    """Instructions of a kernel, in order and without padding, from the text of `nvdisasm -g -c`.

    Args:
        text: the disassembly.
        function_at: the function of a file (path) that holds a line.
    """
    function: str | None = None
    labels: dict[str, int] = {}
    found: list[tuple[str, str | None, str | None]] = []
    for line in text.splitlines():
        if source := _SOURCE.search(line):
            function = function_at(source[1], int(source[2]))
        elif label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif (instruction := _INSTRUCTION.search(line)) and instruction[1] != "NOP":
            opcode, operands = instruction.groups()
            branch = _BRANCH.search(operands) if opcode.startswith("BRA") else None
            found.append((opcode, function, branch and branch[1]))
    return tuple(
        Instruction(opcode, function, labels[label] if label else None)
        for opcode, function, label in found
    )


@functools.cache
def _functions_of(path: str) -> tuple[tuple[int, str], ...]:
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except OSError:
        return ()
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return tuple(sorted((node.lineno, node.name) for node in functions))


def function_at(path: str, line: int) -> str | None:
    """The last function of a Python file that begins before a line, or there.

    A load is several lines of inline assembly, which LLVM numbers on from the line of the load: the
    last of them can lie behind the function.
    """
    functions = _functions_of(path)
    following = bisect.bisect_left(functions, (line + 1, ""))
    return functions[following - 1][1] if following else None


class Resources(NamedTuple):
    """What a program of a kernel occupies."""

    registers: int
    """Per thread."""
    spill_bytes: int
    """Per thread, in local memory."""


def parse_resources(text: str) -> Resources:
    """Resources of a kernel, from the text of `cuobjdump -res-usage`."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"no resource usage in {text!r}")
    registers, stack, local = map(int, found.groups())
    return Resources(registers, stack + local)


def access_width(opcode: str) -> int:
    """Bits that one thread loads or stores."""
    found = re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", opcode)
    return int(found[1]) if found else 32


def ptx_atomics(ptx: str) -> dict[str, int]:
    """How often each atomic instruction is in PTX text."""
    return dict(Counter(re.findall(r"(?<![\w.$%])((?:red|atom)\.[\w.:]+)", ptx)))


_LOADS = ("LDG", "LDGSTS")
_ATOMICS = ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDS", "UTMAREDG", "UBLKRED")
_FENCES = ("MEMBAR", "FENCE", "ERRBAR", "CCTL")


def find_loops(code: Sequence[Instruction]) -> list[range]:
    """Positions of the instructions of each loop: from the target of a branch back to it."""
    return [
        range(instruction.target, position + 1)
        for position, instruction in enumerate(code)
        if instruction.target is not None and instruction.target < position
    ]


def inner_loop(code: Sequence[Instruction], row_function: str, num_accesses: int) -> range:
    """The smallest loop with the most memory accesses of a function.

    Args:
        code: of a kernel.
        row_function: name of the function.
        num_accesses: least number of them in the loop.

    Raises:
        ValueError: there is no such loop.
    """
    accesses = [
        instruction.function == row_function and instruction.name in (*_LOADS, *_ATOMICS)
        for instruction in code
    ]
    loops = find_loops(code)
    if loops:
        best = max(loops, key=lambda loop: (sum(accesses[i] for i in loop), -len(loop)))
        found = sum(accesses[i] for i in best)
        if found >= num_accesses:
            return best
    raise ValueError(
        f"no loop with {num_accesses} memory accesses of {row_function} "
        f"among {len(loops)}; the code has {sum(accesses)}"
    )


def _widths(code: Iterable[Instruction], names: Sequence[str]) -> dict[str, int]:
    counts = Counter(access_width(i.opcode) for i in code if i.name in names)
    return {str(width): count for width, count in sorted(counts.items())}


def _opcodes(code: Iterable[Instruction], names: Sequence[str]) -> dict[str, int]:
    return dict(sorted(Counter(i.opcode for i in code if i.name in names).items()))


def is_retried(opcode: str) -> bool:
    """Whether an atomic compares and swaps, in a loop."""
    return any(part in ("CAS", "CAST") for part in opcode.split("."))


def is_wide_fence(opcode: str) -> bool:
    """Whether a fence waits for the whole GPU, or drops the whole first-level cache."""
    if opcode.startswith("MEMBAR"):
        return not opcode.endswith(".CTA")
    return opcode.startswith("CCTL.IVALL")


@dataclass(frozen=True)
class _Limits:
    shared_bytes: int
    """Of a multiprocessor."""
    warps: int = 64
    programs: int = 32
    registers: int = 65536
    tensor_columns: int = 512


_LIMITS: dict[Architecture, _Limits] = {
    # CUDA C++ Programming Guide, technical specifications per compute capability.
    "sm_80": _Limits(shared_bytes=164 * 1024),
    "sm_90": _Limits(shared_bytes=228 * 1024),
    "sm_100": _Limits(shared_bytes=228 * 1024),
}


def warps_per_sm(
    architecture: Architecture,
    *,
    registers: int,
    shared_bytes: int,
    num_warps: int,
    tensor_columns: int = 0,
) -> int:
    """Warps of a kernel that fit a multiprocessor at the same time (the occupancy, times 64)."""
    limits = _LIMITS[architecture]
    # Registers are given out by 256 to a warp, whose home is one of four partitions; shared memory
    # by 128 bytes to a program, of which CUDA takes another KiB.
    warp_registers = _round_up(registers * 32, 256)
    warps = 4 * (limits.registers // 4 // warp_registers)
    programs = min(
        limits.programs,
        min(limits.warps, warps) // num_warps,
        limits.shared_bytes // _round_up(shared_bytes + 1024, 128),
    )
    if tensor_columns:
        programs = min(programs, limits.tensor_columns // tensor_columns)
    return programs * num_warps


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def describe(code: Code, sass: str, resources: Resources, architecture: Architecture) -> Row:
    """The measured fields of a row.

    Args:
        code: the kernel.
        sass: its disassembly, as for `parse_sass`.
        resources: what it occupies.
        architecture: that it was compiled for.
    """
    instructions = parse_sass(sass, function_at)
    loop_fields: Row = dict.fromkeys(
        (
            "loop_instructions",
            "loop_barriers",
            "loop_spills",
            "instructions_per_unit",
            "row_loads",
            "scalar_row_loads",
        )
    )
    if code.kernel in POINT_LOOPS:
        row_function = POINT_LOOPS[code.kernel].row_function
        points = code.constants["P"]
        # Most of the four corners of a point: the line table is wrong about an access now and then.
        positions = inner_loop(instructions, row_function, 3 * points)
        loop = instructions[positions.start : positions.stop]
        warp_rows = code.constants["BLOCK_Q"] / code.num_warps
        row_loads = _widths((i for i in instructions if i.function == row_function), _LOADS)
        loop_fields = {
            "loop_instructions": len(loop),
            "loop_barriers": _count_barriers(loop),
            "loop_spills": sum(i.name in ("LDL", "STL") for i in loop),
            "instructions_per_unit": round(len(loop) * ROWS_PER_UNIT / (warp_rows * points), 2),
            "row_loads": row_loads,
            "scalar_row_loads": sum(n for width, n in row_loads.items() if int(width) <= 32),
        }
    atomics = _opcodes(instructions, _ATOMICS)
    return {
        "num_warps": code.num_warps,
        "registers": resources.registers,
        "spill_bytes": resources.spill_bytes,
        "shared_bytes": code.shared_bytes,
        "warps_per_sm": warps_per_sm(
            architecture,
            registers=resources.registers,
            shared_bytes=code.shared_bytes,
            num_warps=code.num_warps,
            tensor_columns=code.tensor_columns,
        ),
        "instructions": len(instructions),
        **loop_fields,
        "loads": _widths(instructions, _LOADS),
        "stores": _widths(instructions, ("STG",)),
        "atomics": atomics,
        "ptx_atomics": ptx_atomics(code.ptx),
        "retried_atomics": sum(count for opcode, count in atomics.items() if is_retried(opcode)),
        "fences": _opcodes(instructions, _FENCES),
        "barriers": _count_barriers(instructions),
    }


def _count_barriers(code: Iterable[Instruction]) -> int:
    return sum(i.opcode.startswith("BAR.SYNC") for i in code)


def disassemble(cubin: bytes) -> tuple[str, Resources]:
    """Disassembly and resources of a kernel, by the tools that come with Triton."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        sass = _output_of(knobs.nvidia.nvdisasm.path, "-g", "-c", str(path))
        usage = _output_of(knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
    return sass, parse_resources(usage)


def _output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: {done.stderr}")
    return done.stdout


def measure_case(position: int, architecture: Architecture) -> list[Row]:
    """Rows of one of `CASES`, a kernel each; what `compile_case` says goes for this too.

    Raises:
        RuntimeError: it does not compile, or its code is not understood.
    """
    case = CASES[position]
    try:
        return [
            {
                "benchmark": "codegen",
                "kernel": code.kernel,
                "case": case.name,
                "dtype": case.dtype,
                "architecture": architecture,
                **describe(code, *disassemble(code.cubin), architecture),
            }
            for code in compile_case(case, architecture)
        ]
    except Exception as error:
        # Also because Triton's own errors do not travel between processes.
        raise RuntimeError(f"{_case_title(case)} for {architecture}: {error}") from error


def measure(options: Options) -> list[Row]:
    """Rows of all that is selected, kernel by kernel."""
    versions = environment(torch.device("cpu"))
    tasks = [(i, architecture) for i in options.selected for architecture in options.architectures]
    found: dict[tuple[int, Architecture], list[Row]] = {}
    context = get_context("spawn")
    with ProcessPoolExecutor(min(options.workers, len(tasks)), mp_context=context) as pool:
        pending = {pool.submit(measure_case, *task): task for task in tasks}
        for future in tqdm(as_completed(pending), total=len(tasks), unit="case", disable=None):
            found[pending[future]] = future.result()
    rows = [
        {**row, **{name: versions[name] for name in ("triton", "torch", "commit")}}
        for task in tasks
        for row in found[task]
    ]
    if len({row_key(row) for row in rows}) < len(rows):
        raise RuntimeError("a case launches a kernel twice: make two cases of it")
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    return sorted(rows, key=lambda row: kernels.index(row["kernel"]))


# Checks.


def row_key(row: Row) -> tuple[str, str, str, str]:
    """What a row is about."""
    return row["kernel"], row["case"], row["dtype"], row["architecture"]


def find_faults(row: Row) -> list[str]:
    """What is wrong with code, whatever it was before."""
    faults = []
    if row["spill_bytes"]:
        faults.append(f"spills {row['spill_bytes']} bytes per thread")
    if row["architecture"] != "sm_80":
        if row["retried_atomics"]:
            faults.append(f"has {row['retried_atomics']} compare-and-swap atomics")
        wide = [opcode for opcode in row["fences"] if is_wide_fence(opcode)]
        if wide:
            faults.append(f"has fences of the whole GPU: {', '.join(wide)}")
    if row["scalar_row_loads"]:
        faults.append(f"reads value by {row['scalar_row_loads']} loads of at most 32 bits")
    target = POINT_LOOPS[row["kernel"]].target if row["kernel"] in POINT_LOOPS else None
    if (
        target is not None
        and (row["architecture"], row["dtype"]) == ("sm_90", "bfloat16")
        and row["instructions_per_unit"] > target
    ):
        faults.append(f"{row['instructions_per_unit']} instructions per unit, target {target:.0f}")
    return faults


def find_regressions(row: Row, stored: Row) -> list[str]:
    """What is worse than in the stored row."""
    worse = []
    name = "instructions" if row["instructions_per_unit"] is None else "instructions_per_unit"
    if row[name] > TOLERANCE * stored[name]:
        worse.append(f"{name} rose from {stored[name]} to {row[name]}")
    if row["warps_per_sm"] < stored["warps_per_sm"]:
        worse.append(
            f"warps_per_sm fell from {stored['warps_per_sm']} to {row['warps_per_sm']} "
            f"(registers: from {stored['registers']} to {row['registers']})"
        )
    return worse


def check(rows: Sequence[Row], stored: Sequence[Row]) -> list[str]:
    """Everything that is wrong, one line each.

    Stored rows count where they are of the same version of Triton.
    """
    before = {row_key(row): row for row in stored}
    versions = {row["triton"] for row in stored}
    lines = []
    for row in rows:
        problems = find_faults(row)
        old = before.get(row_key(row))
        if old is not None and old["triton"] == row["triton"]:
            problems += find_regressions(row, old)
        elif old is None and row["triton"] in versions:
            problems.append("is not stored: run without --check")
        lines += [f"{' '.join(row_key(row))}: {problem}" for problem in problems]
    return lines


_COLUMNS = {
    "kernel": "",
    "case": "",
    "dtype": "",
    "arch": "",
    "regs": "",
    "spill": "",
    "shared": "",
    "warps/SM": "",
    "instr": "",
    "loop": "",
    "/unit": "",
    "loads": "",
    "of value": "",
    "scalar": "",
    "stores": "",
    "BAR": "",
    "BAR in loop": "",
    "spills in loop": "",
}
_SYNC_COLUMNS = {
    "kernel": "",
    "case": "",
    "dtype": "",
    "arch": "",
    "CAS": "",
    "SASS": "",
    "PTX": "",
    "fences": "",
}


def _cells(row: Row) -> Row:
    per_unit = row["instructions_per_unit"]
    shown = {
        "kernel": row["kernel"],
        "case": row["case"],
        "dtype": row["dtype"],
        "arch": row["architecture"],
        "regs": row["registers"],
        "spill": row["spill_bytes"],
        "shared": row["shared_bytes"],
        "warps/SM": row["warps_per_sm"],
        "instr": row["instructions"],
        "loop": row["loop_instructions"],
        "/unit": None if per_unit is None else f"{per_unit:.1f}",
        "loads": _histogram(row["loads"]),
        "stores": _histogram(row["stores"]),
        "of value": _histogram(row["row_loads"] or {}),
        "scalar": row["scalar_row_loads"],
        "BAR": row["barriers"],
        "BAR in loop": row["loop_barriers"],
        "spills in loop": row["loop_spills"],
        "CAS": row["retried_atomics"],
        "SASS": _histogram(row["atomics"]),
        "PTX": _histogram(row["ptx_atomics"]),
        "fences": _histogram(row["fences"]),
    }
    return {name: "-" if cell in (None, "") else cell for name, cell in shown.items()}


def _histogram(counts: Mapping[str, int]) -> str:
    return " ".join(f"{name}:{count}" for name, count in counts.items())


def _print(rows: Sequence[Row]) -> None:
    print("loads and stores: bits per thread, and how many instructions")
    print_table([_cells(row) for row in rows], _COLUMNS)
    synchronising = [row for row in rows if row["atomics"] or row["ptx_atomics"] or row["fences"]]
    if synchronising:
        print()
        print_table([_cells(row) for row in synchronising], _SYNC_COLUMNS)


def _read(path: Path) -> list[Row]:
    with contextlib.suppress(FileNotFoundError):
        rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
        return rows
    return []


def _refuse_interpreter() -> None:
    try:
        from triton import knobs
    except ImportError as error:
        raise ValueError("Triton is not installed: there is nothing to compile with") from error
    if knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set: interpreted kernels have no code; unset it")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, and store or check; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with user_errors():
        options = parse_options(Options, arguments, prog="python -m benchmarks.codegen")
        _refuse_interpreter()
        stored = _read(options.table)
    rows = measure(options)
    _print(rows)
    if not options.check:
        measured = {row_key(row) for row in rows}
        kept = [row for row in stored if row_key(row) not in measured]
        write_rows(options.table, rows if options.is_complete else [*kept, *rows])
        return 0
    problems = check(rows, stored)
    if not any(row["triton"] == rows[0]["triton"] for row in stored):
        print(f"{options.table} has no rows of Triton {rows[0]['triton']}: nothing to compare with")
    print(f"\n{len(rows)} rows, {len(problems)} problems", *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
