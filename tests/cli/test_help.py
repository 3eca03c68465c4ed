"""Help, version and invalid arguments: without importing torch, or more than a few modules."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import get_type_hints

import pytest

from patchlife import LifeConfig, __version__
from patchlife.cli.arguments import attribute_docs
from patchlife.cli.main import VERBS, main

LIGHT = """
import sys
from patchlife.cli.main import VERBS, main
lines = [["--help"], ["--version"], [], ["predict", "m", "p", "--top", "x"], ["predict", "m", "/no/such/photo"]]
codes = []
for argv in [*lines, *([verb, "--help"] for verb in VERBS)]:
    try:
        codes.append(main(argv))
    except SystemExit as stop:
        codes.append(stop.code)
print("codes:", codes)
print("heavy:", sorted({"torch", "timm", "numpy", "torchvision"} & sys.modules.keys()))
"""


def test_nothing_heavy_is_imported():
    run = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    codes = [0, 0, 2, 2, 2, *[0] * len(VERBS)]
    assert run.stdout.splitlines()[-2:] == [f"codes: {codes}", "heavy: []"]


@pytest.mark.parametrize(
    ("argv", "code"), [(["--help"], 0), (["predict", "--help"], 0), (["predict", "m", "p", "--top", "x"], 2)]
)
def test_few_modules_are_imported(argv, code):
    command = [sys.executable, "-X", "importtime", "-m", "patchlife", *argv]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    assert ("usage: patchlife" in run.stdout) == (code == 0)
    assert run.stderr.count("import time:") < 150  # Python alone needs 26, torch 1200


def configs(config: type) -> set[type]:
    """A config dataclass and all dataclasses of its fields."""
    inner = {f.metadata.get("settings_of") or get_type_hints(config)[f.name] for f in dataclasses.fields(config)}
    nested = [configs(kind) for kind in inner if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    return {config}.union(*nested)


CONFIGS = sorted(set.union(*map(configs, VERBS.values())), key=lambda config: config.__name__)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_option_is_documented(config):
    assert set(attribute_docs(config)) == {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize("verb", [verb for verb in VERBS if LifeConfig in configs(VERBS[verb])])
def test_help_shows_options_and_defaults(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    docs = {name: doc for config in configs(VERBS[verb]) for name, doc in attribute_docs(config).items()}
    for name in ("budget", "mode", "merge", "restore"):
        assert docs[name] in text
    assert "(default: 0.6)" in text
    assert "--no-merge" in text


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"patchlife {__version__}\n"


def test_without_a_verb_it_lists_the_verbs(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("predic", "invalid choice: 'predic' (choose from"),
        ("predict m", "the following arguments are required: PATHS; see patchlife predict --help"),
        ("predict m p --top x", "argument --top: expected a whole number, got 'x'; see patchlife predict --help"),
        ("predict m p --top 0", "top must be at least 1, got 0"),
        ("predict m p --batch-size 0", "batch_size must be at least 1, got 0"),
        ("predict m p --workers 0", "workers must be at least 1, got 0"),
        ("predict m p --threads 0", "threads must be at least 1, got 0"),
        ("predict m p --budget 60", "budget must be in (0, 1], got 60; did you mean 0.6?"),
        ("predict m p --budget lots", "argument --budget: expected a number, got 'lots'"),
        ("predict m p --speedup 0.5", "speedup must be at least 1, got 0.5"),
        ("predict m p --budget 0.5 --speedup 2", "budget and speedup are alternatives; give only one of them"),
        ("predict m p --drops 3,x", "argument --drops: expected a whole number, got 'x'"),
        ("predict m p --mode fast", "argument --mode: invalid choice: 'fast'"),
        ("predict m p --device tpu", "argument --device: invalid choice: 'tpu'"),
        ("predict m p --image-size 0", "image_size must be at least 1, got 0"),
        ("predict m p --resume", "--resume needs the file to continue, got none; give it with --out FILE"),
        ("predict m p --bud 0.5", "unrecognized arguments: --bud 0.5"),
        ("serve m --max-batch 0", "max_batch must be at least 1, got 0"),
        ("serve m --port 70000", "port must be 1 to 65535, got 70000"),
        ("serve m --degrade 0.6,0.8", "degrade must be budgets from the largest to the smallest, got 0.6, 0.8"),
        ("serve m --degrade 1.0,0.6 --budget 0.5", "degrade and budget are alternatives"),
        ("serve m --deadline 0", "deadline must be 0.1 to 3600 seconds, got 0"),
        ("demo --rounds 2", "rounds must be at least 5, got 2"),
    ],
)
def test_an_error_is_one_line_with_exit_code_2(line, message, patchlife):
    result = patchlife(*line.split())
    assert result.code == 2
    assert result.err.startswith("patchlife: error: ")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert result.out == ""
