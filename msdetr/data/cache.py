"""Decoded images in shared memory: each is decoded once, by the process that needs it first.

The memory is a file in `/dev/shm` that all loader workers, and all ranks of a machine, read and
write by its descriptor. It has no name while it is in use, so that it is gone when the last process
ends, however that ends. Each image has its place from the start: processes need no lock, and two
that decode the same image write the same bytes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import weakref
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")

_COUNTER_BYTES = 8
# What is known of an image. A decoder can make JPEG files smaller (`max_scale` of `decode_image`);
# those draws bypass the cache, so that its samples are those of the files.
_EMPTY, _STORED, _NEVER_SMALLER = range(3)


class ImageCache:
    """Decoded images of one data set, at their full size.

    A JPEG file that a draw reads at 1/2 or less is still decoded each time: that is cheap, and its
    pixels are not those that reducing the full image would give.
    """

    def __init__(
        self,
        image_sizes: NDArray[np.int64],
        name: str,
        *,
        folder: Path,
        num_processes: int = 1,
    ) -> None:
        """Take part in the cache `name`, which is empty at first.

        Args:
            image_sizes: [N, 2], (height, width) in pixels.
            name: the same for those that share it; a file name.
            folder: of a file system in memory.
            num_processes: how many take part, each once; loader workers inherit it and do not
                count.

        Raises:
            ValueError: there is no such folder, or the images do not fit into its memory.
        """
        states = _COUNTER_BYTES + len(image_sizes)
        num_bytes = 3 * image_sizes.prod(axis=1)
        self._offsets = states + np.concatenate(([0], np.cumsum(num_bytes)))
        # A copy: PyTorch moves a tensor that goes to another process, and views of it dangle.
        self._sizes = image_sizes.copy()
        self._descriptor = _open_shared(folder / name, int(self._offsets[-1]), num_processes)
        weakref.finalize(self, os.close, self._descriptor)

    def load(self, index: int, max_scale: int) -> NDArray[np.uint8] | None:
        """The pixels [H, W, 3] of image `index`, if they are stored and what `decode_image` gives
        for `max_scale`."""
        state = os.pread(self._descriptor, 1, _COUNTER_BYTES + index)[0]
        if state == _EMPTY or (state == _STORED and max_scale > 1):
            return None
        pixels = np.empty((*self._sizes[index], 3), dtype=np.uint8)
        _transfer(os.preadv, self._descriptor, pixels, int(self._offsets[index]))
        return pixels

    def store(self, index: int, pixels: NDArray[np.uint8], max_scale: int) -> None:
        """Keep image `index`, as `decode_image` gave it for `max_scale` with a scale of 1.

        Args:
            index: of the image.
            pixels: [H, W, 3]
            max_scale: that it was decoded with.
        """
        assert pixels.shape == (*self._sizes[index], 3)
        pixels = np.ascontiguousarray(pixels)
        _transfer(os.pwritev, self._descriptor, pixels, int(self._offsets[index]))
        # Only now: whoever reads the state then reads all of the pixels.
        state = _STORED if max_scale == 1 else _NEVER_SMALLER
        os.pwrite(self._descriptor, bytes([state]), _COUNTER_BYTES + index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._descriptor = state["_descriptor"].detach()
        weakref.finalize(self, os.close, self._descriptor)


def open_image_cache(image_sizes: NDArray[np.int64], *identity: str) -> ImageCache:
    """The cache that the ranks on this machine share.

    torchrun tells a rank how many there are (`LOCAL_WORLD_SIZE`), and starts all of them: they have
    one parent process. Other ranks than torchrun's have a cache each.

    Args:
        image_sizes: [N, 2], (height, width) of the images in pixels.
        identity: strings that tell the set and the way that it is decoded from all others.

    Raises:
        ValueError: the images do not fit into the memory that is free.
    """
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    owner = os.getppid() if num_processes > 1 else os.getpid()
    run = (owner, os.environ.get("TORCHELASTIC_RESTART_COUNT"))
    digest = hashlib.sha256(repr((run, identity)).encode() + image_sizes.tobytes()).hexdigest()
    name = f"msdetr-{os.getuid()}-{digest[:32]}"
    return ImageCache(image_sizes, name, folder=SHARED_MEMORY, num_processes=num_processes)


def _open_shared(path: Path, size: int, num_processes: int) -> int:
    """Descriptor of the file that `num_processes` share. The last to come reserves its memory and
    removes its name: before that it is empty, so that a crash leaves next to nothing."""
    if not path.parent.is_dir():
        raise ValueError(
            f"--data.cache memory needs {path.parent}, which does not exist here: use none"
        )
    descriptor = _open_and_lock(path)
    try:
        _check_free_memory(path.parent, size)
        counter = int.from_bytes(os.pread(descriptor, _COUNTER_BYTES, 0), "little") + 1
        os.pwrite(descriptor, counter.to_bytes(_COUNTER_BYTES, "little"), 0)
        os.truncate(descriptor, size)
        if counter >= num_processes:
            path.unlink()
            logger.info("reserving %.1f GiB of shared memory for decoded images", size / 2**30)
            _reserve(descriptor, size, path.parent)
    except BaseException:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        raise
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return descriptor


def _open_and_lock(path: Path) -> int:
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # Its name was removed meanwhile: the next one is a new file.


def _reserve(descriptor: int, size: int, folder: Path) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(_too_large(folder, size, _free_bytes(folder))) from None


def _check_free_memory(folder: Path, size: int) -> None:
    free = _free_bytes(folder)
    if size > free:
        raise ValueError(_too_large(folder, size, free))


def _too_large(folder: Path, size: int, free: int) -> str:
    return (
        f"--data.cache memory needs {size} bytes ({size / 2**30:.1f} GiB) in {folder} for the "
        f"decoded images, {free} bytes ({free / 2**30:.1f} GiB) are free: use --data.cache none, "
        f"or enlarge {folder} (in a container: --shm-size)"
    )


def _free_bytes(folder: Path) -> int:
    """What may be written to `folder`: room in its file system, and memory for it."""
    file_system = os.statvfs(folder)
    free = file_system.f_bavail * file_system.f_frsize
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = min(free, int(line.split()[1]) * 1024)
    return free


def _transfer(
    call: Callable[[int, list[memoryview], int], int],
    descriptor: int,
    pixels: NDArray[np.uint8],
    offset: int,
) -> None:
    """All of `pixels` by `os.preadv` or `os.pwritev`, which may do a part (2 GiB at most)."""
    rest = pixels.data.cast("B")
    while rest:
        done = call(descriptor, [rest], offset)
        assert done > 0, "the file has the size of all images"
        rest, offset = rest[done:], offset + done
