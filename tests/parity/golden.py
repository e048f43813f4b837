"""Reading golden cases and rebuilding what they leave to a rule: images, weights, targets."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.detector.published import by_published_name
from msdetr.model.query_sets import QuerySet
from msdetr.published import PUBLISHED_FLAGS
from msdetr.structures import Assignment, ImageBatch, Targets

MODEL_TOLERANCE = 1e-5
"""Of whole models, relative. Anchors and position codes are float32 in the published code."""


@dataclass(frozen=True)
class GoldenCase:
    """One case: arrays from `NAME.npz`, configuration and scalars from `NAME.json`."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.path) as file:
            return dict(file)

    @cached_property
    def info(self) -> dict[str, Any]:
        return json.loads(self.path.with_suffix(".json").read_text())

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Arrays whose name starts with `prefix`, by the rest of their name."""
        return {
            name.removeprefix(prefix): torch.from_numpy(array)
            for name, array in self.arrays.items()
            if name.startswith(prefix)
        }

    def pairs(self, name: str) -> list[list[int]]:
        """Recorded (query, target) pairs of one image, by target, then query."""
        return sorted(self.arrays[name].tolist(), key=lambda pair: pair[::-1])

    def targets(self, *, empty_slots: int = 2) -> Targets:
        """Targets, padded to some slots more than needed, with what must not matter."""
        boxes, labels = [], []
        while f"target{len(boxes)}.boxes" in self.arrays:
            index = len(boxes)
            boxes.append(self.tensor(f"target{index}.boxes"))
            labels.append(self.tensor(f"target{index}.labels"))
        slots = max(len(image) for image in labels) + empty_slots
        padded_labels = torch.zeros(len(labels), slots, dtype=torch.int64)
        padded_boxes = torch.full((len(labels), slots, 4), 0.5, dtype=boxes[0].dtype)
        for image, (image_boxes, image_labels) in enumerate(zip(boxes, labels, strict=True)):
            padded_labels[image, : len(image_labels)] = image_labels
            padded_boxes[image, : len(image_boxes)] = image_boxes
        count = torch.tensor([len(image) for image in labels])
        return Targets(padded_labels, padded_boxes, count)

    def noise(self, targets: Targets, query_set: QuerySet, num_classes: int) -> Tensor:
        """The recorded draws of denoising queries as `DenoisingQueries.draw` gives them."""
        num_rows, num_slots = int(targets.count.sum()), targets.labels.shape[1]
        num_copies = query_set.num_queries // num_slots
        uniform = torch.zeros(*targets.labels.shape, num_copies, 10, dtype=torch.float64)

        def of_slots(name: str) -> Tensor:
            rows = self.tensor(f"draw.{name}").double()
            return rows.unflatten(0, (num_copies, num_rows)).transpose(0, 1)

        uniform[targets.mask, :, 0] = of_slots("label_p")
        uniform[targets.mask, :, 1] = (of_slots("label_new") + 0.5) / num_classes
        uniform[targets.mask, :, 2:6] = of_slots("box")
        if "draw.sign" in self.arrays:
            uniform[targets.mask, :, 6:] = 1.0 - of_slots("sign")  # numbers below 0.5 move right
        return uniform.transpose(1, 2).flatten(1, 2)

    def images(self) -> ImageBatch:
        """The case's normalised images, float64, padded to the largest."""
        generator = np.random.Generator(np.random.PCG64(self.info["seed"]))
        sizes = torch.tensor(self.info["sizes"])
        height, width = sizes.amax(0).tolist()
        pixels = torch.zeros(len(sizes), 3, height, width, dtype=torch.float64)
        for image, (image_height, image_width) in enumerate(sizes.tolist()):
            values = generator.standard_normal((3, image_height, image_width))
            pixels[image, :, :image_height, :image_width] = torch.from_numpy(values)
        return ImageBatch(pixels, sizes)

    def published_state_dict(self) -> dict[str, Tensor]:
        """Weights by the rule of the golden set, under their published names."""
        return {
            name: weight_by_rule(canonical_name(name, self.info), shape)
            for name, shape in self.info["state_dict"].items()
        }

    @cached_property
    def grad_norms(self) -> dict[str, float]:
        """Gradient norms by canonical name, of the parameters that get a gradient."""
        return {
            canonical_name(name, self.info): norm
            for name, norm in self.info["grad_norms"].items()
            if norm is not None
        }


def published_values(terms: dict[str, Tensor]) -> dict[str, float]:
    """Loss terms under their published names: `loss_ce_0`, ..., `loss_ce`, `loss_ce_0_o2m`, ..."""
    return {name: value.item() for name, value in by_published_name(terms).items()}


def published_pairs(
    assignment: Assignment, layer: int, image: int, *, num_groups: int = 1
) -> list[list[int]]:
    """(query, target) pairs of one image, by target, then query; groups follow each other."""
    group_size = assignment.target_class.shape[2]
    pairs = []
    for group in range(num_groups):
        problem = image * num_groups + group
        query_index, mask = (x[layer, problem] for x in (assignment.query_index, assignment.mask))
        for target, place in mask.nonzero().tolist():
            pairs.append([int(query_index[target, place]) + group * group_size, target])
    return sorted(pairs, key=lambda pair: pair[::-1])


def assert_relative(
    result: Tensor, expected: Tensor, what: str, tolerance: float = MODEL_TOLERANCE
) -> None:
    """Compare elements, relative to themselves or to the largest of the tensor."""
    torch.testing.assert_close(
        result,
        expected,
        rtol=tolerance,
        atol=tolerance * expected.abs().max().item(),
        msg=lambda text: f"{what}: {text}",
    )


def find_cases(
    folder: Path, prefixes: tuple[str, ...], *, kind: str | None = None
) -> list[GoldenCase]:
    cases = [
        GoldenCase(path) for path in sorted(folder.glob("*.npz")) if path.stem.startswith(prefixes)
    ]
    return [case for case in cases if kind is None or case.info["kind"] == kind]


def golden_models() -> dict[str, dict[str, Any]]:
    """The JSON of each golden model of an implementation that we convert, by name.

    From the cases of the suite and, where they lie beside the project, the full set.
    """
    project = Path(__file__).resolve().parents[2]
    contents = {
        path.stem: json.loads(path.read_text())
        for folder in (project / "tests/golden", project.parent / "shared/golden")
        for path in folder.glob("*.json")
    }
    return {
        name: content
        for name, content in contents.items()
        if "state_dict" in content and content["implementation"] in PUBLISHED_FLAGS
    }


def canonical_name(name: str, info: dict[str, Any]) -> str:
    """The one name of a tensor of which a published state dict lists several copies.

    From the map of the case, or in cases without one from the rule for MS-DETR.
    """
    if "canonical" in info:
        return info["canonical"].get(name, name)
    for head in ("bbox_embed.", "class_embed."):
        name = name.replace(f"transformer.decoder.{head}", head)
    name = name.replace("bbox_embed_o2m.", "bbox_embed.")
    first, _, rest = name.partition(".")
    shared = "--with_box_refine" not in info.get("flags", [])
    if shared and first in ("bbox_embed", "class_embed", "class_embed_o2m"):
        name = f"{first}.0.{rest.partition('.')[2]}"
    return name


def weight_by_rule(canonical: str, shape: Sequence[int]) -> Tensor:
    """A parameter of the golden set."""
    seed = zlib.crc32(canonical.encode())
    x = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
    last = canonical.rpartition(".")[2]
    if last == "running_var":
        x = 1 + 0.1 * np.abs(x)
    elif last == "running_mean":
        x = 0.1 * x
    elif len(shape) >= 2:
        x = x / np.sqrt(np.prod(shape[1:]))
    elif last == "weight":
        x = 1 + 0.1 * x
    else:
        x = 0.1 * x
    return torch.from_numpy(np.asarray(x))
