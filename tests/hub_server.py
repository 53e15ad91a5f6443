"""A model hub on this machine: the part of the hub's protocol that huggingface_hub needs to resolve and download.

Large files (*.safetensors) are in large-file storage, as on a real hub: their SHA-256 is told beforehand, and `resolve`
redirects to another host name, which must never see the token. Xet is not offered.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]


@dataclass
class Repository:
    """Commits and branches of one repository; gated: its files need the token. private: so does its existence."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False


@dataclass
class Request:
    """What the server was asked: method, path, host name and whether a token came with it."""

    method: str
    path: str
    host: str
    token: bool


@dataclass
class Hub:
    """The server's state, changed by a test while it runs.

    broken: file → offset after which the connection is cut. replaced: file → what is sent in place of its content.
    ranges: whether Range is honoured. status: what every request is answered with, 0: as it should. served: bytes of
    content sent, by file. requests: in the order they came.
    """

    token: str = "hf_secret_that_must_not_leak"
    repositories: dict[str, Repository] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)
    replaced: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    status: int = 0
    served: Counter[str] = field(default_factory=Counter)
    requests: list[Request] = field(default_factory=list)
    endpoint: str = ""

    def push(self, repo_id: str, files: Files, branch: str = "main") -> str:
        """Commit `files` to a branch; the commit."""
        repository = self.repositories.setdefault(repo_id, Repository())
        content = [[name, hashlib.sha256(data).hexdigest()] for name, data in sorted(files.items())]
        commit = hashlib.sha1(json.dumps([repo_id, content]).encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.branches[branch] = commit
        return commit

    def weight_bytes(self) -> int:
        """Bytes of weights sent so far."""
        return sum(count for name, count in self.served.items() if name.endswith(".safetensors"))


def etag(name: str, content: bytes) -> str:
    """SHA-256 for large-file storage, git's SHA-1 for the rest."""
    if name.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refusal(Exception):
    """An answer that is an error: status, the hub's error code and its message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        """Headers of a file."""
        self.answer()

    def do_GET(self) -> None:
        """A description, a file or a piece of it."""
        self.answer()

    def log_message(self, format: str, *arguments: object) -> None:
        """The tests look at `hub.requests` instead."""

    def answer(self) -> None:
        """Find what the path names and send it."""
        path = unquote(urlsplit(self.path).path)
        host = self.headers["Host"].split(":")[0]
        self.hub.requests.append(Request(self.command, path, host, "Authorization" in self.headers))
        try:
            if self.hub.status:
                raise Refusal(self.hub.status, "", f"Sent: {self.headers.get('Authorization')}")
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self.describe(match[1], match[2] or "main")
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+).*", path):
                self.tree(match[1], match[2])
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.resolve(match[1], match[2], match[3])
            elif match := re.fullmatch(r"/storage/([^/]+/[^/]+)/([^/]+)/(.+)", path):
                self.send_content(match[3], self.hub.repositories[match[1]].commits[match[2]][match[3]])
            else:
                raise Refusal(404, "", "no such page")
        except Refusal as refusal:
            self.send({"error": refusal.message}, refusal.status, {"X-Error-Code": refusal.code})

    def commit(self, repo_id: str, revision: str, content: bool = False) -> tuple[str, Files]:
        """A commit and its files, or a Refusal; `content`: whether the files are wanted, which gating forbids."""
        repository = self.hub.repositories.get(repo_id)
        sent = self.headers.get("Authorization")
        known = sent == f"Bearer {self.hub.token}"
        if repository is None or (repository.private and not known):
            raise Refusal(404 if known else 401, "RepoNotFound", "Repository not found")
        if repository.gated and content and not known:
            raise Refusal(403 if sent else 401, "GatedRepo", f"Access to model {repo_id} is restricted. Sent: {sent}")
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    def describe(self, repo_id: str, revision: str) -> None:
        """The repository at a revision, with `blobs=true` sizes and digests."""
        commit, files = self.commit(repo_id, revision)
        siblings = []
        for name, data in files.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": etag(name, data)[:40]}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"sha256": etag(name, data), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        self.send({"id": repo_id, "sha": commit, "siblings": siblings})

    def tree(self, repo_id: str, revision: str) -> None:
        """The files of a revision."""
        _, files = self.commit(repo_id, revision)
        self.send(
            [
                {"type": "file", "path": name, "size": len(data), "oid": etag(name, data)[:40]}
                for name, data in files.items()
            ]
        )

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        """A file: small ones at once, large ones by a redirect to another host name."""
        commit, files = self.commit(repo_id, revision, content=True)
        if name not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(name, files[name])}"'}
        if not name.endswith(".safetensors"):
            self.send_content(name, files[name], headers)
            return
        headers |= {"X-Linked-Etag": f'"{etag(name, files[name])}"', "X-Linked-Size": str(len(files[name]))}
        port = urlsplit(self.hub.endpoint).port
        self.send({}, 302, headers | {"Location": f"http://localhost:{port}/storage/{repo_id}/{commit}/{name}"})

    def send(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """JSON."""
        self.send_body(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send_content(self, name: str, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        """A file or the piece that Range asks for, counted, and cut where the test says so."""
        content = self.hub.replaced.get(name, content)
        start, stop, status = 0, len(content), 200
        told = {"Accept-Ranges": "bytes", **(headers or {})}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.hub.ranges:
            start, status = int(wanted[1]), 206
            stop = min(stop, int(wanted[2]) + 1) if wanted[2] else stop
            if start >= len(content):
                raise Refusal(416, "", "Range not satisfiable")
            told["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        cut = max(start, min(stop, self.hub.broken.get(name, stop)))
        self.send_body(content[start:stop], status, told, cut - start, name)

    def send_body(
        self, body: bytes, status: int, headers: Mapping[str, str], cut: int | None = None, name: str = ""
    ) -> None:
        """Headers and, unless only they were asked for, the body up to `cut`; then the connection ends."""
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = body if cut is None else body[:cut]
        try:
            for start in range(0, len(sent), 1 << 15):
                piece = sent[start : start + (1 << 15)]
                self.hub.served[name] += len(piece)  # before it leaves, so that no reader is ahead of the count
                self.wfile.write(piece)
        except ConnectionError:
            self.close_connection = True
        if len(sent) < len(body):
            self.close_connection = True


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port of 127.0.0.1, stopped at the end."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
