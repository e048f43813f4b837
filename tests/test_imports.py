"""The import rules of docs/design/README.md: imports only go down, and only kernels need Triton."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import msdetr

PACKAGE = Path(msdetr.__file__).parent
ROOT = PACKAGE.parent

LAYERS = (
    ("version", "config", "structures", "boxes"),
    ("presets", "published", "weights"),
    ("kernels",),
    ("ops",),
    ("model", "supervision"),
    ("annotations",),
    ("data", "evaluation"),
    ("engine",),
    ("cli",),
    ("train.py", "evaluate.py", "benchmarks"),
)
"""Bottom to top. A part imports from layers below its own; parts of one layer are strangers."""

ONLY = {
    "": {"version"},  # msdetr/__init__.py
    "presets": {"config"},
    "published": {"config"},
    "weights": {"config"},
    "annotations": set(),
    "data": {"config", "structures", "boxes", "annotations"},
}
"""Parts that see less than their layer allows."""

HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}


def part_of(module: str) -> str:
    """`msdetr.ops.dispatch` -> `ops`; the package itself is ''."""
    return [*module.split("."), ""][1]


def imported_modules(source: str, module: str, *, is_package: bool) -> Iterator[str]:
    """Absolute names of what a module imports, anywhere in it. A name imported from a package
    counts as a module of its own, as it may be one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            parents = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield base
            if base == "msdetr":
                yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(source: str, module: str, *, part: str, is_package: bool = False) -> list[str]:
    """What a module imports of this package, and must not."""
    actual = []
    for imported in imported_modules(source, module, is_package=is_package):
        target = part_of(imported)
        if imported.split(".")[0] != "msdetr" or target in ("", part):
            continue
        if target not in HEIGHT:
            allowed = target.startswith("__")  # a name such as msdetr.__version__
        elif part in ONLY:
            allowed = target in ONLY[part]
        else:
            allowed = HEIGHT[target] < HEIGHT[part]
        if not allowed:
            actual.append(f"{module} imports {imported}")
    return actual


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_part_has_a_layer():
    parts = {part_of(module_name(file)) for file in package_files()} - {""}
    assert parts <= HEIGHT.keys()
    assert {"config", "ops", "model", "supervision", "data", "engine", "cli"} <= parts


def test_imports_only_go_down():
    actual = []
    for file in package_files():
        name = module_name(file)
        is_package = file.name == "__init__.py"
        actual += violations(
            file.read_text(encoding="utf-8"), name, part=part_of(name), is_package=is_package
        )
    scripts = [ROOT / "train.py", ROOT / "evaluate.py", *sorted(ROOT.glob("benchmarks/**/*.py"))]
    for file in scripts:
        part = file.relative_to(ROOT).parts[0]
        actual += violations(file.read_text(encoding="utf-8"), file.stem, part=part)
    assert not actual


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("msdetr.model.decoder", "from msdetr.supervision.criterion import Criterion"),
        ("msdetr.supervision.criterion", "from msdetr.model.detector import Detector"),
        ("msdetr.supervision.criterion", "import msdetr.model.detector"),
        ("msdetr.ops.one_to_many", "from msdetr.supervision import matchers"),
        ("msdetr.ops.one_to_many", "from msdetr import supervision"),
        ("msdetr.ops.one_to_many", "from ..supervision import matchers"),
        ("msdetr.ops.one_to_many", "from .. import supervision"),
        ("msdetr.ops.one_to_many", "def f():\n    import msdetr.engine.run"),
        ("msdetr.model.decoder", "if TYPE_CHECKING:\n    from msdetr.data.loader import Batch"),
        ("msdetr.kernels.softmax", "from msdetr.ops.dispatch import resolve_impl"),
        ("msdetr.data.collate", "from msdetr.ops.dispatch import Impl"),
        ("msdetr.data.collate", "from msdetr.evaluation.draw import draw"),
        ("msdetr.evaluation.draw", "from msdetr.data.images import decode_image"),
        ("msdetr.annotations.coco", "from msdetr.config import DataConfig"),
        ("msdetr.annotations.table", "from msdetr.data.images import decode_image"),
        ("msdetr.engine.trainer", "from msdetr.cli.main import main"),
        ("msdetr.config", "from msdetr.presets import PRESETS"),
        ("msdetr.structures", "from msdetr.config import ModelConfig"),
        ("msdetr.weights", "from msdetr.structures import Targets"),
        ("msdetr.model.decoder", "import msdetr.unheard_of"),
    ],
)
def test_upward_imports_are_found(module, source):
    assert len(violations(source, module, part=part_of(module))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("msdetr.model.decoder", "import torch\nfrom torch import model"),
        ("msdetr.model.decoder", "from msdetr.model.attention import MSDeformAttn"),
        ("msdetr.model.decoder", "from .attention import MSDeformAttn"),
        ("msdetr.model.decoder", "from msdetr import boxes, __version__"),
        ("msdetr.engine.trainer", "from msdetr.model.detector import Detector"),
        ("msdetr.supervision.criterion", "from ..ops.one_to_many import one_to_many"),
    ],
)
def test_downward_imports_are_allowed(module, source):
    assert not violations(source, module, part=part_of(module))


def test_only_kernels_and_dispatch_know_triton():
    knowing = set()
    for file in package_files():
        name = module_name(file)
        source = file.read_text(encoding="utf-8")
        imported = imported_modules(source, name, is_package=file.name == "__init__.py")
        if any(module.split(".")[0] == "triton" for module in imported):
            knowing.add(name)
    assert all(part_of(name) == "kernels" or name == "msdetr.ops.dispatch" for name in knowing)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # import fails

import importlib, pkgutil
import msdetr
for module in pkgutil.walk_packages(msdetr.__path__, "msdetr."):
    if not module.name.startswith("msdetr.kernels."):
        importlib.import_module(module.name)

import torch
from msdetr.ops.ms_deform_attn import ms_deform_attn
value, locations = torch.ones(1, 6, 1, 2), torch.full((1, 1, 1, 1, 1, 2), 0.5)
output = ms_deform_attn(value, ((2, 3),), locations, torch.ones(1, 1, 1, 1, 1))
assert output.tolist() == [[[1.0, 1.0]]]
"""


def test_package_works_without_triton():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
