"""Disassembles and parses the machine code of a kernel (SASS), and counts its instructions."""

from __future__ import annotations

import ast
import bisect
import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msdetr

# Names of instructions.
LOADS = ("LDG", "LDGSTS")
"""Reads of global memory."""
STORES = ("STG",)
"""Writes to global memory."""
ATOMICS = ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDS", "UTMAREDG", "UBLKRED")
"""Atomic updates of global or shared memory."""
FENCES = ("MEMBAR", "FENCE", "ERRBAR", "CCTL")
"""Instructions that order memory accesses."""
SPILLS = ("LDL", "STL")
"""Accesses to local memory, which holds values that did not fit in registers."""


class Instruction(NamedTuple):
    """A machine instruction."""

    opcode: str
    function: str | None
    """The Python function it was compiled from."""
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


def parse_sass(text: str, function_of: Callable[[str, int], str | None]) -> tuple[Instruction, ...]:
    """Instructions of a kernel, in order and without padding, from the text of `nvdisasm -g -c`.

    Args:
        text: the disassembly.
        function_of: the function of a file (path) that holds a line, such as `function_at`.
    """
    function: str | None = None
    labels: dict[str, int] = {}
    parsed: list[tuple[str, str | None, str | None]] = []
    for line in text.splitlines():
        if source := _SOURCE.search(line):
            function = function_of(source[1], int(source[2]))
        elif label := _LABEL.match(line):
            labels[label[1]] = len(parsed)
        elif (instruction := _INSTRUCTION.search(line)) and instruction[1] != "NOP":
            opcode, operands = instruction.groups()
            branch = _BRANCH.search(operands) if opcode.startswith("BRA") else None
            parsed.append((opcode, function, branch and branch[1]))
    return tuple(
        Instruction(opcode, function, labels[label] if label else None)
        for opcode, function, label in parsed
    )


@functools.cache
def _functions_of(path: str) -> tuple[tuple[int, str], ...]:
    # Triton's cache finds code by its source, so that it may name the files of another checkout.
    _, kernels, name = path.rpartition("/msdetr/kernels/")
    source = Path(msdetr.__file__).parent / "kernels" / name if kernels else Path(path)
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except OSError:
        return ()
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return tuple(sorted((node.lineno, node.name) for node in functions))


def function_at(path: str, line: int) -> str | None:
    """The last function of a Python file that begins before a line, or there.

    A load is several lines of inline assembly. LLVM numbers them from the line of the load, so the
    last ones can lie behind the end of the function.
    """
    functions = _functions_of(path)
    following = bisect.bisect_left(functions, (line + 1, ""))
    return functions[following - 1][1] if following else None


class Resources(NamedTuple):
    """Registers and spills of a kernel."""

    registers: int
    """Per thread."""
    spill_bytes: int
    """Per thread, in local memory."""


def parse_resources(text: str) -> Resources:
    """Resources of a kernel, from the text of `cuobjdump -res-usage`."""
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if usage is None:
        raise ValueError(f"no resource usage in {text!r}")
    registers, stack, local = map(int, usage.groups())
    return Resources(registers, stack + local)


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


def access_width(opcode: str) -> int:
    """Bits that one thread loads or stores."""
    width = re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", opcode)
    return int(width[1]) if width else 32


def is_retried(opcode: str) -> bool:
    """Whether an atomic is a compare-and-swap, which is retried in a loop."""
    return any(part in ("CAS", "CAST") for part in opcode.split("."))


def is_wide_fence(opcode: str) -> bool:
    """Whether a fence waits for the whole GPU, or invalidates the whole first-level cache."""
    if opcode.startswith("MEMBAR"):
        return not opcode.endswith(".CTA")
    return opcode.startswith("CCTL.IVALL")


def count_opcodes(code: Iterable[Instruction], names: Sequence[str]) -> dict[str, int]:
    """The number of each opcode of these names."""
    return dict(sorted(Counter(i.opcode for i in code if i.name in names).items()))


def count_widths(code: Iterable[Instruction], names: Sequence[str]) -> dict[str, int]:
    """The number of instructions of these names, by bits accessed per thread."""
    counts = Counter(access_width(i.opcode) for i in code if i.name in names)
    return {str(width): count for width, count in sorted(counts.items())}


def count_barriers(code: Iterable[Instruction]) -> int:
    """The number of barriers over all warps of a program."""
    return sum(i.opcode.startswith("BAR.SYNC") for i in code)
