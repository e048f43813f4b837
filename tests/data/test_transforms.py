from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from msdetr.config import DataConfig
from msdetr.data.images import DecodedImage, decode_image
from msdetr.data.transforms import (
    Geometry,
    TrainingTransform,
    evaluation_transform,
    scaled_size,
    training_transform,
    transform_boxes,
    transform_pixels,
)

DETR = training_transform(DataConfig())


def draws(transform, image_size, count=400):
    return [transform(image_size, np.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize(
    ("image_size", "shorter_side", "max_size", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1066)),
        ((640, 480), 800, 1333, (1066, 800)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((500, 500), 480, 1333, (480, 480)),
        ((333, 1000), 800, 1333, (444, 1333)),  # 1000 / 333 * 800 > 1333: 1333 * 333 / 1000
        ((200, 1000), 400, None, (400, 2000)),
        ((1, 1000), 800, 100, (1, 1000)),  # never below one pixel
    ],
)
def test_size_rule_of_detr(image_size, shorter_side, max_size, expected):
    assert scaled_size(image_size, shorter_side, max_size) == expected


@given(st.integers(20, 3000), st.integers(20, 3000), st.integers(32, 1000))
def test_size_rule_keeps_the_aspect(height, width, shorter_side):
    scaled = scaled_size((height, width), shorter_side, 1333)
    assert max(scaled) <= max(1333, shorter_side) + max(height, width) / min(height, width)
    assert min(scaled) <= shorter_side
    # One side is rounded by at most half a pixel, the other follows it, rounded down.
    scale = min(scaled) / min(height, width)
    assert abs(max(scaled) - scale * max(height, width)) <= 1


def test_evaluation_is_the_whole_image():
    for transform in (
        evaluation_transform(DataConfig()),
        training_transform(DataConfig(augmentation="none")),
    ):
        assert set(draws(transform, (480, 640), 5)) == {
            Geometry(0, 0, 480, 640, (800, 1066), flip=False)
        }


def test_flip_only_flips_and_scales():
    config = DataConfig(augmentation="flip", train_sizes=(100, 120))
    geometries = draws(training_transform(config), (50, 60))
    assert {g[:4] for g in geometries} == {(0, 0, 50, 60)}
    assert {g.size for g in geometries} == {(100, 120), (120, 144)}
    assert 140 < sum(g.flip for g in geometries) < 260


def test_detr_crops_half_of_the_images():
    geometries = draws(DETR, (480, 640))
    cropped = [g for g in geometries if g[:4] != (0, 0, 480, 640)]
    assert 140 < len(cropped) < 260
    assert 140 < sum(g.flip for g in geometries) < 260
    whole = Counter(min(g.size) for g in geometries if g[:4] == (0, 0, 480, 640))
    assert set(whole) == set(DataConfig().train_sizes)
    for g in cropped:
        assert g.top >= 0
        assert g.left >= 0
        assert g.top + g.height <= 480
        assert g.left + g.width <= 640
        # Sides of 384 to 600 pixels of an image scaled to 400, 500 or 600.
        assert min(g.height, g.width) >= 384 / 600 * 480 - 1
        # The aspect of the window is that of the result, up to whole pixels.
        assert g.size[0] / g.size[1] == pytest.approx(g.height / g.width, rel=0.01)
    # Crops reach all borders, and are not always in a corner.
    assert {g.top == 0 for g in cropped} == {True, False}
    assert any(g.top + g.height == 480 for g in cropped)
    assert any(g.left + g.width == 640 for g in cropped)


def test_draws_do_not_change_between_versions():
    """A resumed run goes on with the same augmentation."""
    assert [tuple(geometry) for geometry in draws(DETR, (480, 640), 6)] == [
        (0, 29, 461, 474, (736, 757), False),
        (0, 0, 480, 640, (480, 640), False),
        (2, 60, 460, 462, (672, 674), True),
        (2, 0, 477, 617, (512, 662), True),
        (0, 0, 480, 640, (800, 1066), False),
        (0, 0, 480, 640, (640, 853), False),
    ]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 1000))
def test_any_image_size_gives_a_window_inside(height, width, seed):
    transform = TrainingTransform(
        sizes=(64,),
        max_size=128,
        crop=True,
        crop_resize_sizes=(40,),
        crop_min_size=60,  # larger than the scaled image may be
        crop_max_size=90,
    )
    g = transform((height, width), np.random.default_rng(seed))
    assert 0 <= g.top < g.top + g.height <= height
    assert 0 <= g.left < g.left + g.width <= width
    assert min(g.size) >= 1


def published_pipeline(image, resize, region, size):
    """Resize, crop, resize, each with Pillow, one after the other."""
    top, left, height, width = region
    scaled = image.resize(resize[::-1], Image.Resampling.BILINEAR)
    cropped = scaled.crop((left, top, left + width, top + height))
    return cropped.resize(size[::-1], Image.Resampling.BILINEAR)


def test_one_resize_shows_what_resize_crop_resize_shows():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = smooth.resize((640, 480), Image.Resampling.BICUBIC)
    # 480 x 640 scaled to 500 x 666; 450 x 500 pixels of it from (30, 120); scaled to 640 x 711.
    expected = published_pipeline(image, (500, 666), (30, 120, 450, 500), (640, 711))
    window = (round(30 * 0.96), round(120 * 640 / 666), round(450 * 0.96), round(500 * 640 / 666))
    geometry = Geometry(*window, (640, 711), flip=False)
    pixels = transform_pixels(DecodedImage(image, 1), geometry)
    difference = pixels.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)
    assert np.abs(difference).mean() < 1.0
    assert np.abs(difference).max() < 8


def box_of_color(pixels: torch.Tensor) -> list[float] | None:
    """(x0, y0, x1, y1) of the red pixels, as fractions of the image."""
    red, green, _ = pixels.int()
    mask = (red - green) > 127
    if not mask.any():
        return None
    rows, columns = (torch.nonzero(mask.any(dim=dim)).flatten() for dim in (1, 0))
    height, width = mask.shape
    x0, x1 = columns[0].item() / width, (columns[-1].item() + 1) / width
    y0, y1 = rows[0].item() / height, (rows[-1].item() + 1) / height
    return [x0, y0, x1, y1]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize(
    ("image_size", "box", "config"),
    [
        # Small images enlarged, and (JPEG: decoded at 1/2 and 1/4) large ones reduced.
        (
            (67, 90),
            (20, 10, 70, 45),
            {"train_sizes": (120, 160), "crop_resize_sizes": (80,), "max_size": 220},
        ),
        (
            (803, 607),
            (101, 303, 455, 707),
            {"train_sizes": (96, 128), "crop_resize_sizes": (200, 300), "max_size": 200},
        ),
    ],
)
@pytest.mark.parametrize("augmentation", ["detr", "flip", "none"])
def test_boxes_stay_on_their_objects(tmp_path, suffix, image_size, box, config, augmentation):
    pixels = np.zeros((*image_size, 3), dtype=np.uint8)
    pixels[..., 1:] = 200
    pixels[box[1] : box[3], box[0] : box[2]] = (250, 0, 0)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, quality=95, subsampling=0)
    config = DataConfig(
        augmentation=augmentation, crop_min_size=60, crop_max_size=150, test_size=100, **config
    )
    transform = training_transform(config)

    scales, missing = set(), 0
    for geometry in draws(transform, image_size, 40):
        decoded = decode_image(path, max_scale=geometry.max_scale)
        scales.add(decoded.scale)
        result = transform_pixels(decoded, geometry)
        assert result.shape == (3, *geometry.size)
        labels, boxes = transform_boxes(torch.tensor([7]), torch.tensor([box]).float(), geometry)
        seen = box_of_color(result)
        if seen is None:
            missing += 1
            # What is left is less than a pixel, or nothing.
            size = torch.tensor(geometry.size[::-1])
            assert ((boxes[:, 2:] * size).amin(dim=1) < 1).all()
            continue
        assert labels.tolist() == [7]
        assert boxes.dtype == torch.float32
        (cx, cy, w, h) = boxes[0].tolist()
        expected = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
        in_pixels = np.tile(geometry.size[::-1], 2)
        np.testing.assert_allclose(seen * in_pixels, expected * in_pixels, atol=1.5)
    assert missing < 20
    is_large_jpeg = suffix == "jpg" and image_size[0] > 500
    assert (max(scales) > 1) == is_large_jpeg


def test_draft_decoding_gives_the_same_picture(tmp_path):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    path = tmp_path / "a.jpg"
    smooth.resize((1201, 903), Image.Resampling.BICUBIC).save(path, quality=95)
    full = decode_image(path)
    for window, scale in (((0, 0, 903, 1201), 8), ((123, 331, 500, 701), 4)):
        geometry = Geometry(*window, (100, 140), flip=True)
        draft = decode_image(path, max_scale=geometry.max_scale)
        assert (full.scale, draft.scale) == (1, scale)
        expected = transform_pixels(full, geometry).int()
        # Half a pixel of the result to either side differs by 3 on average.
        assert (expected - transform_pixels(draft, geometry).int()).abs().float().mean() < 1


def test_boxes_outside_the_window_are_dropped():
    geometry = Geometry(10, 20, 30, 40, (60, 80), flip=True)
    boxes = torch.tensor(
        [
            [0.0, 0.0, 20.0, 50.0],  # touches from the left
            [30.0, 20.0, 40.0, 30.0],  # inside
            [0.0, 0.0, 100.0, 100.0],  # all of the window
            [60.0, 40.0, 90.0, 90.0],  # touches its last corner
        ]
    )
    labels, kept = transform_boxes(torch.arange(4), boxes, geometry)
    assert labels.tolist() == [1, 2]
    # (30..40, 20..30) in a window of 40 x 30 from (20, 10), mirrored.
    expected = [[1 - 0.375, 0.5, 0.25, 1 / 3], [0.5, 0.5, 1.0, 1.0]]
    torch.testing.assert_close(kept, torch.tensor(expected))
    assert boxes[0].tolist() == [0.0, 0.0, 20.0, 50.0]  # the input is left alone


def test_no_boxes():
    geometry = Geometry(0, 0, 30, 40, (60, 80), flip=True)
    labels, boxes = transform_boxes(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), geometry)
    assert (labels.shape, boxes.shape) == ((0,), (0, 4))
