"""File names of images: safe paths inside the image folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePath


def check_file_name(file_name: str) -> None:
    """Refuses a name that is not a relative path below the image folder, by its text alone.

    Raises:
        ValueError: empty, absolute (also in Windows' way), with a `..` in it, or not Unicode.
    """
    parts = file_name.replace("\\", "/").split("/")
    is_absolute = not parts[0] or parts[0][1:2] == ":"
    if is_absolute or ".." in parts or "\0" in file_name:
        raise ValueError(
            f"file name {file_name!r} is not a relative path inside the image folder: "
            "absolute paths and '..' are refused"
        )
    try:
        file_name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"file name {file_name!r} contains half of a character") from None


def resolve_image_path(folder: Path, file_name: str) -> Path:
    """The file `file_name` in `folder`, symbolic links followed.

    Raises:
        ValueError: the name leaves the folder, by its text or through a symbolic link, or links
            go in a circle.
    """
    check_file_name(file_name)
    real_folder = os.path.realpath(folder)
    if not _has_links(real_folder, file_name):
        return Path(real_folder, file_name)
    try:
        path = Path(real_folder, file_name).resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise ValueError(f"{folder / file_name}: {error}") from error
    if not path.is_relative_to(real_folder):
        raise ValueError(
            f"{folder / file_name}: a symbolic link leads out of the image folder, to {path}; "
            "copy the file into the folder"
        )
    return path


def _has_links(folder: str, file_name: str) -> bool:
    """Whether `file_name` or a folder in it is a symbolic link. Resolving the whole path of every
    image would take ten times as long."""
    path = folder
    for part in PurePath(file_name).parts:
        path = f"{path}{os.sep}{part}"
        try:
            if stat.S_ISLNK(os.lstat(path).st_mode):
                return True
        except OSError:  # It does not exist: nothing to follow.
            return False
    return False
