"""pytest plugin: `--ptx sm_90` runs the compiled code of kernels on the CPU, thread by thread.

Triton compiles each launched kernel for that GPU, and `ptxrun`, which lies beside the project, runs
its PTX. It raises an error for races, accesses out of bounds or misaligned, bytes that were never
written, and barriers that not all threads reach. Tests that launch no kernel are deselected.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
_PROPERTY = "compiled kernels"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ptx", "compiled code of kernels, on the CPU")
    group.addoption("--ptx", choices=ARCHITECTURES, help="run kernels as compiled for this GPU")
    group.addoption(
        "--ptx-seed",
        type=lambda text: [int(x) for x in text.split(",")],
        default=[0],
        metavar="N[,N...]",
        help="order of blocks, warps and lanes; tests run once for each",
    )
    group.addoption(
        "--ptx-fuse",
        type=lambda text: [float(x) for x in text.split(",")],
        default=[0.0],
        metavar="SHARE[,SHARE...]",
        help="share of the multiplications and additions that the assembler may contract and that "
        "are contracted; tests run once for each",
    )


def pytest_configure(config: pytest.Config) -> None:
    architecture = config.getoption("--ptx")
    if architecture is None:
        return
    os.environ["TRITON_INTERPRET"] = "0"  # Read when kernels are imported.
    from msdetr.ops import dispatch

    dispatch.kernel_devices = frozenset({"cpu"})
    config.option.impl = "triton"  # of the golden cases
    if not hasattr(config, "workerinput"):
        # Compiled kernels lack the part that only a GPU reads. Keep them from those that have it.
        folder = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
        os.environ["TRITON_CACHE_DIR"] = str(Path(folder) / "ptx")
    if (FOLDER / "ptxrun").is_dir():
        sys.path.append(str(FOLDER))
    config.pluginmanager.register(_Emulation(config, architecture), "ptx-emulation")


def launches_kernels(item: pytest.Item) -> bool:
    """Whether a test runs kernels, and may run their compiled code."""
    names = getattr(item, "fixturenames", ())
    return "kernel_device" in names or (item.get_closest_marker("golden") and "impl" in names)


def dtype_of(types: list[str]) -> str:
    """Type of the data of a kernel, from Triton's types of its parameters.

    That is the type of 16 bits among its floating-point arrays if there is one. (Kernels compute in
    float32, and some arrays are float32 always.)
    """
    found = re.findall(r"\*(bf16|fp16|fp32)", " ".join(types))
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    return names[min(found)] if found else "-"  # alphabetically, as it happens


class _Emulation:
    """What `--ptx` does to a session of tests."""

    def __init__(self, config: pytest.Config, architecture: str) -> None:
        self.architecture = architecture
        self.runs = list(product(config.getoption("--ptx-seed"), config.getoption("--ptx-fuse")))
        self.totals: dict[tuple[str, str], Counter[str]] = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if len(self.runs) > 1:
            ids = [f"seed={seed},fuse={fuse:g}" for seed, fuse in self.runs]
            metafunc.parametrize("compiled_launches", self.runs, ids=ids, indirect=True)

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        deselected = [item for item in items if not launches_kernels(item)]
        items[:] = [item for item in items if launches_kernels(item)]
        config.hook.pytest_deselected(items=deselected)
        if not (FOLDER / "ptxrun").is_dir():
            for item in items:
                item.add_marker(pytest.mark.skip(reason=f"no ptxrun in {FOLDER}"))

    @pytest.fixture(autouse=True)
    def compiled_launches(self, request: pytest.FixtureRequest) -> Iterator[list[Any]]:
        """The launches of the test so far."""
        pytest.importorskip("triton")
        from ptxrun.jit import emulate

        seed, fuse = getattr(request, "param", self.runs[0])
        with emulate(self.architecture, seed=seed, fuse=fuse) as session:
            yield session.launches
        totals: dict[tuple[str, str], Counter[str]] = {}
        for launch in session.launches:
            row = totals.setdefault((launch.kernel, dtype_of(launch.types)), Counter())
            row.update(launches=1, instructions=launch.result.instructions)
        rows = [[*key, dict(row)] for key, row in totals.items()]
        request.node.user_properties.append((_PROPERTY, rows))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Function) -> Iterator[None]:
        yield  # An error is raised at its launch, but the test may catch it.
        launches = item.funcargs["compiled_launches"]
        errors = [str(report) for one in launches for report in one.result.of("error")]
        if errors:
            pytest.fail("\n".join(errors), pytrace=False)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "teardown":
            return
        for name, rows in report.user_properties:
            if name == _PROPERTY:
                for kernel, dtype, row in rows:
                    self.totals.setdefault((kernel, dtype), Counter()).update(row)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.totals:
            return
        terminalreporter.section(f"kernels compiled for {self.architecture}")
        write = terminalreporter.write_line
        line = "{:32} {:10} {:>9} {:>20}"
        write(line.format("kernel", "dtype", "launches", "warp instructions"))
        for (kernel, dtype), row in sorted(self.totals.items()):
            write(line.format(kernel, dtype, row["launches"], f"{row['instructions']:,}"))
        write(f"{len(self.totals)} pairs of kernel and dtype")
