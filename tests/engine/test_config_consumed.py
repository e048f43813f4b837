"""Every configuration field is read somewhere in the package: no option is accepted and ignored.

A field of a distinctive name (`clip_grad_norm`) counts as read where any attribute of this name is.
Other fields count where they follow the name of their section (`self.config.train.epochs`,
`train.epochs`), or where they follow `config` in a module that names their class. Loss weights are
read by name: tests/supervision/test_criterion.py shows that each weighs its loss.
"""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

import msdetr
from msdetr import config

PACKAGE = Path(msdetr.__file__).parent
# These define, choose and convert configurations, but do not act on them.
NOT_CONSUMERS = ("config", "presets.py", "published")
SECTIONS = {"RunConfig": "config"} | {
    str(field.type): field.name
    for field in dataclasses.fields(config.RunConfig)
    if str(field.type).endswith("Config")
}
FIELDS = [
    (name, field.name)
    for name in SECTIONS
    for field in dataclasses.fields(getattr(config, name))
    if not (name == "LossConfig" and field.name.endswith("_weight"))
]


def fields_read(source: str) -> set[tuple[str, str]]:
    """(section or class, field) of all attributes that a module reads from a section."""
    reads = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = getattr(node.value, "attr", getattr(node.value, "id", "")).strip("_")
            reads.add((owner, node.attr))
            if owner == "config":
                reads |= {(name, node.attr) for name in SECTIONS if name in source}
    return reads


READ = set().union(
    *(
        fields_read(path.read_text())
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in NOT_CONSUMERS
    )
)


def test_all_classes_are_covered() -> None:
    assert set(SECTIONS) == {name for name in config.__all__ if name.endswith("Config")}


@pytest.mark.parametrize(("owner", "field"), FIELDS, ids=lambda value: value)
def test_field_is_consumed(owner: str, field: str) -> None:
    is_distinctive = "_" in field and sum(name == field for _, name in FIELDS) == 1
    owners = {reader for reader, name in READ if name == field}
    assert owners if is_distinctive else owners & {owner, SECTIONS[owner]}, (
        f"no code reads {owner}.{field}: the option does nothing"
    )


def test_other_attributes_do_not_count() -> None:
    source = "def f(config: TrainConfig): path.root; train.epochs = config.log_every; x.data.exif"
    assert fields_read(source) == {
        ("path", "root"),
        *((owner, "log_every") for owner in ("config", "TrainConfig")),
        *(("data", "exif"), ("x", "data")),
    }
