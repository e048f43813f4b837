"""Random numbers as a stateless function of (seed, step, rank).

Every step seeds its generators. A resumed run therefore draws the same numbers as an uninterrupted
one, without random states in the checkpoint, and any single step can be repeated.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all of `parts` and on their order."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_initialization(seed: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch: the same model on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_step(seed: int, step: int, rank: int, generator: torch.Generator) -> None:
    """Seed dropout (PyTorch's default generators) and `generator` (denoising and matchers).

    Seeding a CUDA generator happens on the host, without work for the device.
    """
    torch.manual_seed(derived_seed("dropout", seed, step, rank))
    generator.manual_seed(derived_seed("assignment", seed, step, rank))
