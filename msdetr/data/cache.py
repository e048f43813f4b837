"""Decoded images in shared memory: each is decoded once, by the process that needs it first.

The memory is a file in `/dev/shm` that all loader workers, and all ranks of a machine, read and
write by its descriptor. It has no name while it is in use, so that the system frees it when the
last process ends, even by a crash. Each image has a fixed place: processes need no lock, and two of
them that decode the same image write the same bytes.
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
# State of an image. A decoder can make JPEG files smaller (`max_scale` of `decode_image`). Such
# reads bypass the cache, so that samples are the same with and without it.
_EMPTY, _STORED, _NEVER_SMALLER = range(3)


class ImageCache:
    """Decoded images of one data set, at their full size.

    A JPEG file that a sample needs at 1/2 of its size or less is still decoded each time. That is
    cheap, and resizing the full image would give other pixels.
    """

    def __init__(
        self,
        image_sizes: NDArray[np.int64],
        name: str,
        *,
        folder: Path,
        num_processes: int = 1,
    ) -> None:
        """Opens the cache `name`, which is empty at first.

        Args:
            image_sizes: [N, 2], (height, width) in pixels.
            name: a file name, equal in all processes that share the cache.
            folder: of a file system in memory.
            num_processes: number of processes that open the cache, each once. Loader workers
                inherit it and do not count.

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
        """The pixels [H, W, 3] of image `index`, if they are stored and equal those that
        `decode_image` gives for `max_scale`."""
        state = os.pread(self._descriptor, 1, _COUNTER_BYTES + index)[0]
        if state == _EMPTY or (state == _STORED and max_scale > 1):
            return None
        pixels = np.empty((*self._sizes[index], 3), dtype=np.uint8)
        _transfer(os.preadv, self._descriptor, pixels, int(self._offsets[index]))
        return pixels

    def store(self, index: int, pixels: NDArray[np.uint8], max_scale: int) -> None:
        """Stores image `index`, which `decode_image` gave for `max_scale` with a scale of 1.

        Args:
            index: of the image.
            pixels: [H, W, 3]
            max_scale: that it was decoded with.
        """
        assert pixels.shape == (*self._sizes[index], 3)
        pixels = np.ascontiguousarray(pixels)
        _transfer(os.pwritev, self._descriptor, pixels, int(self._offsets[index]))
        # Last: a process that reads the state can then read all pixels.
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

    torchrun sets the number of ranks (`LOCAL_WORLD_SIZE`) and is the parent process of all of them.
    Without torchrun, each rank has a cache of its own.

    Args:
        image_sizes: [N, 2], (height, width) of the images in pixels.
        identity: strings that identify the data set and how it is decoded.

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
    """Descriptor of the file that `num_processes` share.

    The last process reserves the memory and removes the name. Before that the file is empty, so
    that a crash leaves an empty file behind.
    """
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
        os.close(descriptor)  # Its name has been removed: the next one is a new file.


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
    """Bytes that `folder` can take: free in its file system and available in memory."""
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
    """Transfers `pixels` by `os.preadv` or `os.pwritev`, which take at most 2 GiB per call."""
    rest = pixels.data.cast("B")
    while rest:
        done = call(descriptor, [rest], offset)
        assert done > 0, "the file has the size of all images"
        rest, offset = rest[done:], offset + done
