"""How the deformable attention kernels are launched: a table per architecture, else a rule.

The table (`ms_deform_attn_configs.json`) holds what `python -m benchmarks.attention tune`
measured; an empty configuration of windows says that they are slower there than none. For a case
that it lacks, the rule picks tiles by their generated code: 16 bytes per load, as many queries per
warp as registers allow.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

TABLE = Path(__file__).with_name("ms_deform_attn_configs.json")

FEW_ROWS = 64 * 1024
"""Rows (image, head, query) below which a launch is small: its programs are single warps, so that
there are enough of them."""

Kernel = Literal["forward", "points", "value"]

_overrides: dict[str, dict[str, Any]] = {}
"""Configurations that go before the table; "windows" counts as a kernel, as there."""


@dataclass(frozen=True)
class DirectConfig:
    """Tiles of `forward_kernel`, `points_kernel` and `value_kernel`."""

    block_q: int
    """Queries per program."""
    tile_x: int
    """Width of a tile of pixels, where queries are pixels; 0: queries in a row."""
    split_d: int
    """Channels per tile."""
    num_warps: int


@dataclass(frozen=True)
class WindowConfig:
    """Windows of `splat_kernel`."""

    side: int
    """Pixels, at levels 0 and 1."""
    coarse_side: int
    """Pixels, at the other levels."""
    block_y: int
    """Rows of a window that are summed at a time."""
    num_warps: int
    rest: DirectConfig
    """Of the kernel that adds what windows leave out; its tile is the cell."""


@functools.lru_cache(maxsize=512)
def tile_config(
    kernel: Kernel,
    dtype: torch.dtype,
    head_dim: int,
    num_rows: int,
    *,
    is_grid: bool,
    need_reference: bool = False,
) -> DirectConfig:
    """Tiles of a direct kernel.

    Args:
        kernel: which.
        dtype: of `value`.
        head_dim: D.
        num_rows: B * M * Q.
        is_grid: whether the queries are the pixels of the levels.
        need_reference: whether `points_kernel` also computes the gradient of reference points.
    """
    queries = "grid" if is_grid else "few" if num_rows < FEW_ROWS else "many"
    found = _lookup(kernel, dtype, head_dim, queries)
    if found is not None:
        return DirectConfig(**found)
    config = default_config(kernel, dtype, head_dim, queries)
    crowded = dtype == torch.float32 or architecture() == "sm_100"
    if need_reference and crowded and config.split_d < head_dim and config.block_q > 1:
        # Else a few registers spill: twice the channels, half the queries.
        return replace(config, split_d=2 * config.split_d, block_q=config.block_q // 2)
    return config


@functools.lru_cache(maxsize=512)
def value_config(
    dtype: torch.dtype,
    head_dim: int,
    num_rows: int,
    *,
    num_points: int,
    is_grid: bool,
    can_window: bool,
) -> DirectConfig | WindowConfig:
    """How the gradient of `value` is summed; arguments as for `tile_config`.

    Args:
        num_points: P.
        can_window: whether windows are possible at all.
    """
    # Up to four points, so that a level is one group; heads that fill the tensor cores' tiles and
    # leave registers for the window.
    fits = num_points <= 4 and 16 <= head_dim <= 64 and head_dim % 16 == 0
    if can_window and is_grid and fits:
        found = _lookup("windows", dtype, head_dim, "grid")
        if found:
            rest = DirectConfig(**found.pop("rest"))
            return WindowConfig(**found, rest=rest)
        # Of other types the product takes three parts instead of two, and registers spill.
        if found is None and dtype == torch.bfloat16:
            return default_windows(head_dim)
    return tile_config("value", dtype, head_dim, num_rows, is_grid=is_grid)


def default_windows(head_dim: int) -> WindowConfig:
    """Windows that hold an 8 x 8 cell and offsets of up to four pixels to one side."""
    rest = DirectConfig(block_q=64, tile_x=8, split_d=min(head_dim, 8), num_warps=4)
    return WindowConfig(side=16, coarse_side=8, block_y=2, num_warps=4, rest=rest)


def default_config(kernel: Kernel, dtype: torch.dtype, head_dim: int, queries: str) -> DirectConfig:
    """The rule: `queries` is "grid" (pixels), "many" or "few"."""
    # The gradient of `value` is added in float32, four channels per thread.
    vector = 4 if kernel == "value" else 16 // dtype.itemsize
    padded = 1 << (head_dim - 1).bit_length()
    split_d = min(padded, max(2 * vector, padded // 4))
    rows_per_warp = 32 // max(split_d // vector, 1)
    num_warps = 1 if queries == "few" else 4
    block_q = min(rows_per_warp * num_warps, 64)
    tile_x = 0
    if queries == "grid":
        tile_x = min(8, block_q)
    return DirectConfig(block_q=block_q, tile_x=tile_x, split_d=split_d, num_warps=num_warps)


@contextlib.contextmanager
def override(configs: Mapping[str, dict[str, Any]]) -> Iterator[None]:
    """Let every lookup of these kernels find these configurations, in the form of the table's rows.

    A launcher that keeps what it found has to forget it, too: before, and after.
    """
    before = dict(_overrides)
    _overrides.update(configs)
    forget()
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
        forget()


def forget() -> None:
    """Read the table anew, and decide anew."""
    _table.cache_clear()
    tile_config.cache_clear()
    value_config.cache_clear()


def architecture() -> str:
    """The table's name of the current device: `sm_90`, or `other` where it is not NVIDIA's."""
    if not torch.cuda.is_available() or torch.version.hip:
        return "other"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _lookup(kernel: str, dtype: torch.dtype, head_dim: int, queries: str) -> dict[str, Any] | None:
    if kernel in _overrides:
        return dict(_overrides[kernel])
    key = (architecture(), kernel, str(dtype).removeprefix("torch."), head_dim, queries)
    found = _table().get(key)
    return None if found is None else dict(found)


@functools.cache
def _table() -> dict[tuple[str, str, str, int, str], dict[str, Any]]:
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    return {
        (row["architecture"], row["kernel"], row["dtype"], row["head_dim"], row["queries"]): row[
            "config"
        ]
        for row in rows
    }
