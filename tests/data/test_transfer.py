from __future__ import annotations

import pickle

import torch
from torch.utils.data import DataLoader, Dataset

from msdetr.data.collate import Collate
from msdetr.data.dataset import Sample
from msdetr.data.transfer import CollateAndSend, PackedBatch
from msdetr.structures import Batch

COLLATE = Collate(8, (4, 8))


class Noise(Dataset):
    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        pixels = torch.randint(0, 256, (3, 20 + index, 30), dtype=torch.uint8, generator=generator)
        labels = torch.arange(index)
        boxes = torch.rand(index, 4, generator=generator)
        return Sample(pixels, labels, boxes, 100 + index, (40, 60))


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [*batch.images, *batch.targets, batch.image_ids, batch.original_sizes]


def test_a_packed_batch_arrives_as_it_was():
    batch = COLLATE([Noise()[i] for i in (0, 3, 5)])
    received = pickle.loads(pickle.dumps(PackedBatch(batch)))
    assert type(received) is Batch
    for a, b in zip(tensors(batch), tensors(received), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
        b.add_(1)  # its owner may write to it


def test_only_images_take_a_file_of_shared_memory():
    collate = CollateAndSend(COLLATE)
    batches = [[0, 1], [2, 3, 4], [6]]
    alone, sent = (
        list(DataLoader(Noise(), batch_sampler=batches, num_workers=n, collate_fn=collate))
        for n in (0, 1)
    )
    assert len(alone) == len(sent) == 3
    for first, second in zip(alone, sent, strict=True):
        assert type(second) is Batch
        for a, b in zip(tensors(first), tensors(second), strict=True):
            assert torch.equal(a, b)
        assert [tensor.is_shared() for tensor in tensors(second)] == [True] + 6 * [False]
