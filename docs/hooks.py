"""MkDocs hooks: links out of docs/ work on the site too, and the command line's help is part of the reference.

A page may link to any file of the repository by its relative path. Each such file becomes a page under ``repository/``
(a folder becomes its README, or a list of its files), and the links that mean it lead there.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS, PLACE = "docs", "repository"
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
COPIED = (".json", ".png", ".jpg", ".safetensors")
HELP = "<!-- help of every verb -->"


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside docs/ that a page links to, and what those files link to."""
    waiting = [f"{DOCS}/{file.src_uri}" for file in files.documentation_pages()]
    known = set(waiting)
    while waiting:
        page = waiting.pop()
        for target, _ in LINK.findall(FENCE.sub("", (ROOT / page).read_text("utf-8"))):
            path = _in_repository(page, target)
            if path is None or path in known or path.startswith(f"{DOCS}/"):
                continue
            known.add(path)
            files.append(_file_of(path, config))
            if path.endswith(".md"):
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links out of docs/ to the pages that `on_files` made; write the help of every verb where it belongs."""
    uri = page.file.src_uri
    own_path = uri.removeprefix(f"{PLACE}/") if uri.startswith(f"{PLACE}/") else f"{DOCS}/{uri}"

    def led(link: re.Match[str]) -> str:
        path = _in_repository(own_path, link[1])
        if path is None:
            return link[0]
        return posixpath.relpath(_uri_of(path), posixpath.dirname(uri)) + (link[2] or "")

    if own_path.endswith(".md"):
        markdown = _outside_fences(markdown, lambda text: LINK.sub(led, text))
    return markdown.replace(HELP, _help()) if HELP in markdown else markdown


def _in_repository(page: str, target: str) -> str | None:
    """The file that a link means, from the root of the repository; None for other hosts and for nothing."""
    if re.match(r"[a-z]+:", target):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    if path.startswith("..") or not (ROOT / path).exists():
        return None
    return f"{path}/README.md" if (ROOT / path / "README.md").is_file() else path


def _uri_of(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    return f"{PLACE}/{path}" if path.endswith((".md", *COPIED)) else f"{PLACE}/{path}.md"


def _file_of(path: str, config: Any) -> File:
    source, uri = ROOT / path, _uri_of(path)
    if path.endswith((".md", *COPIED)):
        return File.generated(config, uri, abs_src_path=str(source))
    if source.is_dir():
        text = "\n".join(f"* `{entry.name}`" for entry in sorted(source.iterdir()) if not entry.name.startswith("."))
    else:
        text = f"```{source.suffix[1:]}\n{source.read_text('utf-8')}\n```"
    return File.generated(config, uri, content=f"# {path}\n\n{text}\n")


def _outside_fences(markdown: str, change: Any) -> str:
    """``markdown`` with ``change`` made to all text but fenced code."""
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def _help() -> str:
    """What ``patchlife VERB --help`` prints, a section for each verb."""
    os.environ |= {"COLUMNS": "110", "NO_COLOR": "1"}
    sys.path.insert(0, str(ROOT / "src"))  # these modules need neither torch nor any other package
    from patchlife.cli.arguments import Parser, add_options
    from patchlife.cli.main import VERBS

    sections = []
    for verb, config in VERBS.items():
        summary = (config.__doc__ or "").partition("\n")[0]
        parser = Parser(prog=f"patchlife {verb}", description=summary, allow_abbrev=False)
        add_options(parser, config)
        sections.append(f"## {verb}\n\n```text\n{parser.format_help()}```\n")
    return "\n".join(sections)
