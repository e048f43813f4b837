from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msdetr.data.images import decode_image

ORIENTATION = 0x0112


def corners(height: int = 40, width: int = 80) -> np.ndarray:
    """Red, green, blue and white quarters, clockwise from the top left."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2, 0] = 255
    pixels[: height // 2, width // 2 :, 1] = 255
    pixels[height // 2 :, width // 2 :, 2] = 255
    pixels[height // 2 :, : width // 2] = 255
    return pixels


def save_with_orientation(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(corners()).save(path, exif=exif, quality=95)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_policies(tmp_path, orientation):
    path = tmp_path / "a.jpg"
    save_with_orientation(path, orientation)
    stored = np.asarray(decode_image(path, expected_size=(40, 80)).image)
    assert np.abs(stored.astype(int) - corners()).mean() < 5

    turned = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x.transpose(1, 0, 2), 2),
        8: lambda x: np.rot90(x),
    }[orientation](stored)
    applied = decode_image(path, exif="apply", expected_size=turned.shape[:2]).image
    np.testing.assert_array_equal(np.asarray(applied), turned)


def test_a_meaningless_orientation_is_upright(tmp_path):
    save_with_orientation(tmp_path / "a.jpg", 77)
    assert decode_image(tmp_path / "a.jpg", exif="apply").image.size == (80, 40)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_usual_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.fromarray(corners()).convert(mode).save(path)
    decoded = decode_image(path).image
    assert (decoded.mode, decoded.size) == ("RGB", (80, 40))
    if mode in ("RGBA", "CMYK", "YCbCr"):
        assert np.abs(np.asarray(decoded).astype(int) - corners()).mean() < 5


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = np.arange(256).reshape(16, 16)
    for channel in np.moveaxis(np.asarray(decode_image(tmp_path / "a.png").image), -1, 0):
        np.testing.assert_array_equal(channel, expected)


def test_pixels_without_a_range_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=r"a\.tiff: cannot decode the image: mode 'F'"):
        decode_image(tmp_path / "a.tiff")


def test_broken_files_are_named(tmp_path):
    Image.fromarray(corners()).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    for name, message in {
        "absent.jpg": "the image does not exist",
        "truncated.jpg": "cannot decode the image: .*(?i:truncated)",
        "text.jpg": "cannot decode the image: cannot identify",
        ".": "cannot decode the image",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            decode_image(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


def test_another_size_than_annotated_is_refused(tmp_path):
    path = tmp_path / "a.jpg"
    save_with_orientation(path, 6)
    with pytest.raises(ValueError, match=r"is 80 x 40 .* says 40 x 80; run `msdetr doctor`"):
        decode_image(path, expected_size=(80, 40))
    with pytest.raises(ValueError, match=r"is 40 x 80 .* says 80 x 40"):
        decode_image(path, exif="apply", expected_size=(40, 80))


@pytest.mark.parametrize(
    ("max_scale", "scale"), [(1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (50, 8)]
)
def test_jpeg_files_are_decoded_smaller(tmp_path, max_scale, scale):
    path = tmp_path / "a.jpg"
    Image.fromarray(corners(101, 163)).save(path)
    image, actual_scale = decode_image(path, expected_size=(101, 163), max_scale=max_scale)
    assert image.mode == "RGB"
    assert actual_scale == scale
    assert image.size == (-(-163 // scale), -(-101 // scale))


def test_other_files_and_turned_ones_are_decoded_in_full(tmp_path):
    Image.fromarray(corners()).save(tmp_path / "a.png")
    save_with_orientation(tmp_path / "a.jpg", 6)
    for path in (tmp_path / "a.png", tmp_path / "a.jpg"):
        assert decode_image(path, exif="apply", max_scale=8).scale == 1
    assert decode_image(tmp_path / "a.jpg", exif="ignore", max_scale=8).scale == 8
