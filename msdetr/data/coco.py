"""Reader of COCO annotation files into flat arrays.

COCO's training set has 118 thousand images and 860 thousand boxes. As lists of dicts they take
gigabytes, and every worker process ends up with its own copy because reading a Python object
writes its reference count. Here they are a few tensors: worker processes share them, whether they
are forked (memory pages that nobody writes) or spawned (PyTorch passes tensors by shared memory).
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msdetr.data.images import check_file_name, resolve_image_path
from msdetr.data.labels import LabelLayout, LabelMap

_KEYS = (
    "images", "annotations", "categories", "id", "file_name", "width", "height", "image_id",
    "category_id", "bbox", "iscrowd", "name",
)  # fmt: skip
# Polygons are nine tenths of COCO's file, and nothing here reads them.
_POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[[\s\d.,\[\]eE+-]*\]')
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class CocoDataset:
    """Images and boxes of one annotation file. N images, ascending by id, and M boxes."""

    annotation_file: Path
    """Where the annotations come from."""
    image_folder: Path
    """Folder that file names are relative to."""
    label_map: LabelMap
    """Categories and their labels."""
    image_ids: Tensor
    """[N] int64, strictly ascending."""
    sizes: Tensor
    """[N, 2] int64, (height, width) in pixels, as the annotation file says."""
    file_name_bytes: Tensor
    """[*] uint8, all file names in UTF-8, one after the other."""
    file_name_offsets: Tensor
    """[N + 1] int64, where each name begins."""
    box_offsets: Tensor
    """[N + 1] int64, where each image's boxes begin; empty ranges are images without boxes."""
    boxes: Tensor
    """[M, 4] float32, (x0, y0, x1, y1) in pixels, inside the image, of positive size."""
    labels: Tensor
    """[M] int64"""

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, index: int) -> str:
        """File name of image `index`, as in the annotation file."""
        begin, end = self.file_name_offsets.numpy()[index : index + 2].tolist()
        return bytes(self.file_name_bytes.numpy()[begin:end]).decode()

    def image_path(self, index: int) -> Path:
        """Path of image `index`.

        Raises:
            ValueError: a symbolic link leads out of the image folder.
        """
        return resolve_image_path(self.image_folder, self.file_name(index))

    def image_id(self, index: int) -> int:
        """Id of image `index` in the annotation file."""
        return int(self.image_ids[index])

    def image_size(self, index: int) -> tuple[int, int]:
        """(height, width) of image `index`."""
        height, width = self.sizes.numpy()[index].tolist()
        return height, width

    def targets(self, index: int) -> tuple[Tensor, Tensor]:
        """Labels [n] int64 and boxes [n, 4] float32 of image `index`, in the order of the file.

        Both are views: do not write to them.
        """
        begin, end = self.box_offsets.numpy()[index : index + 2].tolist()
        return self.labels[begin:end], self.boxes[begin:end]


def load_coco(
    annotation_file: Path,
    image_folder: Path,
    layout: LabelLayout = "auto",
    *,
    label_map: LabelMap | None = None,
) -> CocoDataset:
    """Reads an instances file of COCO's format.

    As in the published code, crowd annotations are left out, boxes are clipped to their image,
    boxes that then have no width or no height are left out, and images without boxes are kept.

    Args:
        annotation_file: JSON with `images`, `annotations` and `categories`.
        image_folder: folder of the images; it is not looked into.
        layout: how category ids become labels, see `LabelMap.from_categories`.
        label_map: labels to use instead, those that a model was trained with; the file's
            categories must be among its categories.

    Raises:
        ValueError: invalid JSON, missing or malformed fields, duplicate ids, annotations of unknown
            images or categories, file names that leave the folder; names the file and the id.
    """
    try:
        content = read_instances_json(annotation_file)
        images, annotations, categories = (
            records_of(content, key) for key in ("images", "annotations", "categories")
        )
        names = LabelMap.from_categories(categories, "contiguous")
        if label_map is None:
            label_map = LabelMap.from_categories(categories, layout)
        _check_categories(names, label_map)
        return CocoDataset(
            annotation_file=annotation_file,
            image_folder=image_folder,
            label_map=label_map,
            **_read_images_and_boxes(images, annotations, label_map),
        )
    except ValueError as error:
        raise ValueError(f"{annotation_file}: {error}") from error


def read_instances_json(annotation_file: Path) -> Any:
    """The content of an annotation file, without the fields that detection does not need.

    Raises:
        ValueError: the file cannot be read or is not JSON.
    """
    try:
        text = _POLYGONS.sub(b'"segmentation":0', annotation_file.read_bytes())
        with _paused_garbage_collection():
            return json.loads(text, object_hook=_needed_fields)
    except OSError as error:
        raise ValueError(f"cannot read the file: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"invalid JSON, perhaps a part of a download: {error}") from error


def _needed_fields(item: dict[str, Any]) -> dict[str, Any]:
    return {key: item[key] for key in _KEYS if key in item}


@contextmanager
def _paused_garbage_collection() -> Iterator[None]:
    # The collector would walk all objects again and again while millions are made: twice the time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def records_of(content: Any, key: str) -> list[Any]:
    """The list `key` of an annotation file's content.

    Raises:
        ValueError: there is no such list.
    """
    records = content.get(key) if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise ValueError(f"there is no list {key!r} at the top: not an instances file of COCO")
    return records


def _check_categories(file: LabelMap, label_map: LabelMap) -> None:
    known = dict(zip(label_map.category_ids, label_map.names, strict=True))
    for category_id, name in zip(file.category_ids, file.names, strict=True):
        if known.get(category_id) != name:
            raise ValueError(
                f"category {category_id} is {name!r} here, but {known.get(category_id)!r} in the "
                "label map of the model or training set"
            )


def _read_images_and_boxes(
    images: list[Any], annotations: list[Any], label_map: LabelMap
) -> dict[str, Tensor]:
    ids = _integers(images, "id", "image")
    _check_unique(ids, "image")
    images = [images[i] for i in np.argsort(ids)]
    ids = np.sort(ids)
    heights, widths = (_integers(images, key, "image") for key in ("height", "width"))
    if (where := np.flatnonzero((heights < 1) | (widths < 1))).size:
        i = where[0]
        raise ValueError(f"image {ids[i]}: height {heights[i]} and width {widths[i]}, at least 1")
    file_names = [_encode_file_name(image) for image in images]

    image_index, labels, boxes = _read_annotations(annotations, ids, label_map)
    limits = np.stack((widths, heights), axis=1)[image_index].astype(np.float32)
    # The same float32 arithmetic as published: corners first, then the clipping.
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, :2] = np.clip(boxes[:, :2], 0, limits)
    boxes[:, 2:] = np.clip(boxes[:, 2:], 0, limits)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    # Stable: the boxes of an image stay in the order of the file.
    order = np.flatnonzero(keep)[np.argsort(image_index[keep], kind="stable")]
    arrays = {
        "image_ids": ids,
        "sizes": np.stack((heights, widths), axis=1),
        "file_name_bytes": np.frombuffer(b"".join(file_names), dtype=np.uint8).copy(),
        "file_name_offsets": _offsets(np.array([len(name) for name in file_names], dtype=np.int64)),
        "box_offsets": _offsets(np.bincount(image_index[keep], minlength=len(ids))),
        "boxes": boxes[order],
        "labels": labels[order],
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _read_annotations(
    annotations: list[Any], image_ids: NDArray[np.int64], label_map: LabelMap
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Image index [A], label [A] and box [A, 4] (x, y, width, height) of all but the crowds."""
    ids = _integers(annotations, "id", "annotation")
    _check_unique(ids, "annotation")
    image_index = _positions(annotations, "image_id", ids, image_ids, "images")
    category_ids = np.array(label_map.category_ids, dtype=np.int64)
    category_index = _positions(annotations, "category_id", ids, category_ids, "categories")
    boxes = _boxes(annotations, ids)
    is_object = np.array([not annotation.get("iscrowd", 0) for annotation in annotations], bool)
    labels = np.array(label_map.labels, dtype=np.int64)[category_index]
    return image_index[is_object], labels[is_object], boxes[is_object]


def _integers(records: list[Any], key: str, kind: str) -> NDArray[np.int64]:
    """Field `key` of all records, [n]; refuses what is not an integer."""
    try:
        values = [record[key] for record in records]
    except (KeyError, TypeError):
        record = next(r for r in records if not isinstance(r, Mapping) or key not in r)
        raise ValueError(f"{kind} {_describe(record)} has no {key!r}") from None
    if set(map(type, values)) - {int}:
        record = next(r for r in records if type(r[key]) is not int)
        raise ValueError(f"{kind} {_describe(record)}: {key!r} must be an integer") from None
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        raise ValueError(f"{kind}s: a value of {key!r} exceeds 64 bits") from None


def _boxes(annotations: list[Any], ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """[n, 4] as in the file."""
    for annotation, annotation_id in zip(annotations, ids, strict=True):
        if not is_box(annotation.get("bbox")):
            raise ValueError(
                f"annotation {annotation_id}: 'bbox' must be four finite numbers "
                f"[x, y, width, height], it is {annotation.get('bbox')!r}"
            )
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float32)
    return boxes.reshape(-1, 4)


def is_box(value: Any) -> bool:
    """Whether `value` is a list of four finite numbers that float32 holds."""
    if not isinstance(value, list) or len(value) != 4:
        return False
    # Comparisons with NaN are false.
    return all(type(x) in (int, float) and -_LARGEST <= x <= _LARGEST for x in value)


def _check_unique(ids: NDArray[np.int64], kind: str) -> None:
    unique, count = np.unique(ids, return_counts=True)
    if len(unique) != len(ids):
        raise ValueError(f"{kind} id {unique[count > 1][0]} appears more than once")


def _positions(
    annotations: list[Any],
    key: str,
    ids: NDArray[np.int64],
    table: NDArray[np.int64],
    table_name: str,
) -> NDArray[np.int64]:
    """Position of each annotation's field `key` in the ascending `table`, [n]."""
    values = _integers(annotations, key, "annotation")
    if (where := np.flatnonzero(~np.isin(values, table))).size:
        i = where[0]
        raise ValueError(f"annotation {ids[i]}: {key} {values[i]} is not among the {table_name}")
    return np.searchsorted(table, values)


def _encode_file_name(image: dict[str, Any]) -> bytes:
    name = image.get("file_name")
    if not isinstance(name, str):
        raise ValueError(f"image {_describe(image)} has no 'file_name'")
    try:
        check_file_name(name)
    except ValueError as error:
        raise ValueError(f"image {_describe(image)}: {error}") from None
    return name.encode()


def _offsets(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)))


def _describe(record: Any) -> str:
    if isinstance(record, Mapping) and "id" in record:
        return f"with id {record['id']!r}"
    return repr(record)
