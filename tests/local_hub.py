"""A hub on 127.0.0.1 that the real client of the Hugging Face hub talks to. Repositories are kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest


@dataclass
class Repository:
    """Files by commit; names of branches and tags."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs.get(revision, revision)]

    def commit(self, files: dict[str, bytes], message: str = "") -> str:
        """A new commit on main with these files added."""
        content = {**(self.files() if self.refs else {}), **files}
        sha = hashlib.sha1(repr((len(self.commits), sorted(content.items()))).encode()).hexdigest()
        self.commits[sha], self.refs["main"] = content, sha
        self.messages.append(message)
        return sha


class LocalHub:
    """The repositories by name, and what the server is told to do wrong.

    Attributes:
        refused: status of the answer to a commit, instead of accepting it.
        broken: whether the connection breaks during a commit.
        requests: (method, path) of each request.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.refused = 0
        self.broken = False
        self.requests: list[tuple[str, str]] = []
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(("POST", self.path))
        if self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", self.path):
            names = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", self.path):
            self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._error(404, "RepoNotFound")

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if name in self.hub.repositories:
            self._json({"url": f"{self.hub.url}/{name}"}, 409)
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[name] = Repository(private)
        self._json({"url": f"{self.hub.url}/{name}"})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        if self.hub.broken:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if self.hub.refused:
            self._error(self.hub.refused, "")
            return
        (header,) = (line["value"] for line in lines if line["key"] == "header")
        files = {v["path"]: base64.b64decode(v["content"]) for v in (x["value"] for x in lines if x["key"] == "file")}
        sha = self.hub.repositories[name].commit(files, header["summary"])
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append((self.command, self.path))
        match = re.fullmatch(r"/api/models/([^?]+?)/(revision|tree)/([^?]+?)(\?.*)?", self.path) or re.fullmatch(
            r"/(.+?)/(resolve)/([^/]+)/(.+)", self.path
        )
        repository = self.hub.repositories.get(match[1]) if match else None
        if match is None or repository is None or (repository.private and "Authorization" not in self.headers):
            self._error(404, "RepoNotFound")
        elif repository.gated:
            self._error(403, "GatedRepo")
        elif match[3] not in {**repository.refs, **repository.commits}:
            self._error(404, "RevisionNotFound")
        else:
            self._found(match, repository, repository.refs.get(match[3], match[3]))

    def _found(self, match: re.Match[str], repository: Repository, sha: str) -> None:
        files = repository.files(sha)
        if match[2] == "revision":
            self._json({"id": match[1], "sha": sha, "siblings": [{"rfilename": name} for name in files]})
        elif match[2] == "tree":
            self._json([{"type": "file", "path": n, "size": len(c), "oid": _oid(c)} for n, c in files.items()])
        elif match[4] in files:
            self._answer(200, files[match[4]], {"ETag": f'"{_oid(files[match[4]])}"', "X-Repo-Commit": sha})
        else:
            self._error(404, "EntryNotFound")

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code} if code else {})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(content: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def local_hub(cache: Path) -> Iterator[LocalHub]:
    """A running hub that the client uses, with ``cache`` as the client's cache and no stored token."""
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    constants = huggingface_hub.constants
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.delenv("HF_TOKEN", raising=False)
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
