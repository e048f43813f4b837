"""The command line of a package of benchmarks: `python -m benchmarks.PACKAGE [VERB] [options]`."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NoReturn, TypeVar

from msdetr.cli.options import exit_with_error

T = TypeVar("T")


def run(package: str, verbs: Mapping[str, str]) -> NoReturn:
    """Run the function that the first argument names, and exit with its status.

    Args:
        package: name below `benchmarks`.
        verbs: `MODULE:FUNCTION` of each verb. The one of the empty verb runs without a verb.
    """
    verb, *arguments = sys.argv[1:] or [""]
    if verb not in verbs and "" in verbs:
        verb, arguments = "", sys.argv[1:]
    if verb not in verbs:
        usage = f"usage: python -m benchmarks.{package} {{{','.join(verbs)}}} [options]"
        if verb in ("-h", "--help"):
            print(usage)
            raise SystemExit(0)
        exit_with_error(usage)
    module, _, function = verbs[verb].partition(":")
    main: Callable[[Sequence[str]], int] = getattr(
        importlib.import_module(f"benchmarks.{package}.{module}"), function
    )
    raise SystemExit(main(arguments))


def require_at_least(options: object, minimum: float, *names: str) -> None:
    """Raise ValueError if an option, or a value of an option with several, is below `minimum`."""
    for name in names:
        value = getattr(options, name)
        values = value if isinstance(value, tuple) else (value,)
        if any(one is not None and one < minimum for one in values):
            raise ValueError(f"{name} must be at least {minimum:g}, got {value}")


def require_known(kind: str, names: Collection[str], known: Collection[str]) -> None:
    """Raise ValueError if a name is not among the known ones."""
    for name in names:
        if name not in known:
            raise ValueError(f"{kind} {name!r}: known are {', '.join(known)}")


def choose_available(
    names: Sequence[T], default: Sequence[T], unavailable: Callable[[T], str | None]
) -> list[T]:
    """The names that were asked for, or those of `default` that can run here.

    Args:
        names: asked for; empty: `default`.
        default: the others of these are reported.
        unavailable: why one cannot run here, or None.

    Raises:
        ValueError: one that was asked for cannot run here.
    """
    chosen = []
    for name in names or default:
        reason = unavailable(name)
        if reason is None:
            chosen.append(name)
        elif names:
            raise ValueError(f"{name} cannot run here: {reason}")
        else:
            print(f"without {name}: {reason}")
    return chosen


def within_budget(
    items: Sequence[T], seconds: float | None, clock: Callable[[], float] = time.monotonic
) -> Iterator[T]:
    """Yield items until the time budget is used up, then report how many are left out."""
    begin = clock()
    for done, item in enumerate(items):
        if seconds is not None and clock() - begin > seconds:
            print(f"time budget used up: {len(items) - done} of {len(items)} left out")
            return
        yield item
