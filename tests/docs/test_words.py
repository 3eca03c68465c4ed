"""The words of token pruning and merging are used for what they name; words that the project invented are gone."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
OLD = re.compile(
    r"\b(heirs?|survivors?|dying|dies|dead|bequeath\w*|kin|kinship|likeness(es)?|opinions?|life heads?|lessons?"
    r"|teach(es)?|peers?|rivals?|judges?|judged|races?|worths?|spending)\b",
    re.IGNORECASE,
)
ALLOWED = {
    "CHANGELOG.md",  # names what was renamed
    "recipes/convert_adapter.py",  # reads adapters of format 2
    "src/patchlife/benchmarks/result.py",  # reads result files of format 1
    "tests/benchmarks/test_result.py",
    "tests/docs/test_words.py",
}
SUFFIXES = {".py", ".md", ".sh", ".yml", ".toml", ".cpp"}


def test_no_old_word_is_left() -> None:
    folders = [ROOT / name for name in ("src", "tests", "docs", "bench", "recipes", "examples", ".ci", ".github")]
    files = [*ROOT.glob("*.*"), *(path for folder in folders for path in folder.rglob("*"))]
    found = []
    for path in sorted(path for path in files if path.suffix in SUFFIXES):
        name = path.relative_to(ROOT).as_posix()
        if name in ALLOWED:
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            found += [f"{name}:{number}: {match[0]}" for match in OLD.finditer(line)]
    assert not found, "\n".join(found)
