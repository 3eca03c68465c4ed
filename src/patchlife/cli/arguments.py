"""Build command-line options from dataclasses, which define the name, type, default and help text of each option.

The kind of a field decides the kind of its argument:

- A field without a default is a positional argument.
- A field marked ``positional`` is an optional positional argument.
- A field whose type is a dataclass adds the options of that dataclass, as a group.
- A field marked ``settings_of`` another dataclass collects the given options of that dataclass in a dict, without
  defaults; these settings replace those of a saved model, which are not known when options are parsed.
- A field marked ``option=False`` has no argument.
- A field marked ``alone`` is an option whose value may be left out; ``alone`` is then its value.
- A field marked ``address`` keeps an address of fsspec (``PROTOCOL://...``) as text, where its type is a path.
- Any other field is an option. Several paths, and the NAME=VALUE entries of a dict, are separated by spaces.

jsonargparse offers most of this, but its import takes 0.15 s (docs/decisions.md), and ``--help`` must take less than
0.5 s.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError

__all__ = ["Parser", "add_options", "attribute_docs", "from_options"]

T = TypeVar("T")

_UNITS = {
    int: ("a whole number", "N"),
    float: ("a number", "X"),
    Path: ("a path", "FILE"),
}


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise the error as a ConfigError."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """Add the options of a config dataclass to ``parser``."""
    positionals = _add_fields(parser, parser, config)
    parser.usage = " ".join(["%(prog)s", *positionals, "[options]"])


def from_options(config: type[T], given: Mapping[str, Any]) -> T:
    """Build a config dataclass from parsed options.

    Raises ConfigError for values that the dataclass rejects.
    """
    values: dict[str, Any] = {}
    for field, hint in _fields(config):
        if settings := field.metadata.get("settings_of"):
            names = {f.name for f in dataclasses.fields(settings)}
            values[field.name] = {name: value for name, value in given.items() if name in names}
        elif _is_config(hint):
            values[field.name] = from_options(hint, given)
        elif field.name in given:
            value = given[field.name]
            if get_origin(hint) is dict:
                value = _entries(field, value)
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return config(**values)


def attribute_docs(config: type) -> dict[str, str]:
    """The description of each attribute in the ``Attributes:`` sections of a class and its base classes."""
    docs: dict[str, str] = {}
    for base in reversed(config.__mro__):
        _, _, part = (base.__doc__ or "").partition("Attributes:\n")
        entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", part, re.MULTILINE)
        docs |= {name: " ".join(text.split()) for name, text in entries}
    return docs


def _add_fields(parser: argparse.ArgumentParser, target: Any, config: type, partial: bool = False) -> list[str]:
    """Add the fields of a dataclass to ``target`` (the parser or a group); returns the positional names."""
    docs, positionals = attribute_docs(config), []
    for field, hint in _fields(config):
        text = docs.get(field.name, "")
        if inner := field.metadata.get("settings_of"):
            positionals += _add_fields(parser, _group(parser, text), inner, partial=True)
        elif _is_config(hint):
            positionals += _add_fields(parser, _group(parser, text), hint)
        elif _required(field) or field.metadata.get("positional"):
            positionals.append(_add_positional(parser, field, hint, text))
        else:
            _add_option(target, field, hint, text, partial)
    return positionals


def _group(parser: argparse.ArgumentParser, text: str) -> Any:
    """Add a group of options; the first sentence of ``text`` is its title, the rest its description."""
    title, _, description = text.partition(". ")
    return parser.add_argument_group(title.rstrip("."), description or None)


def _add_positional(target: Any, field: Field, hint: Any, text: str) -> str:
    name = field.name.upper()
    many = get_origin(hint) is tuple
    read = _reader(get_args(hint)[0] if many else hint)
    if not _required(field):
        common = {"default": argparse.SUPPRESS, "help": _escaped(text)}
        target.add_argument(field.name, metavar=name, type=read, nargs="*" if many else "?", **common)
        return f"[{name}...]" if many else f"[{name}]"
    target.add_argument(field.name, metavar=name, type=read, nargs="+" if many else None, help=_escaped(text))
    return f"{name}..." if many else name


def _add_option(target: Any, field: Field, hint: Any, text: str, partial: bool) -> None:
    flag, common = "--" + field.name.replace("_", "-"), {"default": argparse.SUPPRESS, "help": _escaped(text)}
    hint = _without_none(hint)
    if hint is bool:
        plain = field.default is False and not partial
        common["help"] += " (default: on)" if field.default is True else ""
        target.add_argument(flag, action="store_true" if plain else argparse.BooleanOptionalAction, **common)
        return
    common["help"] += _default(field)
    if get_origin(hint) is dict:
        unit = field.metadata["metavar"]
        target.add_argument(flag, action="extend", type=_entry, nargs="+", metavar=unit, **common)
        return
    if get_origin(hint) is Literal:
        target.add_argument(flag, choices=get_args(hint), **common)
        return
    kind, several = (get_args(hint)[0], True) if get_origin(hint) is tuple else (hint, False)
    unit = field.metadata.get("metavar") or _UNITS[kind][1]
    if several and kind is Path:  # separated by spaces, so that a glob of the shell works
        target.add_argument(flag, type=Path, nargs="+", metavar=unit, **common)
        return
    read = _list_reader(kind) if several else _reader(kind)
    if field.metadata.get("address"):
        read = _path_or_address
    if alone := field.metadata.get("alone"):
        common |= {"nargs": "?", "const": alone}
    target.add_argument(flag, type=read, metavar=f"{unit},{unit},..." if several else unit, **common)


def _fields(config: Any) -> list[tuple[Field, Any]]:
    hints = get_type_hints(config)
    fields = [field for field in dataclasses.fields(config) if field.metadata.get("option", True)]
    return [(field, hints[field.name]) for field in fields]


def _is_config(hint: Any) -> TypeGuard[type]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _required(field: Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _without_none(hint: Any) -> Any:
    """``int`` for ``int | None``."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _reader(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {_UNITS[kind][0]}, got {text!r}") from None

    return read


def _path_or_address(text: str) -> Path | str:
    return text if "://" in text else Path(text)


def _list_reader(kind: type) -> Callable[[str], Any]:
    return lambda text: tuple(_reader(kind)(part) for part in text.split(","))


def _entry(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE; the value is a Python literal (a number, True, None, a tuple), or else text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier() or not value:
        raise argparse.ArgumentTypeError(
            f"expected NAME=VALUE, got {text!r}; separate several by spaces, and put positional arguments before them"
        )
    constants = {"true": True, "false": False, "none": None}
    if value.lower() in constants:
        return name, constants[value.lower()]
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        parsed = value
    return name, _checked_value(text, tuple(parsed) if isinstance(parsed, list) else parsed)


def _checked_value(text: str, value: Any) -> Any:
    """``value``, if JSON can store it and it does not contain another NAME=VALUE."""
    parts = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(part, int | float | str | None) for part in parts) or (
        isinstance(value, str) and "=" in value
    ):
        raise argparse.ArgumentTypeError(
            f"expected a number, true, false, none, text, or numbers separated by commas, got {text!r}"
        )
    return value


def _entries(field: Field, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of an option's NAME=VALUE pairs. Raises ConfigError if a name is given twice."""
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise ConfigError(f"--{field.name.replace('_', '-')} gives {name} twice; give it once")
        entries[name] = value
    return entries


def _default(field: Field) -> str:
    if field.default in (None, MISSING, ()):
        return ""
    values = field.default if isinstance(field.default, tuple) else (field.default,)
    return f" (default: {_escaped(','.join(map(str, values)))})"


def _escaped(text: str) -> str:
    return text.replace("%", "%%")
