"""Published checkpoints: conversion of parameter names, and safe loading of files.

`architectures` tells which published model a configuration describes, `names` converts names,
`loading` fills a model, `files` reads `.pth` files.
"""

from msdetr.model.checkpoint_adapter.files import PublishedCheckpoint, load_published_checkpoint
from msdetr.model.checkpoint_adapter.loading import check_state, load_state
from msdetr.model.checkpoint_adapter.names import (
    ours_to_published,
    published_name,
    published_to_ours,
    split_ignored,
)

__all__ = [
    "PublishedCheckpoint",
    "check_state",
    "load_published_checkpoint",
    "load_state",
    "ours_to_published",
    "published_name",
    "published_to_ours",
    "split_ignored",
]
