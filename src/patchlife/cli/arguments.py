"""Command-line options made from dataclasses: name, type, default and help of each have their home there.

A field without a default is a positional argument (text, or several); one marked ``positional`` is one that may be
left out. The others are options; several paths are given with spaces between them, and so are the entries of a dict
(NAME=VALUE). A field whose type is a dataclass
brings that one's options, in a group of their own. A field marked ``settings_of`` another dataclass takes only what
was said, as a dict: for settings that replace others which are not known yet.

jsonargparse does the like, but takes 0.4 s to import: all the time that ``--help`` has.
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
    """An argument parser whose errors are a ConfigError, like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the command line."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """Give ``parser`` what a config dataclass can be told."""
    positionals = _add_fields(parser, parser, config)
    parser.usage = " ".join(["%(prog)s", *positionals, "[options]"])


def from_options(config: type[T], given: Mapping[str, Any]) -> T:
    """The config dataclass that the given options ask for.

    Raises ConfigError for values that it refuses.
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
    """What a docstring says about each attribute in its ``Attributes:`` part."""
    _, _, part = (config.__doc__ or "").partition("Attributes:\n")
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", part, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _add_fields(parser: argparse.ArgumentParser, target: Any, config: type, partial: bool = False) -> list[str]:
    """Add a dataclass's fields to ``target``, the parser or a group of it; returns the positionals' names."""
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
    """A group of options: the first sentence is its title, the others stand below."""
    title, _, description = text.partition(". ")
    return parser.add_argument_group(title.rstrip("."), description or None)


def _add_positional(target: Any, field: Field, hint: Any, text: str) -> str:
    name = field.name.upper()
    many = get_origin(hint) is tuple
    read = _reader(get_args(hint)[0] if many else hint)
    if not _required(field):
        common = {"default": argparse.SUPPRESS, "help": _escaped(text)}
        target.add_argument(field.name, metavar=name, type=read, nargs="?", **common)
        return f"[{name}]"
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
    each, several = (get_args(hint)[0], True) if get_origin(hint) is tuple else (hint, False)
    unit = field.metadata.get("metavar") or _UNITS[each][1]
    if several and each is Path:  # so that a shell's glob will do
        target.add_argument(flag, type=Path, nargs="+", metavar=unit, **common)
        return
    read = _list_reader(each) if several else _reader(each)
    target.add_argument(flag, type=read, metavar=f"{unit},{unit},..." if several else unit, **common)


def _fields(config: Any) -> list[tuple[Field, Any]]:
    hints = get_type_hints(config)
    return [(field, hints[field.name]) for field in dataclasses.fields(config)]


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


def _list_reader(kind: type) -> Callable[[str], Any]:
    return lambda text: tuple(_reader(kind)(part) for part in text.split(","))


def _entry(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as Python reads it (a number, True, None, a tuple) or as text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier() or not value:
        raise argparse.ArgumentTypeError(
            f"expected NAME=VALUE, got {text!r}; give several with spaces between them, and other arguments before"
        )
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return name, words[value.lower()]
    try:
        read = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        read = value
    return name, _checked_value(text, tuple(read) if isinstance(read, list) else read)


def _checked_value(text: str, value: Any) -> Any:
    """``value``, if JSON can hold it and nothing was meant to follow it."""
    parts = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(part, int | float | str | None) for part in parts) or (
        isinstance(value, str) and "=" in value
    ):
        raise argparse.ArgumentTypeError(
            f"expected a number, true, false, none, text or numbers with commas between them, got {text!r}"
        )
    return value


def _entries(field: Field, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of a NAME=VALUE option. Raises ConfigError if a name is given twice."""
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise ConfigError(f"--{field.name.replace('_', '-')} names {name} twice; give it once")
        entries[name] = value
    return entries


def _default(field: Field) -> str:
    return "" if field.default in (None, MISSING, ()) else f" (default: {_escaped(str(field.default))})"


def _escaped(text: str) -> str:
    return text.replace("%", "%%")
