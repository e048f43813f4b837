from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from msdetr.config import DataConfig, EvalConfig, RunConfig, TrainConfig
from msdetr.data.dataset import DetectionDataset
from msdetr.data.loader import EpochSamples, build_eval_loader, build_train_loader
from msdetr.data.sampler import epoch_permutation, step_positions
from msdetr.data.transforms import evaluation_transform, training_transform

CONFIG = RunConfig(
    data=DataConfig(
        train_sizes=(32, 40, 48),
        crop_resize_sizes=(30, 40),
        crop_min_size=20,
        crop_max_size=40,
        test_size=32,
        max_size=64,
        pad_multiple=16,
        target_buckets=(2, 4),
        num_workers=0,
    ),
    train=TrainConfig(batch_size=4),
    eval=EvalConfig(batch_size=3),
    seed=7,
)


def with_workers(num_workers: int) -> RunConfig:
    return dataclasses.replace(
        CONFIG, data=dataclasses.replace(CONFIG.data, num_workers=num_workers)
    )


@pytest.fixture
def dataset(noise_coco):
    folder = noise_coco(18)
    annotations = folder.load()
    return DetectionDataset(annotations, training_transform(CONFIG.data))


def tensors(batch):
    return (*batch.images, *batch.targets, batch.image_ids, batch.original_sizes)


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for x, y in zip(tensors(a), tensors(b), strict=True):
            assert torch.equal(x, y)


def test_workers_change_nothing(dataset):
    alone = list(build_train_loader(CONFIG, dataset, epoch=2))
    shared = list(build_train_loader(with_workers(2), dataset, epoch=2))
    assert len(alone) == 4
    assert_same(alone, shared)


def test_epochs_and_seeds_differ(dataset):
    first = list(build_train_loader(CONFIG, dataset, epoch=0))
    assert_same(first, list(build_train_loader(CONFIG, dataset, epoch=0)))
    others = (
        build_train_loader(CONFIG, dataset, epoch=1),
        build_train_loader(dataclasses.replace(CONFIG, seed=8), dataset, epoch=0),
    )
    for other in others:
        ids = [batch.image_ids.tolist() for batch in other]
        assert ids != [batch.image_ids.tolist() for batch in first]


def test_a_run_can_start_at_any_step(dataset):
    whole = list(build_train_loader(CONFIG, dataset, epoch=1))
    for num_workers in (0, 2):
        config = with_workers(num_workers)
        rest = build_train_loader(config, dataset, epoch=1, first_step=3)
        assert len(rest) == 1
        assert_same(whole[3:], list(rest))
    assert list(build_train_loader(with_workers(2), dataset, epoch=1, first_step=4)) == []


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_same_global_batches(dataset, world_size):
    whole = list(build_train_loader(CONFIG, dataset, epoch=0))
    ranks = [
        list(build_train_loader(CONFIG, dataset, epoch=0, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    share = 4 // world_size
    for step, batch in enumerate(whole):
        for rank in range(world_size):
            part = ranks[rank][step]
            begin = rank * share
            rows = slice(begin, begin + share)
            assert torch.equal(part.image_ids, batch.image_ids[rows])
            assert torch.equal(part.targets.count, batch.targets.count[rows])
            for i in range(share):
                height, width = part.images.sizes[i].tolist()
                assert torch.equal(
                    part.images.pixels[i, :, :height, :width],
                    batch.images.pixels[begin + i, :, :height, :width],
                )
                count = part.targets.count[i]
                assert torch.equal(
                    part.targets.boxes[i, :count], batch.targets.boxes[begin + i, :count]
                )


def test_any_step_can_be_reproduced(dataset):
    for step, batch in enumerate(build_train_loader(CONFIG, dataset, epoch=3)):
        positions = step_positions(step, batch_size=4, rank=0, world_size=1)
        indices = epoch_permutation(7, 3, 18)[list(positions)]
        assert batch.image_ids.tolist() == dataset.annotations.table.image_ids[indices].tolist()


def test_a_small_set_goes_round_with_new_augmentation(noise_coco):
    folder = noise_coco(3)
    annotations = folder.load()
    dataset = DetectionDataset(annotations, training_transform(CONFIG.data))
    config = dataclasses.replace(CONFIG, train=TrainConfig(batch_size=30))
    (batch,) = build_train_loader(config, dataset, epoch=0)
    ids, counts = np.unique(batch.image_ids.numpy(), return_counts=True)
    assert ids.tolist() == [100, 101, 102]
    assert counts.tolist() == [10, 10, 10]
    assert len({tuple(size) for size in batch.images.sizes[batch.image_ids == 100].tolist()}) > 1
    samples = EpochSamples(dataset, seed=7, epoch=0)
    assert samples[0].image_id == samples[3].image_id


def test_the_global_generator_is_left_alone(dataset):
    for num_workers in (0, 2):
        config = with_workers(num_workers)
        before = torch.get_rng_state()
        list(build_train_loader(config, dataset, epoch=0))
        list(build_eval_loader(config, dataset))
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world_size", [1, 2, 5, 25])
def test_evaluation_takes_every_image_once(dataset, world_size):
    dataset = DetectionDataset(dataset.annotations, evaluation_transform(CONFIG.data))
    ids, num_batches = [], []
    for rank in range(world_size):
        batches = list(build_eval_loader(CONFIG, dataset, rank=rank, world_size=world_size))
        num_batches.append(len(batches))
        for batch in batches:
            assert 1 <= len(batch.image_ids) <= 3
            ids += batch.image_ids.tolist()
    assert sorted(ids) == dataset.annotations.table.image_ids.tolist()
    assert (min(num_batches) == 0) == (world_size > 18)


def test_evaluation_in_workers(dataset):
    dataset = DetectionDataset(dataset.annotations, evaluation_transform(CONFIG.data))
    alone = list(build_eval_loader(CONFIG, dataset))
    assert_same(alone, list(build_eval_loader(with_workers(2), dataset)))


def test_batch_size_must_be_divisible(dataset):
    with pytest.raises(ValueError, match="must be divisible"):
        build_train_loader(CONFIG, dataset, epoch=0, first_step=99, world_size=3)


def test_a_broken_image_is_named(dataset):
    path = dataset.annotations.image_path(5)
    path.write_bytes(path.read_bytes()[:50])
    for num_workers in (0, 1):
        with pytest.raises(ValueError, match=path.name):
            list(build_eval_loader(with_workers(num_workers), dataset))


class ThreadCount(DetectionDataset):
    """The image id of a sample is the number of threads that PyTorch used to make it."""

    def __getitem__(self, index: int):
        return super().__getitem__(index)._replace(image_id=torch.get_num_threads())


def test_workers_use_one_thread(dataset):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        counted = ThreadCount(dataset.annotations, evaluation_transform(CONFIG.data))
        batch = next(iter(build_eval_loader(with_workers(1), counted)))
    finally:
        torch.set_num_threads(before)
    assert set(batch.image_ids.tolist()) == {1}


def test_workers_make_images_in_shared_memory(dataset):
    for num_workers in (0, 1):
        batch = next(iter(build_eval_loader(with_workers(num_workers), dataset)))
        assert batch.images.pixels.is_shared() == (num_workers > 0)
        assert batch.images.pixels.is_contiguous()


@pytest.mark.gpu
def test_batches_are_pinned(dataset):
    for batch in build_train_loader(with_workers(1), dataset, epoch=0):
        assert all(tensor.is_pinned() for tensor in tensors(batch))


@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches_split_the_share_of_a_rank(dataset, world_size):
    train = dataclasses.replace(CONFIG.train, accumulation_steps=2)
    config = dataclasses.replace(CONFIG, train=train)
    for rank in range(world_size):
        whole = list(build_train_loader(CONFIG, dataset, epoch=0, rank=rank, world_size=world_size))
        parts = list(build_train_loader(config, dataset, epoch=0, rank=rank, world_size=world_size))
        assert len(parts) == 2 * len(whole)
        for step, batch in enumerate(whole):
            ids = torch.cat([part.image_ids for part in parts[2 * step : 2 * step + 2]])
            assert torch.equal(ids, batch.image_ids)
        rest = build_train_loader(
            config, dataset, epoch=0, first_step=1, rank=rank, world_size=world_size
        )
        assert [part.image_ids.tolist() for part in rest] == [
            part.image_ids.tolist() for part in parts[2:]
        ]
