from __future__ import annotations

import pytest

from msdetr.annotations.file_names import check_file_name, resolve_image_path

UNSAFE_NAMES = [
    "",
    "/etc/passwd",
    "..",
    "../a.jpg",
    "a/../../b.jpg",
    "..\\a.jpg",
    "\\server\\a.jpg",
    "C:\\a.jpg",
    "c:a.jpg",
    "a\0.jpg",
]


@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="not a relative path inside the image folder"):
        check_file_name(name)
    with pytest.raises(ValueError, match="not a relative path inside the image folder"):
        resolve_image_path(tmp_path, name)


@pytest.mark.parametrize("name", ["a.jpg", "b/c/a.jpg", "a..b.jpg", "...jpg", "ä b.jpg"])
def test_names_inside_the_folder_are_taken(tmp_path, name):
    assert resolve_image_path(tmp_path, name) == tmp_path.resolve() / name


def test_symbolic_links_must_stay_in_the_folder(tmp_path):
    folder, outside = tmp_path / "images", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "a.jpg").touch()
    (folder / "real.jpg").touch()
    (folder / "escape.jpg").symlink_to(outside / "a.jpg")
    (folder / "escape").symlink_to(outside)
    (folder / "inside.jpg").symlink_to("real.jpg")
    (folder / "sub").mkdir()
    (folder / "sub" / "escape").symlink_to(outside)
    for name in ("escape.jpg", "escape/a.jpg", "sub/escape/a.jpg", "sub//./escape/a.jpg"):
        with pytest.raises(ValueError, match="leads out of the image folder"):
            resolve_image_path(folder, name)
    assert resolve_image_path(folder, "inside.jpg") == folder / "real.jpg"
    (folder / "circle.jpg").symlink_to("circle.jpg")
    with pytest.raises(ValueError, match=r"circle\.jpg"):
        resolve_image_path(folder, "circle.jpg").read_bytes()
    # The folder itself may be a link, and so may a folder above it.
    (tmp_path / "linked").symlink_to(folder)
    assert resolve_image_path(tmp_path / "linked", "real.jpg") == folder / "real.jpg"


def test_half_a_character_is_refused():
    with pytest.raises(ValueError, match="half of a character"):
        check_file_name("a\ud83d.jpg")
