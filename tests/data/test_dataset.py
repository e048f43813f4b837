from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from msdetr.annotations.labels import LabelMap
from msdetr.config import DataConfig
from msdetr.data.dataset import DetectionDataset, build_dataset
from msdetr.data.transforms import evaluation_transform, training_transform

SMALL = DataConfig(
    train_sizes=(48, 64),
    crop_resize_sizes=(40, 50),
    crop_min_size=30,
    crop_max_size=45,
    test_size=40,
    max_size=80,
)


@pytest.fixture
def folder(write_coco):
    """One image of 60 x 30 with a red square, a blue bar, and a crowd."""
    annotations = [
        {"id": 1, "image_id": 9, "category_id": 7, "bbox": [6, 3, 12, 12]},
        {"id": 2, "image_id": 9, "category_id": 3, "bbox": [30, 15, 30, 6]},
        {"id": 3, "image_id": 9, "category_id": 3, "bbox": [0, 0, 60, 30], "iscrowd": 1},
    ]
    image = {"id": 9, "file_name": "sub/a.png", "width": 60, "height": 30}
    folder = write_coco([image], annotations)
    pixels = np.zeros((30, 60, 3), dtype=np.uint8)
    pixels[3:15, 6:18, 0] = 255
    pixels[15:21, 30:60, 2] = 255
    (folder.images / "sub").mkdir()
    Image.fromarray(pixels).save(folder.images / "sub/a.png")
    return folder


def test_a_sample(folder):
    annotations = folder.load()
    dataset = DetectionDataset(annotations, evaluation_transform(SMALL))
    assert len(dataset) == 1
    sample = dataset[0]
    assert sample.pixels.shape == (3, 40, 80)
    assert sample.pixels.dtype == torch.uint8
    assert sample.pixels[:, 12, 16].tolist() == [255, 0, 0]
    assert sample.pixels[:, 24, 60].tolist() == [0, 0, 255]
    assert sample.labels.tolist() == [1, 0]
    torch.testing.assert_close(
        sample.boxes, torch.tensor([[0.2, 0.3, 0.2, 0.4], [0.75, 0.6, 0.5, 0.2]])
    )
    assert (sample.image_id, sample.original_size) == (9, (30, 60))


@pytest.mark.parametrize("index", [-1, 1])
def test_other_indices_are_refused(folder, index):
    annotations = folder.load()
    with pytest.raises(IndexError):
        DetectionDataset(annotations, evaluation_transform(SMALL))[index]


def test_a_sample_depends_on_its_generator_alone(folder):
    annotations = folder.load()
    dataset = DetectionDataset(annotations, training_transform(SMALL))
    samples = []
    for seed in (0, 1, 2, 3, 0):
        torch.manual_seed(seed)  # global generators have no say
        np.random.seed(seed)
        samples.append(dataset.sample(0, np.random.default_rng(seed)))
    torch.testing.assert_close(samples[0].pixels, samples[4].pixels, rtol=0, atol=0)
    torch.testing.assert_close(samples[0].boxes, samples[4].boxes, rtol=0, atol=0)
    boxes = [sample.boxes for sample in samples[:4]]
    assert not all(len(a) == len(boxes[0]) and torch.equal(a, boxes[0]) for a in boxes)


def test_exif_policy_reaches_the_decoder(write_coco):
    folder = write_coco([{"id": 1, "file_name": "a.jpg", "width": 20, "height": 40}])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(folder.images / "a.jpg", exif=exif)
    annotations = folder.load()
    transform = evaluation_transform(SMALL)
    assert DetectionDataset(annotations, transform, "apply")[0].pixels.shape == (3, 80, 40)
    with pytest.raises(ValueError, match="msdetr doctor"):
        DetectionDataset(annotations, transform, "ignore")[0]


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    inside = folder.images / "sub" / "a.png"
    inside.rename(tmp_path / "a.png")
    inside.symlink_to(tmp_path / "a.png")
    annotations = folder.load()
    with pytest.raises(ValueError, match="leads out of the image folder"):
        DetectionDataset(annotations, evaluation_transform(SMALL))[0]


def test_splits_differ_in_their_transform(folder):
    config = dataclasses.replace(
        SMALL,
        train_images=folder.images,
        train_annotations=folder.annotations,
        val_images=folder.images,
        val_annotations=folder.annotations,
        label_layout="coco",
        exif="apply",
    )
    train, val = build_dataset(config, "train"), build_dataset(config, "val")
    assert train.transform == training_transform(config)
    assert val.transform == evaluation_transform(config)
    assert train.exif == val.exif == "apply"
    assert train.annotations.label_map.num_classes == 91
    label_map = LabelMap((3, 7, 8), (0, 1, 2), ("cat", "dog", "cow"), 3)
    assert build_dataset(config, "val", label_map=label_map).annotations.label_map is label_map


@pytest.mark.parametrize("name", ["coco64", "bccd"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_images(shared_data, name, split):
    config = DataConfig(root=shared_data / name)
    dataset = build_dataset(config, split)
    num_boxes = 0
    for index in range(0, len(dataset), 8):
        sample = dataset[index]
        assert sample.pixels.float().std() > 5
        assert 128 <= min(sample.pixels.shape[1:]) <= 800
        assert max(sample.pixels.shape) <= 1333
        corners = torch.cat(
            (
                sample.boxes[:, :2] - sample.boxes[:, 2:] / 2,
                sample.boxes[:, :2] + sample.boxes[:, 2:] / 2,
            )
        )
        assert ((corners > -1e-6) & (corners < 1 + 1e-6)).all()
        assert (sample.labels < dataset.annotations.label_map.num_classes).all()
        num_boxes += len(sample.boxes)
    assert num_boxes > 20
