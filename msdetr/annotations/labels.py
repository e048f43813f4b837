"""Category ids of an annotation file, and the class labels that the model predicts for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

LabelLayout = Literal["auto", "coco", "contiguous"]

COCO_NUM_CLASSES = 91
"""Class logits in the `coco` layout: ids 1 to 90 are labels as they are, 11 labels are unused."""

_COCO_UNUSED_IDS = frozenset((12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
_COCO_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork,
knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake,
chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush
"""

COCO_CATEGORIES: dict[int, str] = dict(
    zip(
        (i for i in range(1, COCO_NUM_CLASSES) if i not in _COCO_UNUSED_IDS),
        (" ".join(name.split()) for name in _COCO_NAMES.split(",")),
        strict=True,
    )
)
"""COCO's own 80 categories: name by id."""


@dataclass(frozen=True)
class LabelMap:
    """Labels of categories. Categories ascend by id."""

    category_ids: tuple[int, ...]
    """Ids of the annotation file."""
    labels: tuple[int, ...]
    """Label of each category, in [0, num_classes)."""
    names: tuple[str, ...]
    """Name of each category."""
    num_classes: int
    """Class logits that the model needs."""

    def __post_init__(self) -> None:
        if not len(self.category_ids) == len(self.labels) == len(self.names):
            raise ValueError("label map: category_ids, labels and names differ in length")
        if tuple(sorted(set(self.category_ids))) != self.category_ids:
            raise ValueError(f"label map: category ids must ascend, got {self.category_ids}")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"label map: labels must differ, got {self.labels}")
        if any(not 0 <= label < self.num_classes for label in self.labels):
            raise ValueError(f"label map: labels must be in [0, {self.num_classes})")

    @classmethod
    def from_categories(
        cls, categories: Mapping[int, str], layout: LabelLayout = "auto"
    ) -> LabelMap:
        """The label map of a data set.

        Args:
            categories: names by category id, in any order.
            layout: `coco` keeps ids as labels (91 classes); `contiguous` numbers the categories
                from 0 in the order of their ids; `auto` is `coco` exactly for COCO's own 80.

        Raises:
            ValueError: no categories, or an id that the `coco` layout has no place for.
        """
        if not categories:
            raise ValueError("there are no categories")
        if layout == "auto":
            layout = "coco" if categories == COCO_CATEGORIES else "contiguous"
        ids = tuple(sorted(categories))
        if layout == "contiguous":
            labels, num_classes = tuple(range(len(ids))), len(ids)
        else:
            labels, num_classes = ids, COCO_NUM_CLASSES
            if ids[0] < 0 or ids[-1] >= COCO_NUM_CLASSES:
                raise ValueError(
                    f"label layout 'coco' keeps category ids below {COCO_NUM_CLASSES}, these are "
                    f"{ids[0]} to {ids[-1]}: use layout 'contiguous'"
                )
        return cls(ids, labels, tuple(categories[i] for i in ids), num_classes)

    def category_of(self, label: int) -> int | None:
        """Category id that `label` stands for; None for a label that no category uses."""
        position = self._position.get(label)
        return None if position is None else self.category_ids[position]

    def name_of(self, label: int) -> str:
        """Name of the category that `label` stands for, or `unused <label>`."""
        position = self._position.get(label)
        return f"unused {label}" if position is None else self.names[position]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "category_ids": list(self.category_ids),
            "labels": list(self.labels),
            "names": list(self.names),
            "num_classes": self.num_classes,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LabelMap:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing or contradicts another.
        """
        try:
            return cls(
                category_ids=tuple(values["category_ids"]),
                labels=tuple(values["labels"]),
                names=tuple(values["names"]),
                num_classes=values["num_classes"],
            )
        except KeyError as error:
            raise ValueError(f"label map has no field {error}") from None

    @cached_property
    def _position(self) -> dict[int, int]:
        return {label: position for position, label in enumerate(self.labels)}
