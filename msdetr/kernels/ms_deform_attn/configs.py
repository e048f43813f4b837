"""Launch configurations of the deformable attention kernels: a table per architecture, and a rule.

`python -m benchmarks.attention tune` writes the table, `configs.json`. An empty configuration of
windows or lists means that the direct kernel is faster. For a case that is not in the table, the
rule chooses tiles for good generated code: loads of 16 bytes, and as many queries per warp as
registers allow.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import torch

TABLE = Path(__file__).with_name("configs.json")

FEW_ROWS = 64 * 1024
"""Launches with fewer rows (image, head, query) are small: they use programs of one warp, so that
there are enough programs."""

Kernel = Literal["forward", "points", "value"]

P = ParamSpec("P")
T = TypeVar("T")

_forget: list[Callable[[], None]] = []

_overrides: dict[str, dict[str, Any]] = {}
"""Configurations that override the table. "windows" is a kernel name, as in the table."""


@dataclass(frozen=True)
class DirectConfig:
    """Tiles of `forward_kernel`, `points_kernel` and `value_kernel`."""

    block_q: int
    """Queries per program."""
    tile_x: int
    """Width of a tile of pixels, if queries are pixels; 0: consecutive queries."""
    split_d: int
    """Channels per tile."""
    num_warps: int


@dataclass(frozen=True)
class WindowConfig:
    """Windows of `splat_kernel`."""

    side: int
    """Side in pixels, at levels 0 and 1."""
    coarse_side: int
    """Side in pixels, at the other levels."""
    block_y: int
    """Rows of a window that are summed at a time."""
    num_warps: int
    rest: DirectConfig
    """Configuration of `rest_kernel`; its tile is the cell."""


@dataclass(frozen=True)
class ListConfig:
    """Lists of `walk_kernel`."""

    rows: int
    """Lists per program, a multiple of 8."""
    num_warps: int


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
        kernel: name of the kernel.
        dtype: of `value`.
        head_dim: D.
        num_rows: B * M * Q.
        is_grid: whether the queries are the pixels of the levels.
        need_reference: whether `points_kernel` also computes the gradient of reference points.
    """
    queries = _kind_of(num_rows, is_grid)
    row = _lookup(kernel, dtype, head_dim, queries)
    if row is not None:
        return DirectConfig(**row)
    config = default_config(kernel, dtype, head_dim, queries)
    crowded = dtype == torch.float32 or architecture() == "sm_100"
    if need_reference and crowded and config.split_d < head_dim and config.block_q > 1:
        # Avoids spilling a few registers: twice the channels, half the queries.
        return replace(config, split_d=2 * config.split_d, block_q=config.block_q // 2)
    return config


def value_config(
    dtype: torch.dtype,
    head_dim: int,
    num_rows: int,
    *,
    num_points: int,
    is_grid: bool,
    can_window: bool = False,
    can_list: bool = False,
) -> DirectConfig | WindowConfig | ListConfig:
    """Method and configuration for the gradient of `value`; other arguments as for `tile_config`.

    Args:
        num_points: P.
        can_window: whether window sums support the call.
        can_list: whether the memory of lists is acceptable.
    """
    if can_list:
        row = _lookup("lists", dtype, head_dim, _kind_of(num_rows, is_grid))
        if row:
            return ListConfig(**row)
        if row is None and not is_grid:
            return default_lists(head_dim)
    # Up to four points, so that a level is one group. Heads must fill the tiles of tensor cores and
    # leave registers for the window.
    fits = num_points <= 4 and 16 <= head_dim <= 64 and head_dim % 16 == 0
    if can_window and is_grid and fits:
        row = _lookup("windows", dtype, head_dim, "grid")
        if row:
            rest = DirectConfig(**row.pop("rest"))
            return WindowConfig(**row, rest=rest)
        # For other types, the product has three terms instead of two, and registers spill.
        if row is None and dtype == torch.bfloat16:
            return default_windows(head_dim)
    return tile_config("value", dtype, head_dim, num_rows, is_grid=is_grid)


def default_windows(head_dim: int) -> WindowConfig:
    """Windows for an 8 x 8 cell and offsets of up to four pixels in each direction."""
    rest = DirectConfig(block_q=64, tile_x=8, split_d=min(head_dim, 8), num_warps=4)
    return WindowConfig(side=16, coarse_side=8, block_y=2, num_warps=4, rest=rest)


def default_lists(head_dim: int) -> ListConfig:
    """Programs of one warp, with two 16-byte loads of bfloat16 per thread at a time."""
    padded = 1 << (head_dim - 1).bit_length()
    return ListConfig(rows=min(max(512 // padded, 8), 32), num_warps=1)


def default_config(kernel: Kernel, dtype: torch.dtype, head_dim: int, queries: str) -> DirectConfig:
    """The rule. `queries` is "grid" (pixels), "many" or "few"."""
    # The gradient of `value` is summed in float32, four channels per thread.
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
    """Override the configurations of kernels, given as in the rows of the table."""
    before = dict(_overrides)
    _overrides.update(configs)
    forget()
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
        forget()


def cached(function: Callable[P, T]) -> Callable[P, T]:
    """Cache the results of a function of hashable arguments, until configurations change."""
    wrapped = functools.lru_cache(maxsize=1024)(function)
    _forget.append(wrapped.cache_clear)
    return wrapped  # type: ignore[return-value]  # a wrapper has no signature


def forget() -> None:
    """Clear all that depends on configurations, and read the table again."""
    _table.cache_clear()
    for clear in _forget:
        clear()


def architecture() -> str:
    """Name of the current device in the table: `sm_90`, for example; `other` if not NVIDIA's."""
    if not torch.cuda.is_available() or torch.version.hip:
        return "other"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _kind_of(num_rows: int, is_grid: bool) -> str:
    return "grid" if is_grid else "few" if num_rows < FEW_ROWS else "many"


def _lookup(kernel: str, dtype: torch.dtype, head_dim: int, queries: str) -> dict[str, Any] | None:
    if kernel in _overrides:
        return dict(_overrides[kernel])
    key = (architecture(), kernel, str(dtype).removeprefix("torch."), head_dim, queries)
    row = _table().get(key)
    return None if row is None else dict(row)


@functools.cache
def _table() -> dict[tuple[str, str, str, int, str], dict[str, Any]]:
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    return {
        (row["architecture"], row["kernel"], row["dtype"], row["head_dim"], row["queries"]): row[
            "config"
        ]
        for row in rows
    }
