"""A hub on this machine: enough of the hub's HTTP API to create, list, upload and fetch models.

It keeps files in memory. It can be told to refuse uploads after so many files, and to break off a
download in the middle. Large files go by Git LFS's protocol; the client's other way needs a second
service.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_" + "secret" * 5
LARGE = (".safetensors", ".png", ".mp4")


@dataclass
class Repository:
    """One model: its files at each commit, the newest last."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=lambda: [("0" * 40, {".gitattributes": b"x"})])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in ("main", "HEAD"):
            return self.commits[-1]
        return next((each for each in self.commits if each[0] == revision), None)

    def commit(self, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(repr(sorted(files)).encode() + str(len(self.commits)).encode()).hexdigest()
        self.commits.append((name, files))
        return name


@dataclass
class HubServer:
    """The content of a server, and its requests.

    Attributes:
        repositories: by hub id.
        blobs: what arrived by LFS, by SHA-256.
        requests: method and path of each request.
        uploads_left: files by LFS until every further one is refused; None for no limit.
        broken: a file's name to how many connections break off while it is downloaded.
        ranges: the header Range of each download that had one.
        tokens: what requests were authorized with.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    uploads_left: int | None = None
    broken: dict[str, int] = field(default_factory=dict)
    ranges: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    forbidden: bool = False

    def add(self, hub_id: str, files: dict[str, bytes], private: bool = False) -> str:
        """Put a model there, and return its commit."""
        return self.repositories.setdefault(hub_id, Repository(private)).commit(files)


@contextmanager
def serve() -> Iterator[HubServer]:
    """Run a hub on a free port of the loopback."""
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def point_here(monkeypatch: pytest.MonkeyPatch, hub: HubServer, cache: Any, token: str | None = TOKEN) -> None:
    """Have huggingface_hub, in this process, ask this hub, with a cache of the test's own."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(cache / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if not path.startswith("/lfs/"):
            self.hub.tokens.add(self.token)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        for pattern, name in _ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {path}")
            if found:
                getattr(self, name)(body, *found.groups())
                return
        self._refuse(404, "EntryNotFound")

    def _json(self, value: Any, code: int = 200) -> None:
        self._send(json.dumps(value).encode(), code, {"Content-Type": "application/json"})

    def _send(self, content: bytes, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, code: int, error: str, words: str = "") -> None:
        self._send(json.dumps({"error": words}).encode(), code, {"X-Error-Code": error, "X-Error-Message": words})

    def _repository(self, hub_id: str) -> Repository | None:
        """Return a model that the token may see; else refuse, and return None."""
        found = self.hub.repositories.get(hub_id)
        if found is None or (found.private and self.token != TOKEN):
            self._refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
            return None
        return found

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        hub_id = f"{asked['organization']}/{asked['name']}"
        if self.token != TOKEN:
            self._refuse(401, "", "Invalid username or password.")
        elif self.hub.forbidden:
            self._refuse(403, "", "You don't have the rights to create a model under this namespace")
        elif hub_id in self.hub.repositories:
            self._json({"url": f"{self.hub.endpoint}/{hub_id}"}, 409)
        else:
            private = asked.get("private", asked.get("visibility") == "private")
            self.hub.repositories[hub_id] = Repository(private)
            self._json({"url": f"{self.hub.endpoint}/{hub_id}"})

    def _info(self, _: bytes, hub_id: str, revision: str | None = None) -> None:
        if (repository := self._repository(hub_id)) is None:
            return
        if (found := repository.at(revision or "main")) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        siblings = [{"rfilename": name} for name in found[1]]
        self._json({"id": hub_id, "sha": found[0], "private": repository.private, "siblings": siblings, "tags": []})

    def _tree(self, _: bytes, hub_id: str, revision: str) -> None:
        if (repository := self._repository(hub_id)) is None:
            return
        found = repository.at(revision)
        self._json([_entry(name, content) for name, content in found[1].items()] if found else [])

    def _preupload(self, body: bytes, hub_id: str, _: str) -> None:
        if (repository := self._repository(hub_id)) is None:
            return
        files = []
        for asked in json.loads(body)["files"]:
            name = asked["path"]
            entry = _entry(name, repository.files[name]) if name in repository.files else {}
            oid = entry.get("lfs", entry).get("oid")
            mode = "lfs" if name.endswith(LARGE) else "regular"
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def _batch(self, body: bytes, hub_id: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            known = asked["oid"] in self.hub.blobs
            place = {"upload": {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}"}}
            objects.append({**asked, **({} if known else {"actions": place})})
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, body: bytes, oid: str) -> None:
        if self.hub.uploads_left == 0:
            self._refuse(400, "", "broken off")
            return
        if self.hub.uploads_left is not None:
            self.hub.uploads_left -= 1
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._json({})

    def _commit(self, body: bytes, hub_id: str, _: str) -> None:
        if (repository := self._repository(hub_id)) is None:
            return
        files = dict(repository.files)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        name = repository.commit(files)
        self._json({"commitUrl": f"{self.hub.endpoint}/{hub_id}/commit/{name}", "commitOid": name})

    def _resolve(self, _: bytes, hub_id: str, revision: str, name: str) -> None:
        if (repository := self._repository(hub_id)) is None:
            return
        found = repository.at(revision)
        if found is None or name not in found[1]:
            self._refuse(404, "EntryNotFound")
            return
        commit, files = found
        content, entry = files[name], _entry(name, files[name])
        etag = entry.get("lfs", entry)["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked.group(1)) if asked else 0
        if asked:
            self.hub.ranges.append(asked.group(0))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "GET" and self.hub.broken.get(name):
            self.hub.broken[name] -= 1
            half = content[: len(content) // 2]
            self._break_off(half[start:], len(content) - start, headers, bool(asked))
            return
        self._send(content[start:], 206 if asked else 200, headers)

    def _break_off(self, content: bytes, promised: int, headers: dict[str, str], partial: bool) -> None:
        """Send less than was promised, and close the connection."""
        self.send_response(206 if partial else 200)
        for name, value in {"Content-Length": str(promised), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True

    def _yes(self, _: bytes) -> None:
        self._json({"errors": [], "warnings": [], "name": "someone", "type": "user"})


def _entry(name: str, content: bytes) -> dict[str, Any]:
    """Return a file as the hub lists it."""
    git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    ("POST /api/repos/create", "_create"),
    ("POST /api/validate-yaml", "_yes"),
    ("GET /api/whoami-v2", "_yes"),
    (f"GET /api/models/{_ID}", "_info"),
    (f"GET /api/models/{_ID}/revision/(.+)", "_info"),
    (f"GET /api/models/{_ID}/tree/([^/]+)/?", "_tree"),
    (f"POST /api/models/{_ID}/preupload/(.+)", "_preupload"),
    (f"POST /api/models/{_ID}/commit/(.+)", "_commit"),
    (rf"POST /{_ID}\.git/info/lfs/objects/batch", "_batch"),
    (r"PUT /lfs/([0-9a-f]{64})", "_put"),
    (f"(?:GET|HEAD) /{_ID}/resolve/([^/]+)/(.+)", "_resolve"),
)
