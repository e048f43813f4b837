"""Pipelines of `python -m benchmarks.loader`: this package's loader, and its peer.

A pipeline makes batches in three stages (decode, augment, collate), and has a loader that runs all
of them. The peer restates torchvision's reference for detection (references/detection: transforms
v2, boxes and labels as `tv_tensors`, float images) with DETR's augmentation, distributed like
ours, and DETR's batch (images padded with zeros, and a mask).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from msdetr.config import DataConfig, RunConfig, TrainConfig
from msdetr.data.collate import Collate
from msdetr.data.dataset import DetectionDataset, Sample, build_dataset
from msdetr.data.images import DecodedImage, decode_image
from msdetr.data.loader import build_train_loader
from msdetr.data.sampler import sample_generator
from msdetr.data.transforms import Geometry, resize_window, transform_boxes, transform_pixels

OURS = "msdetr"
CACHED = "msdetr, cached"
TORCHVISION = "torchvision, Pillow"
IMPLEMENTATIONS = (OURS, CACHED, TORCHVISION)


@dataclass(frozen=True)
class Source:
    """The data set, and how it is loaded."""

    images: Path
    """Folder of the images."""
    annotations: Path
    """COCO JSON."""
    batch: int
    """Images per batch."""

    def data(self, **options: Any) -> DataConfig:
        """The recipe's configuration of this set."""
        return DataConfig(train_images=self.images, train_annotations=self.annotations, **options)


class Pipeline(Protocol):
    """A way from files to batches. A position is that of a sample in an epoch."""

    num_images: int
    """Number of images in the set."""

    def decode(self, epoch: int, position: int) -> Any:
        """The first stage: an image in memory."""

    def augment(self, decoded: Any) -> Any:
        """The second: a sample."""

    def collate(self, samples: list[Any]) -> Any:
        """The third: a batch."""

    def loader(self, epoch: int, num_workers: int) -> DataLoader[Any]:
        """All stages, for the batches of an epoch."""


def build_pipeline(implementation: str, source: Source) -> Pipeline:
    """The pipeline of an implementation, one of `IMPLEMENTATIONS`.

    Raises:
        ValueError: the data are missing or broken.
    """
    if implementation in (OURS, CACHED):
        return OurPipeline(source, "memory" if implementation == CACHED else "none")
    return TorchvisionPipeline(source)


class OurPipeline:
    """This package, stage by stage as `DetectionDataset.sample`, and its loader."""

    def __init__(self, source: Source, cache: Literal["none", "memory"]) -> None:
        self.source = source
        self.dataset: DetectionDataset = build_dataset(source.data(cache=cache), "train")
        self.num_images = len(self.dataset)
        config = self.dataset_config(0)
        self._collate = Collate(config.data.pad_multiple, config.data.target_buckets)

    def dataset_config(self, num_workers: int) -> RunConfig:
        """The configuration of a run on this set."""
        data = self.source.data(num_workers=num_workers)
        return RunConfig(data=data, train=TrainConfig(batch_size=self.source.batch))

    def decode(self, epoch: int, position: int) -> tuple[int, Geometry, Any]:
        """The drawn geometry, and the image from the file or the cache."""
        dataset, index = self.dataset, position % self.num_images
        size = dataset.annotations.image_size(index)
        geometry = dataset.transform(size, sample_generator(0, epoch, position))
        if dataset.cache is not None:
            stored = dataset.cache.load(index, geometry.max_scale)
            if stored is not None:
                return index, geometry, stored
        path = dataset.annotations.image_path(index)
        decoded = decode_image(path, expected_size=size, max_scale=geometry.max_scale)
        return index, geometry, decoded

    def augment(self, decoded: tuple[int, Geometry, Any]) -> Sample:
        """Window, resize and flip; boxes."""
        index, geometry, image = decoded
        annotations = self.dataset.annotations
        transform = transform_pixels if isinstance(image, DecodedImage) else resize_window
        pixels = transform(image, geometry)
        labels, boxes = transform_boxes(*annotations.targets(index), geometry)
        size = annotations.image_size(index)
        return Sample(pixels, labels, boxes, annotations.image_id(index), size)

    def collate(self, samples: list[Sample]) -> Any:
        """uint8 images, padded to a multiple of 64."""
        return self._collate(samples)

    def loader(self, epoch: int, num_workers: int) -> DataLoader[Any]:
        """The trainer's loader."""
        config = self.dataset_config(num_workers)
        return build_train_loader(config, self.dataset, epoch=epoch)


class RandomSizeCrop(v2.Transform):  # type: ignore[misc]  # torchvision ships no types
    """DETR's crop: both sides drawn between two bounds, or up to the image's."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        """A window of the image."""
        full = v2.functional.get_size(flat_inputs[0])
        size = [_draw(min(self.low, side), min(self.high, side)) for side in full]
        top, left = (_draw(0, whole - crop) for whole, crop in zip(full, size, strict=True))
        return {"top": top, "left": left, "height": size[0], "width": size[1]}

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        """The window of an image or of boxes."""
        return v2.functional.crop(inpt, **params)


def _draw(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


class TorchvisionPipeline(Dataset[Any]):
    """torchvision's reference for detection with DETR's augmentation."""

    def __init__(self, source: Source) -> None:
        self.source = source
        config = source.data()
        self.annotations = build_dataset(config, "train").annotations
        self.num_images = len(self.annotations)
        resize = v2.RandomShortestSize(list(config.train_sizes), config.max_size)
        crop = v2.Compose([
            v2.RandomShortestSize(list(config.crop_resize_sizes)),
            RandomSizeCrop(config.crop_min_size, config.crop_max_size),
            resize,
        ])  # fmt: skip
        self.transform = v2.Compose([
            v2.RandomHorizontalFlip(0.5),
            v2.RandomChoice([resize, crop]),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.ConvertBoundingBoxFormat(tv_tensors.BoundingBoxFormat.XYXY),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ])  # fmt: skip

    def decode(self, epoch: int, position: int) -> tuple[Any, dict[str, Any]]:
        """The image, and its boxes and labels."""
        index = position % self.num_images
        with Image.open(self.annotations.image_path(index)) as file:
            image = file.convert("RGB")
        labels, boxes = self.annotations.targets(index)
        boxes = tv_tensors.BoundingBoxes(
            boxes,
            format=tv_tensors.BoundingBoxFormat.XYXY,
            canvas_size=self.annotations.image_size(index),
        )
        return image, {"boxes": boxes, "labels": labels}

    def augment(self, decoded: tuple[Any, dict[str, Any]]) -> tuple[Tensor, dict[str, Any]]:
        """A float image and its targets."""
        image, target = self.transform(*decoded)
        return image, target

    def collate(self, samples: Sequence[tuple[Tensor, dict[str, Any]]]) -> Any:
        """Float images padded to the largest, and a mask of the padding."""
        images, targets = zip(*samples, strict=True)
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        pixels = torch.zeros(len(images), 3, height, width)
        mask = torch.ones(len(images), height, width, dtype=torch.bool)
        for image, row, row_mask in zip(images, pixels, mask, strict=True):
            row[:, : image.shape[1], : image.shape[2]].copy_(image)
            row_mask[: image.shape[1], : image.shape[2]] = False
        return pixels, mask, targets

    def loader(self, epoch: int, num_workers: int) -> DataLoader[Any]:
        """A shuffling loader, as in the reference."""
        return DataLoader(
            self,
            self.source.batch,
            shuffle=True,
            drop_last=True,
            num_workers=num_workers,
            collate_fn=self.collate,
            generator=torch.Generator().manual_seed(epoch),
        )

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> Any:
        return self.augment(self.decode(0, index))


def generate_data_set(folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Write JPEG files of COCO's most frequent sizes, with about its bytes per pixel.

    Returns:
        the content of their annotation file, with a box per image.
    """
    rng = np.random.default_rng(seed)
    sizes = ((640, 480), (480, 640), (640, 427), (500, 375), (640, 426), (427, 640))
    images, boxes = [], []
    for image_id in range(1, count + 1):
        width, height = sizes[int(rng.integers(len(sizes)))]
        coarse = rng.integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noise = rng.normal(0, 12, (height, width, 1))
        pixels = (np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)
        name = f"{image_id:012d}.jpg"
        Image.fromarray(pixels).save(folder / name, quality=90)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        box = [width / 4, height / 4, 100, 100]
        boxes.append({"id": image_id, "image_id": image_id, "category_id": 1, "bbox": box})
    return {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
