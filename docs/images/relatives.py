"""Draws `docs/images/relatives.svg`: which family supervises which queries by which matcher.

`python docs/images/relatives.py` writes it. Everything but titles and places is read from the
presets: the sets of queries, their groups, their branches and matchers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from msdetr.config import ModelConfig
from msdetr.model.denoising import DenoisingQueries
from msdetr.model.query_sets import QuerySet, query_sets
from msdetr.presets import PRESETS
from msdetr.supervision.matchers import ByIoU, FixedPairs, Hungarian, OneToMany
from msdetr.supervision.objectives import Objective, build_objectives

PICTURE = Path(__file__).with_suffix(".svg")

FAMILIES = {
    "deformable-detr-r50-two-stage": "Deformable-DETR",
    "ms-detr-r50-300": "MS-DETR",
    "h-deformable-detr-r50": "H-DETR",
    "group-deformable-detr-r50": "Group DETR",
    "dn-deformable-detr-r50": "DN-DETR",
    "dino-r50-4scale": "DINO",
    "deta-r50": "DETA",
    "ms-h-deformable-detr-r50": "MS + H",
    "ms-group-deformable-detr-r50": "MS + Group",
    "ms-dn-deformable-detr-r50": "MS + DN",
    "ms-cdn-deformable-detr-r50": "MS + CDN",
}
"""Titles of the rows by preset."""

SIZE = 11
"""Of text, in pixels."""
LINE = 14
WIDTH = 900
ROW, GAP, TOP, LEGEND = 96, 12, 62, 84
LEFT, RIGHT = 10, 890
COLUMNS = {"encoder": (172, 160), "before": (350, 164), "primary": (532, 170), "behind": (722, 164)}
"""Place and width of the blocks of a column."""
HEADINGS = {
    "encoder": "Encoder proposals",
    "before": "Denoising queries",
    "primary": "Queries that infer",
    "behind": "Further queries",
}
COLORS = {
    "encoder": ("#f3f0e2", "#8a7a2f"),
    "before": ("#fde9e0", "#b4552d"),
    "primary": ("#e1edfa", "#2b6cb0"),
    "behind": ("#e6f4e6", "#3c7d3c"),
}
"""Fill and border of the blocks of a column."""


@dataclass(frozen=True)
class Block:
    """Queries or proposals that are supervised together."""

    column: str
    title: str
    branches: tuple[str, ...]
    """Of the detector's output in training."""
    stacked: bool = False
    """Several groups, which do not see each other."""
    infers: bool = False
    note: str = ""


def blocks(model: ModelConfig) -> Iterator[Block]:
    """The blocks of a configuration in training."""
    branches: tuple[str, ...]
    sets = query_sets(model, training=True)
    primary, *behind = sets.sets
    if model.two_stage and model.proposal_score == "first_class":
        nms = "" if model.proposal_nms_iou_threshold is None else ", after NMS"
        note = f"selects {sets.num_queries}{nms}"
        yield Block("encoder", "all, as class 0", ("encoder",), infers=True, note=note)
    elif model.two_stage:
        several = primary.num_groups > 1
        count = f"{primary.num_groups} x {primary.group_size}" if several else primary.group_size
        branches = ("encoder_selected",)
        yield Block("encoder", f"the {count} selected", branches, several, infers=True)
    if model.denoising != "none":
        yield _denoising(model)
    branches = (primary.branch,)
    if model.one_to_many != "none":
        branches = (*branches, "one_to_many")
    yield Block("primary", f"{primary.group_size} queries", branches, infers=True)
    if primary.num_groups > 1:
        title = f"{primary.num_groups - 1} x {primary.group_size} queries"
        yield Block("behind", title, branches, stacked=True)
    for query_set in behind:
        yield Block("behind", f"{query_set.num_queries} queries", (query_set.branch,))


def _denoising(model: ModelConfig) -> Block:
    def of(num_slots: int) -> QuerySet:
        return DenoisingQueries(replace(model, hidden_dim=8), 91).query_set(num_slots)

    fixed = of(1).num_groups == of(2).num_groups
    groups = str(of(1).num_groups) if fixed else f"({of(1).num_groups} // T)"
    per_slot = "T" if of(1).group_size == 1 else "(T + T)"
    note = "others: background" if model.denoising == "contrastive" else "empty slots: no loss"
    return Block("before", f"{groups} x {per_slot}", (of(1).branch,), stacked=True, note=note)


def described(objective: Objective) -> str:
    """The matcher of an objective in a few words."""
    matcher = objective.matcher
    if isinstance(matcher, FixedPairs):
        return "fixed pairs"
    if isinstance(matcher, Hungarian):
        return (
            "Hungarian, by anchors" if matcher.by_anchors else f"Hungarian, {matcher.k} per target"
        )
    if isinstance(matcher, OneToMany):
        return f"score, up to {matcher.k} per target"
    assert isinstance(matcher, ByIoU)
    return f"IoU, up to {matcher.k} per target"


def text(x: float, y: float, content: str, *, style: str = "", size: int = SIZE) -> str:
    """A line of text, whose baseline starts at (x, y)."""
    return f'<text x="{x}" y="{y}" font-size="{size}" {style}>{escape(content)}</text>'


def rectangle(x: float, y: float, width: float, height: float, column: str, infers: bool) -> str:
    """A block without text. Blocks that exist in training only have a dashed border."""
    fill, border = COLORS[column]
    line = 'stroke-width="2"' if infers else 'stroke-width="1.2" stroke-dasharray="5 3"'
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}" '
        f'stroke="{border}" {line}/>'
    )


def arrow(x: float, y: float, length: float) -> str:
    """An arrow to the right."""
    tip = x + length
    return f'<path d="M{x} {y}H{tip}m-5 -4l5 4l-5 4" fill="none" stroke="#333" stroke-width="1.5"/>'


def drawn(block: Block, y: float, objectives: dict[str, Objective]) -> Iterator[str]:
    """A block of a row that begins at y."""
    x, width = COLUMNS[block.column]
    height = ROW - GAP
    if block.stacked:
        for shift in (8, 4):
            yield rectangle(x + shift, y + 8 - shift, width - 8, height - 8, block.column, False)
        y, height, width = y + 8, height - 8, width - 8
    yield rectangle(x, y, width, height, block.column, block.infers)
    yield text(x + 8, y + 15, block.title, style='font-weight="bold"')
    for index, branch in enumerate(block.branches):
        top = y + 15 + LINE * (2 * index + 1)
        yield text(x + 8, top, branch, style='font-family="DejaVu Sans Mono, monospace"')
        yield text(x + 8, top + LINE - 1, described(objectives[branch]), style='fill="#444"')
    if block.note:
        yield text(x + 8, y + height - 9, block.note, style='fill="#444"')


def drawn_row(preset: str, title: str, y: float) -> Iterator[str]:
    """The row of a family."""
    config = PRESETS[preset].config
    objectives = {one.branch: one for one in build_objectives(config.assignment, config.loss)}
    yield f'<path d="M{LEFT} {y - GAP / 2}H{RIGHT}" stroke="#ccc"/>'
    yield text(LEFT, y + 18, title, style='font-weight="bold"', size=14)
    lines = [preset]
    if len(preset) > 22:
        first, second, rest = preset.split("-", 2)
        lines = [f"{first}-{second}-", rest]
    for index, part in enumerate(lines):
        yield text(LEFT, y + 36 + LINE * index, part, style='fill="#555"')
    for block in blocks(config.model):
        yield from drawn(block, y, objectives)
        if block.column == "before":
            start = COLUMNS["before"][0] + COLUMNS["before"][1]
            yield arrow(start + 1, y + ROW / 2, COLUMNS["primary"][0] - start - 3)
    if not config.model.two_stage:
        x, _ = COLUMNS["encoder"]
        yield text(x + 8, y + 15, "none: queries are learned", style='fill="#777"')


def picture() -> str:
    """The whole picture as SVG."""
    height = TOP + ROW * len(FAMILIES) + LEGEND
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="DejaVu Sans, Arial, sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        text(LEFT, 20, "Who supervises which queries", style='font-weight="bold"', size=16),
    ]
    for column, (x, _) in COLUMNS.items():
        lines.append(text(x, TOP - 14, HEADINGS[column], style='font-weight="bold"', size=12))
    for index, (preset, title) in enumerate(FAMILIES.items()):
        lines += drawn_row(preset, title, TOP + ROW * index)
    lines += _legend(TOP + ROW * len(FAMILIES))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _legend(y: float) -> Iterator[str]:
    yield f'<path d="M{LEFT} {y - GAP / 2}H{RIGHT}" stroke="#ccc"/>'
    yield rectangle(LEFT, y + 6, 22, 14, "primary", True)
    yield text(LEFT + 32, y + 17, "runs in inference, too")
    yield rectangle(LEFT + 200, y + 6, 22, 14, "behind", False)
    yield text(LEFT + 232, y + 17, "in training only")
    for shift in (6, 3, 0):
        yield rectangle(LEFT + 362 + shift, y + 9 - shift, 22, 12, "before", False)
    yield text(LEFT + 400, y + 17, "groups that do not see each other")
    yield arrow(LEFT + 640, y + 13, 18)
    yield text(LEFT + 668, y + 17, "also attends to")
    for index, line in enumerate(
        (
            "A query attends to the queries of its own group. T: target slots of the batch. "
            "T + T: positives, then negatives.",
            "In a block: its queries, then each branch of the output and how its queries are "
            "paired with the targets.",
        )
    ):
        yield text(LEFT, y + 41 + 16 * index, line)


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
