"""One option of a published command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PublishedFlag:
    """One option of a published command line, or one key of its configuration file."""

    type: type[bool] | type[int] | type[float] | type[str]
    """Type of the value; a `bool` takes none."""
    default: Any
    """Value where the option is absent. A `bool` that defaults to True is spelled `--no_NAME`."""
    many: bool = False
    """Whether the option takes several values."""
    short: str | None = None
    """The option's other spelling, such as `-c`."""
