"""Fixtures of the engine's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine.helpers import write_shapes


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training images, one of them empty, and 5 for validation."""
    root = tmp_path_factory.mktemp("shapes") / "data"
    return write_shapes(root, num_train=12, num_val=5, without_targets=[3])
