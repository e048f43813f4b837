from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msdetr.config import DataConfig, EvalConfig, RunConfig, TrainConfig
from msdetr.data import cache as cache_module
from msdetr.data import dataset as dataset_module
from msdetr.data.cache import ImageCache, open_image_cache
from msdetr.data.dataset import DetectionDataset, build_dataset
from msdetr.data.loader import build_eval_loader, build_train_loader

pytestmark = pytest.mark.skipif(
    not cache_module.SHARED_MEMORY.is_dir(), reason="shared memory has no folder here"
)

SIZES = np.array([[4, 6], [9, 5], [1, 1]])
CONFIG = RunConfig(
    data=DataConfig(
        train_sizes=(32, 40, 48),
        crop_resize_sizes=(30, 40),
        crop_min_size=20,
        crop_max_size=40,
        test_size=32,
        max_size=64,
        cache="memory",
        num_workers=0,
    ),
    train=TrainConfig(batch_size=4),
    eval=EvalConfig(batch_size=3),
)


def pixels(index: int, seed: int = 0) -> np.ndarray:
    shape = (*SIZES[index].tolist(), 3)
    return np.random.default_rng((seed, index)).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def config(noise_coco):
    """18 images of noise as PNG files, and a photograph of 400 x 300 that is decoded smaller."""
    folder = noise_coco(18)
    content = folder.annotations.read_text()
    images = '"images": ['
    assert images in content
    photograph = '{"id": 1, "file_name": "large.jpg", "width": 400, "height": 300}, '
    folder.annotations.write_text(content.replace(images, images + photograph))
    rng = np.random.default_rng(1)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((400, 300))
    smooth.save(folder.images / "large.jpg")
    data = dataclasses.replace(
        CONFIG.data,
        train_images=folder.images,
        train_annotations=folder.annotations,
        val_images=folder.images,
        val_annotations=folder.annotations,
    )
    return dataclasses.replace(CONFIG, data=data)


def with_data(config: RunConfig, **changes) -> RunConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def tensors(batches):
    return [
        tensor
        for batch in batches
        for tensor in (*batch.images, *batch.targets, batch.image_ids, batch.original_sizes)
    ]


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_are_those_of_the_files(config, num_workers):
    plain = build_dataset(with_data(config, cache="none").data, "train")
    cached = build_dataset(config.data, "train")
    assert plain.cache is None
    config = with_data(config, num_workers=num_workers)
    for epoch in range(4):
        first, second = (
            tensors(build_train_loader(config, data, epoch=epoch)) for data in (plain, cached)
        )
        assert_same(first, second)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_second_epoch_reads_no_file(config, num_workers):
    dataset = build_dataset(config.data, "val")
    config = with_data(config, num_workers=num_workers)
    first = tensors(build_eval_loader(config, dataset))
    large = dataset.annotations.image_path(0)
    for path in large.parent.iterdir():
        if path != large:  # decoded at 1/8: that stays with the file
            path.write_bytes(b"")
    assert_same(first, tensors(build_eval_loader(config, dataset)))
    large.write_bytes(b"")
    with pytest.raises(ValueError, match=r"large\.jpg: cannot decode"):
        tensors(build_eval_loader(config, dataset))


def test_an_image_is_decoded_once(config, monkeypatch):
    dataset = build_dataset(config.data, "train")
    decoded = []

    def decode_and_count(path, **options):
        decoded.append((path.name, options["max_scale"]))
        return decode(path, **options)

    decode = dataset_module.decode_image
    monkeypatch.setattr(dataset_module, "decode_image", decode_and_count)
    for epoch in range(5):
        tensors(build_train_loader(config, dataset, epoch=epoch))
    # The loader of four images per step leaves some out, every epoch others.
    small = [name for name, _ in decoded if name != "large.jpg"]
    assert len(small) == len(set(small)) > 12
    assert all(scale > 1 for name, scale in decoded if name == "large.jpg")


def test_a_broken_image_is_named(config):
    dataset = build_dataset(config.data, "val")
    path = dataset.annotations.image_path(5)
    path.write_bytes(path.read_bytes()[:50])
    for num_workers in (0, 1):
        with pytest.raises(ValueError, match=path.name):
            tensors(build_eval_loader(with_data(config, num_workers=num_workers), dataset))


def test_what_is_stored_is_loaded(tmp_path):
    cache = ImageCache(SIZES, "a", folder=tmp_path)
    assert all(cache.load(index, 1) is None for index in range(3))
    for index in (2, 0, 1):
        cache.store(index, pixels(index), 1)
    for index in range(3):
        np.testing.assert_array_equal(cache.load(index, 1), pixels(index))


def test_draws_that_decode_smaller_bypass_full_images(tmp_path):
    cache = ImageCache(SIZES, "a", folder=tmp_path)
    cache.store(0, pixels(0), 1)
    assert cache.load(0, 1) is not None
    assert cache.load(0, 2) is None
    # The decoder was allowed to decode smaller and did not, so it never will for this image.
    cache.store(0, pixels(0), 4)
    for max_scale in (1, 2, 8):
        np.testing.assert_array_equal(cache.load(0, max_scale), pixels(0))


def test_transfers_in_parts(tmp_path, monkeypatch):
    cache = ImageCache(SIZES, "a", folder=tmp_path)
    for name in ("preadv", "pwritev"):
        call = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda fd, parts, offset, call=call: call(fd, [parts[0][:7]], offset)
        )
    for index in range(3):
        cache.store(index, pixels(index), 1)
    for index in range(3):
        np.testing.assert_array_equal(cache.load(index, 1), pixels(index))


def test_processes_of_a_machine_share_one(tmp_path):
    first = ImageCache(SIZES, "a", num_processes=2, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "a").stat().st_blocks * 512 <= 4096  # nothing is reserved yet
    second = ImageCache(SIZES, "a", num_processes=2, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []  # gone with the last process, whatever ends it
    other = ImageCache(SIZES, "a", num_processes=2, folder=tmp_path)
    first.store(1, pixels(1), 1)
    np.testing.assert_array_equal(second.load(1, 1), pixels(1))
    assert other.load(1, 1) is None


def test_ranks_find_each_other(monkeypatch, tmp_path):
    monkeypatch.setattr(cache_module, "SHARED_MEMORY", tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for identity in ("train", "val"):
        for _ in range(2):  # as two ranks: they have the same parent
            open_image_cache(SIZES, identity)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    open_image_cache(SIZES, "train")
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    for identity in ("train", "val"):
        open_image_cache(SIZES, identity)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    open_image_cache(SIZES, "train")
    assert len(list(tmp_path.iterdir())) == 1


def fill(cache: ImageCache, rounds: int) -> None:
    for _ in range(rounds):
        for index in range(len(SIZES)):
            result = cache.load(index, 1)
            assert result is None or np.array_equal(result, pixels(index))
            cache.store(index, pixels(index), 1)


def test_processes_may_store_the_same_image_at_once(tmp_path):
    cache = ImageCache(SIZES, "a", folder=tmp_path)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(cache, 200)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    for index in range(3):
        np.testing.assert_array_equal(cache.load(index, 1), pixels(index))


def test_a_cache_goes_to_processes_that_are_not_forked(tmp_path):
    sizes = torch.from_numpy(SIZES.repeat(1000, axis=0))
    cache = ImageCache(sizes.numpy(), "a", folder=tmp_path)
    sent, _ = pickle.loads(ForkingPickler.dumps((cache, sizes)))
    del sizes
    for index in (0, 1000, 2000):
        cache.store(index, pixels(index // 1000), 1)
        np.testing.assert_array_equal(sent.load(index, 1), pixels(index // 1000))


def test_descriptors_are_closed(tmp_path):
    def num_open():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = num_open()
    cache = ImageCache(SIZES, "a", folder=tmp_path)
    assert num_open() == before + 1
    del cache
    assert num_open() == before


def test_too_little_memory_is_refused_at_the_start(config, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_free_bytes", lambda folder: 1000)
    for num_processes in (1, 2):
        with pytest.raises(ValueError, match=r"needs 2\d{5} bytes .* 1000 bytes .* are free"):
            ImageCache(np.array([[300, 300]]), "a", num_processes=num_processes, folder=tmp_path)
        assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match=r"use --data\.cache none"):
        build_dataset(config.data, "train")


def test_memory_that_is_gone_before_it_is_reserved_is_refused(tmp_path, monkeypatch):
    def no_space(descriptor, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(ValueError, match=r"needs 221 bytes .* in .* for the decoded images"):
        ImageCache(SIZES, "a", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_free_memory_is_counted(tmp_path):
    free = cache_module._free_bytes(tmp_path)
    status = os.statvfs(tmp_path)
    assert 0 < free <= status.f_blocks * status.f_frsize


def test_without_a_folder_for_shared_memory(tmp_path):
    with pytest.raises(ValueError, match=r"needs .*absent, which does not exist here: use none"):
        ImageCache(SIZES, "a", folder=tmp_path / "absent")


def test_cached_samples_are_not_shared(config):
    """What a sample's user writes must not reach the cache."""
    dataset = build_dataset(config.data, "val")
    assert isinstance(dataset, DetectionDataset)
    before = dataset[3].pixels.clone()
    dataset[3].pixels.zero_()
    assert torch.equal(dataset[3].pixels, before)
