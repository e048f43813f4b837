"""Denoising queries: noised targets that the decoder restores, in training only.

- `dn` (DN-DETR, Li et al., CVPR 2022, arXiv:2203.01305, section 4): each group holds a noised copy
  of every target.
- `contrastive` (DINO, Zhang et al., ICLR 2023, arXiv:2203.03605, section 3.3): each group holds
  positives, and after them negatives, whose boxes are shifted further and which are to be rejected.

The set has the shape of the padded targets: a group has one slot per target slot, and the number of
groups follows from the number of slots. So the shapes are those of the target bucket, and nothing
is read from the device. Empty slots have content 0 and the box (0.5, 0.5, 0.5, 0.5).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from msdetr.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from msdetr.config import ModelConfig
from msdetr.model.geometry import inverse_sigmoid
from msdetr.model.query_sets import QuerySet
from msdetr.structures import Targets


class Noise(NamedTuple):
    """Random draws for the copies of all target slots.

    There are G groups of H halves: the positives, and with `contrastive` also the negatives.
    """

    label_uniform: Tensor
    """[B, G, H, T] in [0, 1): a label is replaced where this is below the label noise."""
    label: Tensor
    """[B, G, H, T] int64, the class that replaces it; perhaps the same."""
    box: Tensor
    """[B, G, H, T, 4] in [0, 1), size of the shifts."""
    sign: Tensor
    """[B, G, H, T, 4] bool, whether a side moves to the right or down (contrastive)."""


class DenoisingSet(NamedTuple):
    """Denoising queries of a batch."""

    content: Tensor
    """[B, Q, C]"""
    reference: Tensor
    """[B, Q, 4] boxes (cxcywh), fractions of the valid image."""
    query_set: QuerySet


class DenoisingQueries(nn.Module):
    """Makes the denoising set of a batch from its targets.

    `dn` marks its queries by a last channel of 1 in the content, in place of a channel of the label
    embedding.
    """

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        rows = config.denoising_label_rows or num_classes + 1
        if rows < num_classes:
            raise ValueError(
                f"denoising_label_rows ({rows}) is below the number of classes ({num_classes})"
            )
        self.num_classes = num_classes
        self.contrastive = config.denoising == "contrastive"
        self.num_queries = config.denoising_queries
        self.num_groups = config.denoising_groups
        self.label_noise = config.denoising_label_noise
        self.box_noise = config.denoising_box_noise
        self.logit_eps = config.logit_eps
        self.label_embed = nn.Embedding(rows, config.hidden_dim - (not self.contrastive))

    def query_set(self, num_slots: int) -> QuerySet:
        """The set for batches of `num_slots` target slots.

        Raises:
            ValueError: there is no slot.
        """
        if num_slots < 1:
            raise ValueError("denoising needs targets padded to at least one slot per image")
        num_groups = self.num_groups or max(self.num_queries // num_slots, 1)
        group_size = num_slots * (2 if self.contrastive else 1)
        branch = "contrastive" if self.contrastive else "denoising"
        return QuerySet(branch, group_size, num_groups, sees_primary=True)

    def draw(self, targets: Targets, generator: torch.Generator | None = None) -> Tensor:
        """Uniform random numbers for `noise`, outside of compiled code, which takes no generator.

        Returns:
            [B, Q, 10] float32 in [0, 1), for the Q queries of the set.
        """
        batch, num_slots = targets.labels.shape
        shape = (batch, self.query_set(num_slots).num_queries, 10)
        return torch.rand(shape, generator=generator, device=targets.labels.device)

    def noise(self, uniform: Tensor, num_slots: int) -> Noise:
        """The draws that the numbers of `draw` [B, Q, 10] stand for."""
        num_groups = self.query_set(num_slots).num_groups
        p, label, box, sign = uniform.view(
            len(uniform), num_groups, -1, num_slots, uniform.shape[-1]
        ).split((1, 1, 4, 4), dim=-1)
        # Rounding may yield the number of classes itself.
        label = (label[..., 0] * self.num_classes).long().clamp(max=self.num_classes - 1)
        return Noise(p[..., 0], label, box, sign < 0.5)

    def forward(self, targets: Targets, uniform: Tensor) -> DenoisingSet:
        """The set of a batch.

        Args:
            targets: T slots per image, at least 1.
            uniform: of `draw` for these targets.
        """
        return self.from_noise(targets, self.noise(uniform, targets.labels.shape[1]))

    def from_noise(self, targets: Targets, noise: Noise) -> DenoisingSet:
        """The set of a batch from its draws."""
        exists = targets.mask[:, None, None].expand(noise.label.shape)
        content = self.label_embed(self.noised_labels(targets.labels, noise))
        if not self.contrastive:
            content = torch.cat((content, torch.ones_like(content[..., :1])), dim=-1)
        logits = inverse_sigmoid(self.noised_boxes(targets.boxes, noise), self.logit_eps)
        content, logits = (
            x.masked_fill(~exists[..., None], 0.0).flatten(1, 3) for x in (content, logits)
        )
        return DenoisingSet(content, logits.sigmoid(), self.query_set(targets.labels.shape[1]))

    def noised_labels(self, labels: Tensor, noise: Noise) -> Tensor:
        """[B, G, H, T] int64 of labels [B, T]."""
        replaced = noise.label_uniform < self.label_noise
        noised = torch.where(replaced, noise.label, labels[:, None, None])
        # Empty slots may hold any number.
        return noised.clamp(0, self.label_embed.num_embeddings - 1)

    def noised_boxes(self, boxes: Tensor, noise: Noise) -> Tensor:
        """[B, G, H, T, 4] cxcywh of boxes [B, T, 4].

        `dn` moves the centre by up to half the size times the noise, and changes the size by up to
        as much as it is. `contrastive` moves the sides: those of positives by up to half the size,
        those of negatives by half to one times the size. A negative may get a negative size.
        """
        boxes = boxes[:, None, None]
        half_size = boxes[..., 2:] / 2
        if not self.contrastive:
            reach = torch.cat((half_size, boxes[..., 2:]), dim=-1)
            shift = (2.0 * noise.box - 1.0) * reach * self.box_noise
            return (boxes + shift).clamp(0.0, 1.0)
        is_negative = torch.arange(2, device=boxes.device).view(2, 1, 1)
        size = torch.where(noise.sign, 1.0, -1.0) * (noise.box + is_negative)
        shift = size * half_size.repeat(1, 1, 1, 1, 2) * self.box_noise
        return xyxy_to_cxcywh((cxcywh_to_xyxy(boxes) + shift).clamp(0.0, 1.0))
