"""Reading published arguments: flag lists, option lists of configuration files, stored values."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NoReturn

from msdetr.published.command_lines import (
    PUBLISHED_FLAGS,
    RUNTIME_ATTRIBUTES,
    Implementation,
)
from msdetr.published.dino_flags import DINO_FILE_KEYS, DINO_FILES
from msdetr.published.flag import PublishedFlag


class _Parser(argparse.ArgumentParser):
    """Raises errors instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"published flags: {message}")


def parse_flags(flags: Sequence[str], implementation: Implementation) -> dict[str, Any]:
    """The values of a flag list, by attribute name. DINO's also hold those of its file.

    Raises:
        ValueError: a flag is unknown, lacks its value, or has one of the wrong type.
    """
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    from_file = DINO_FILE_KEYS if implementation == "dino" else {}
    for name, flag in PUBLISHED_FLAGS[implementation].items():
        spellings = [f"--{name}"] + ([flag.short] if flag.short else [])
        if name in from_file:
            continue
        if flag.type is not bool:
            parser.add_argument(*spellings, type=flag.type, nargs="+" if flag.many else None)
        elif flag.default:
            parser.add_argument(f"--no_{name}", dest=name, action="store_false")
        else:
            parser.add_argument(*spellings, action="store_true")
    if from_file:
        parser.add_argument("--options", nargs="+", default=[])
    namespace, rest = parser.parse_known_args(list(flags))
    if rest:
        given = [argument for argument in rest if argument.startswith("-")] or rest
        names = [name.removeprefix("--").split("=")[0] for name in given]
        if from_file.keys() & set(names):
            keys = ", ".join(name for name in names if name in from_file)
            raise ValueError(f"published flags: keys of the configuration file, not flags: {keys}")
        refuse_unknown(names, implementation)
    values = vars(namespace)
    if from_file:
        options = [_parse_option(option) for option in values.pop("options")]
        values = _file_values(values.get("config_file")) | dict(options) | values
    return values


def _file_values(config_file: str | None) -> dict[str, Any]:
    """What a published configuration file of DINO sets other than the default one."""
    if config_file is None:
        return {}
    name = PurePosixPath(config_file).name
    if name not in DINO_FILES:
        raise ValueError(
            f"config_file {config_file}: known are {', '.join(DINO_FILES)}; give the keys of "
            "another file as a mapping"
        )
    return DINO_FILES[name]


def _parse_option(option: str) -> tuple[str, Any]:
    """Name and value of one of DINO's `--options`, such as `lr_drop_list=20,30`."""
    name, separator, text = option.partition("=")
    if not separator:
        raise ValueError(f"published flags: option {option!r} is not KEY=VALUE")
    values = [_parse_value(part) for part in text.split(",")]
    return name, values if len(values) > 1 else values[0]


def _parse_value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def complete(given: Mapping[str, Any], implementation: Implementation) -> argparse.Namespace:
    """All arguments of a command line, checked. Absent ones have their published default.

    Raises:
        ValueError: a name is unknown, or a value has the wrong type.
    """
    known = PUBLISHED_FLAGS[implementation]
    refuse_unknown(given.keys() - known.keys() - RUNTIME_ATTRIBUTES, implementation)
    values = {name: flag.default for name, flag in known.items()}
    for name in given.keys() & known.keys():
        values[name] = _checked_value(name, known[name], given[name])
    return argparse.Namespace(**values)


def _checked_value(name: str, flag: PublishedFlag, value: Any) -> Any:
    if value is None and flag.default is None:
        return None
    if flag.many:
        item = PublishedFlag(flag.type, ...)
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"published argument {name}: expected a list, got {value!r}")
        return [_checked_value(name, item, entry) for entry in value]
    accepted = (int, float) if flag.type is float else flag.type
    if not isinstance(value, accepted) or isinstance(value, bool) != (flag.type is bool):
        raise ValueError(f"published argument {name}: expected {flag.type.__name__}, got {value!r}")
    return flag.type(value)


def refuse_unknown(names: Collection[str], implementation: Implementation) -> None:
    """Raise a ValueError if there are names, with the command lines that do have them."""
    if not names:
        return
    reasons = []
    for name in sorted(names):
        attribute = "aux_loss" if name == "no_aux_loss" else name
        owners = [owner for owner, flags in PUBLISHED_FLAGS.items() if attribute in flags]
        reasons.append(f"{name} (a flag of {', '.join(owners)})" if owners else name)
    raise ValueError(f"not arguments of the published {implementation}: {', '.join(reasons)}")
