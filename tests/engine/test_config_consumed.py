"""Every configuration field is read somewhere in the package: no option is parsed and ignored.

The package's source is searched for accesses `x.field` where `x` is known to be of the field's
class: from annotations of parameters and attributes, and from assignments of such expressions. A
field of the same name in another class therefore does not count.
"""

from __future__ import annotations

import ast
import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

import msdetr
from msdetr import config

PACKAGE = Path(msdetr.__file__).parent
# These define, choose and convert configurations; they do nothing with them.
NOT_CONSUMERS = ("config.py", "presets.py", "published.py")
CONFIG_CLASSES = {
    name: cls for name, cls in vars(config).items() if name.endswith("Config") and name[0] != "_"
}

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class Reader:
    """Finds (class, field) pairs that source code reads."""

    def __init__(self, sources: Iterable[str]) -> None:
        self.trees = [ast.parse(source) for source in sources]
        self.classes = {
            node.name
            for tree in self.trees
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
        } | set(CONFIG_CLASSES)
        self.functions = {
            node.name: self._class_of_annotation(node.returns)
            for tree in self.trees
            for node in ast.walk(tree)
            if isinstance(node, FunctionNode)
        }
        # Class of each attribute, by class.
        self.attributes: dict[str, dict[str, str]] = defaultdict(dict)
        for name, cls in CONFIG_CLASSES.items():
            for field in dataclasses.fields(cls):
                annotation = ast.parse(str(field.type), mode="eval").body
                self._learn(name, field.name, self._class_of_annotation(annotation))
        for _ in range(3):  # Attributes assigned from attributes take a few rounds.
            self.found: set[tuple[str, str]] = set()
            for tree in self.trees:
                self._read_scope(tree, {}, None)

    def _learn(self, owner: str, attribute: str, cls: str | None) -> None:
        if cls is not None:
            self.attributes[owner][attribute] = cls

    def _read_scope(self, scope: ast.AST, outer: dict[str, str], owner: str | None) -> None:
        names = dict(outer)
        if isinstance(scope, FunctionNode):
            arguments = scope.args
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                cls = self._class_of_annotation(argument.annotation)
                names.pop(argument.arg, None)
                if cls is not None:
                    names[argument.arg] = cls
            if owner is not None and arguments.args and arguments.args[0].arg == "self":
                names["self"] = owner
        for node in _in_order(scope):
            if isinstance(node, ast.ClassDef):
                self._read_scope(node, names, node.name)
            elif isinstance(node, FunctionNode):
                self._read_scope(node, names, owner)
            else:
                self._read_node(node, names, owner if isinstance(scope, ast.ClassDef) else None)

    def _read_node(self, node: ast.AST, names: dict[str, str], body_of: str | None) -> None:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            cls = self._class_of(node.value, names)
            if cls in CONFIG_CLASSES:
                self.found.add((cls, node.attr))
        elif isinstance(node, ast.AnnAssign):
            cls = self._class_of_annotation(node.annotation)
            if body_of is not None and isinstance(node.target, ast.Name):
                self._learn(body_of, node.target.id, cls)
            else:
                self._assign(node.target, cls, names)
        elif isinstance(node, ast.Assign):
            target = node.targets[0]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for one, value in zip(target.elts, node.value.elts, strict=False):
                    self._assign(one, self._class_of(value, names), names)
            else:
                self._assign(target, self._class_of(node.value, names), names)

    def _assign(self, target: ast.expr, cls: str | None, names: dict[str, str]) -> None:
        if isinstance(target, ast.Name):
            names.pop(target.id, None)
            if cls is not None:
                names[target.id] = cls
        elif isinstance(target, ast.Attribute):
            owner = self._class_of(target.value, names)
            if owner is not None:
                self._learn(owner, target.attr, cls)

    def _class_of(self, node: ast.expr, names: dict[str, str]) -> str | None:
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._class_of(node.value, names)
            return None if owner is None else self.attributes[owner].get(node.attr)
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in self.classes:
                return function.id
            if isinstance(function, ast.Name) and function.id in self.functions:
                return self.functions[function.id]
            called = (
                function.attr
                if isinstance(function, ast.Attribute)
                else getattr(function, "id", "")
            )
            if called == "replace" and node.args:
                return self._class_of(node.args[0], names)
        return None

    def _class_of_annotation(self, node: ast.expr | None) -> str | None:
        if isinstance(node, ast.BinOp):  # X | None
            return self._class_of_annotation(node.left) or self._class_of_annotation(node.right)
        return node.id if isinstance(node, ast.Name) and node.id in self.classes else None


def _in_order(scope: ast.AST) -> Iterable[ast.AST]:
    """Nodes of a scope in source order, nested classes and functions as single nodes."""
    for child in ast.iter_child_nodes(scope):
        # An assignment's value is read before its target is known under its name.
        if not isinstance(child, (ast.ClassDef, *FunctionNode.__args__)):
            yield from _in_order(child)
        yield child


def consumed_fields() -> set[tuple[str, str]]:
    files = [path for path in PACKAGE.rglob("*.py") if path.name not in NOT_CONSUMERS]
    return Reader(path.read_text() for path in files).found


CONSUMED = consumed_fields()
FIELDS = [
    (name, field.name) for name, cls in CONFIG_CLASSES.items() for field in dataclasses.fields(cls)
]


def test_all_classes_are_covered() -> None:
    assert set(CONFIG_CLASSES) == {
        "ModelConfig",
        "AssignmentConfig",
        "LossConfig",
        "DataConfig",
        "OptimizerConfig",
        "TrainConfig",
        "CompileConfig",
        "EvalConfig",
        "RunConfig",
    }


@pytest.mark.parametrize(("owner", "field"), FIELDS, ids=lambda value: value)
def test_field_is_consumed(owner: str, field: str) -> None:
    assert (owner, field) in CONSUMED, f"no code reads {owner}.{field}: the option does nothing"


def test_the_search_can_fail() -> None:
    source = """
def f(config: TrainConfig, other: Other, run: RunConfig | None):
    other.epochs
    config = other
    config.batch_size
    model = run.model
    model.num_heads

class Part:
    data: DataConfig

    def __init__(self, run: RunConfig):
        self.loss, self.x = run.loss, 1

    def g(self):
        self.loss.focal_alpha
        self.data.root
        self.x.class_weight
"""
    assert Reader([source]).found == {
        ("RunConfig", "model"),
        ("ModelConfig", "num_heads"),
        ("RunConfig", "loss"),
        ("LossConfig", "focal_alpha"),
        ("DataConfig", "root"),
    }
