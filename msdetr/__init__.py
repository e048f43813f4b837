"""MS-DETR: detection transformers with mixed one-to-one and one-to-many supervision."""

from msdetr.version import __version__

__all__ = ["__version__"]
