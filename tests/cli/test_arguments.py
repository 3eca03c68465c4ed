from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from patchlife.cli.arguments import Parser, add_options, attribute_docs, from_options
from patchlife.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    """Inside.

    Attributes:
        size: How large; 100 % of it.
        on: On or off.
    """

    size: int = 3
    on: bool = True


@dataclass(frozen=True)
class WithSettings:
    """Settings.

    Attributes:
        settings: Only the given options.
    """

    settings: dict[str, Any] = field(default_factory=dict, metadata={"settings_of": Inner})


@dataclass(frozen=True)
class Plain:
    """All other kinds of fields.

    Attributes:
        name: The name.
        rest: Every
            other name.
        flag: A flag.
        maybe: A flag or None.
        kind: The kind.
        numbers: Several numbers.
        file: A file.
        inner: Inner options. They have their own group.
    """

    name: str
    rest: tuple[str, ...]
    flag: bool = False
    maybe: bool | None = None
    kind: Literal["a", "b"] = "a"
    numbers: tuple[float, ...] | None = None
    file: Path | None = None
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class WithEntries:
    """Entries.

    Attributes:
        model_args: The entries.
        flag: A flag.
        rest: Every other name.
    """

    rest: str = field(default="", metadata={"positional": True})
    model_args: dict[str, Any] = field(default_factory=dict, metadata={"metavar": "NAME=VALUE"})
    flag: bool = False


def parsed(config: type, line: str) -> Any:
    parser = Parser(prog="p")
    add_options(parser, config)
    return from_options(config, vars(parser.parse_args(line.split())))


def test_without_options_all_fields_have_their_defaults():
    assert parsed(Plain, "n r") == Plain("n", ("r",))


def test_every_kind_of_option():
    line = "n r s --flag --no-maybe --kind b --numbers 1,2.5 --file x/y --size 7 --no-on"
    expected = Plain("n", ("r", "s"), True, False, "b", (1.0, 2.5), Path("x/y"), Inner(7, False))
    assert parsed(Plain, line) == expected


def test_settings_hold_only_the_given_options_said():
    assert parsed(WithSettings, "").settings == {}
    assert parsed(WithSettings, "--on").settings == {"on": True}
    assert parsed(WithSettings, "--size 3").settings == {"size": 3}


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("a=1", 1),
        ("a=-1", -1),
        ("a=1.5", 1.5),
        ("a=1e-5", 1e-5),
        ("a=true", True),
        ("a=False", False),
        ("a=none", None),
        ("a=avg", "avg"),
        ("a='1'", "1"),
        ("a=224,112", (224, 112)),
        ("a=(224,112)", (224, 112)),
        ("a=[224,112]", (224, 112)),
        ("a=7,", (7,)),
        ("a=a.b/c", "a.b/c"),
        ("a=a,b", "a,b"),
        ("a=__import__('os')", "__import__('os')"),
    ],
)
def test_the_value_of_an_entry_is_a_python_literal_or_text(entry, value):
    result = parsed(WithEntries, f"--model-args {entry}").model_args["a"]
    assert (result, type(result)) == (value, type(value))


def test_several_entries():
    expected = {"a": 1, "b": "x"}
    for line in ("--model-args a=1 b=x --flag", "--flag --model-args a=1 --model-args b=x", "r --model-args a=1 b=x"):
        assert parsed(WithEntries, line).model_args == expected
    assert parsed(WithEntries, "").model_args == {}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model-args a", "argument --model-args: expected NAME=VALUE, got 'a'; .* spaces"),
        ("--model-args a=1 photos/", "expected NAME=VALUE, got 'photos/'.* positional arguments before"),
        ("--model-args =1", "expected NAME=VALUE, got '=1'"),
        ("--model-args a=", "expected NAME=VALUE, got 'a='"),
        ("--model-args a-b=1", "expected NAME=VALUE, got 'a-b=1'"),
        ("--model-args a=1,b=2", "numbers separated by commas, got 'a=1,b=2'"),
        ("--model-args a={}", "expected a number, true, false, none, text, or numbers .* got 'a={}'"),
        ("--model-args a=b'x'", "expected a number"),
        ("--model-args a=1j", "expected a number"),
        ("--model-args a=1,(2,3)", "expected a number"),
        ("--model-args a=1 a=2", "--model-args gives a twice; give it once"),
        ("--model-args", "expected at least one argument"),
    ],
)
def test_invalid_entries(line, message):
    with pytest.raises(ConfigError, match=message):
        parsed(WithEntries, line)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("n r --size x", "argument --size: expected a whole number, got 'x'; see p --help"),
        ("n r --numbers 1,,2", "argument --numbers: expected a number, got ''"),
        ("n r --kind c", "invalid choice: 'c'"),
        ("n", "arguments are required: REST"),
    ],
)
def test_invalid_options_are_config_errors(line, message):
    with pytest.raises(ConfigError, match=message):
        parsed(Plain, line)


def test_descriptions_come_from_the_docstring():
    docs = attribute_docs(Plain)
    assert docs["rest"] == "Every other name."
    assert list(docs) == list(Plain.__dataclass_fields__)


def test_help_shows_descriptions_groups_and_defaults():
    parser = Parser(prog="p")
    add_options(parser, Plain)
    text = " ".join(parser.format_help().split())
    assert text.startswith("usage: p NAME REST... [options]")
    assert "Inner options: They have their own group." in text
    assert "--size N How large; 100 % of it. (default: 3)" in text
    assert "--on, --no-on On or off. (default: on)" in text
    assert "--kind {a,b} The kind. (default: a)" in text
