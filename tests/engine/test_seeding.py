from __future__ import annotations

import random

import numpy as np
import torch

from msdetr.engine.seeding import derived_seed, seed_initialization, seed_step


def test_derived_seeds_differ_in_every_part() -> None:
    parts = [(1, 2), (2, 1), (12,), (1, 2, 0), ("dropout", 1, 2), ("assignment", 1, 2)]
    seeds = {derived_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # torch's CPU generator uses the low 32 bits only.
    assert len({seed % 2**32 for seed in seeds}) == len(parts)


def test_seeds_never_change() -> None:
    # A run that a later version resumes must draw the same numbers.
    assert derived_seed("dropout", 42, 0, 0) == 3998374099505963433


def test_a_step_draws_the_same_whenever_it_is_run() -> None:
    generator = torch.Generator()

    def draw(step: int, rank: int) -> tuple[float, float]:
        seed_step(42, step, rank, generator)
        return float(torch.rand(())), float(torch.rand((), generator=generator))

    first = draw(3, 0)
    others = [draw(4, 0), draw(3, 1)]
    assert draw(3, 0) == first
    assert len({first, *others}) == 3
    assert first[0] != first[1]


def test_initialization_seeds_every_library() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_initialization(5)
    first = draw()
    assert draw() != first
    seed_initialization(5)
    assert draw() == first
