"""A server that speaks the Hub's protocol, for huggingface_hub's own client; all is in memory.

Repositories are created, files announced (preupload), large ones uploaded (LFS batch), committed,
listed (model info, tree) and downloaded (resolve, ranges). Who has the token may do all of it.

Source: https://huggingface.co/docs/hub/api and the client, `huggingface_hub/_commit_api.py`,
`lfs.py` and `file_download.py`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from attrs import define, field

TOKEN = "hf_tests"


@define
class Repository:
    """Commits, oldest first, each with the whole tree: contents by path."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(factory=dict)

    def tree(self, revision: str) -> tuple[str, dict[str, bytes]]:
        """A revision's commit and files; the last one's for a branch."""
        if revision in self.commits:
            return revision, self.commits[revision]
        if revision != "main" or not self.commits:
            raise KeyError(revision)
        return list(self.commits.items())[-1]


@define
class Hub:
    """A running server.

    Attributes:
        url: Its address.
        repositories: By name.
        objects: What was uploaded as LFS, by SHA-256.
        received: Bytes of uploaded objects.
        sent: Bytes of downloaded files.
        refuse_uploads_after: How many more objects are taken before uploads fail; None for no end.
        unavailable_after: How many more files are given before downloads fail; None for no end.
        listing_fails: Whether the files of a repository cannot be listed.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(factory=dict)
    objects: dict[str, bytes] = field(factory=dict)
    received: int = 0
    sent: int = 0
    refuse_uploads_after: int | None = None
    unavailable_after: int | None = None
    listing_fails: bool = False


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A server on a free port, while the block lasts."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub, "lock": threading.Lock()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[Hub]
    lock: ClassVar[threading.Lock]

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    # What is asked

    def do_GET(self) -> None:
        self._read()

    def do_HEAD(self) -> None:
        self._read()

    def _read(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._with_tree(found[1], found[2] or "main", self._info)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._with_tree(found[1], found[2], self._list)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name = found[3]
            self._with_tree(found[1], found[2], lambda *tree: self._file(name, *tree))
        else:
            self._answer(404, {"error": f"no such page: {path}"})

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        if not self._allowed():
            return
        if path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            self._announce(found[1], json.loads(body))
        elif re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404, {"error": f"no such page: {path}"})

    def do_PUT(self) -> None:
        """An object of LFS: its address is the permission."""
        oid, body = self.path.rpartition("/")[2], self._body()
        with self.lock:
            left = self.hub.refuse_uploads_after
            if left is not None:
                self.hub.refuse_uploads_after = max(0, left - 1)
            if left != 0 and hashlib.sha256(body).hexdigest() == oid:
                self.hub.objects[oid] = body
                self.hub.received += len(body)
                self._answer(200, {})
                return
        self._answer(403, {"error": "not taken"})

    # What is answered

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            self._answer(409, {"error": "You already created this model repo", "url": url})
            return
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repositories[name] = Repository(private)
        self._answer(200, {"url": url, "name": name, "id": name})

    def _announce(self, name: str, asked: dict[str, Any]) -> None:
        if (repository := self._repository(name)) is None:
            return
        tree = repository.tree("main")[1] if repository.commits else {}
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": _oid(file["path"], tree[file["path"]]) if file["path"] in tree else None,
            }
            for file in asked["files"]
        ]
        self._answer(200, {"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            entry = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        if (repository := self._repository(name)) is None:
            return
        tree = dict(repository.tree("main")[1]) if repository.commits else {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        summary = json.dumps([len(repository.commits), sorted(tree)])
        oid = hashlib.sha1(summary.encode()).hexdigest()
        repository.commits[oid] = tree
        url = f"{self.hub.url}/{name}/commit/{oid}"
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def _info(self, name: str, commit: str, tree: dict[str, bytes]) -> None:
        if self.hub.listing_fails:
            self._answer(403, {"error": "later"})
            return
        siblings = [{"rfilename": path} for path in tree]
        private = self.hub.repositories[name].private
        info = {"id": name, "sha": commit, "private": private, "siblings": siblings, "tags": []}
        self._answer(200, {**info, "modelId": name, "_id": name, "downloads": 0, "likes": 0})

    def _list(self, name: str, commit: str, tree: dict[str, bytes]) -> None:
        if self.hub.listing_fails:
            self._answer(403, {"error": "later"})
            return
        entries: list[dict[str, Any]] = []
        for path, data in tree.items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
            if _is_large(path):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
            entries.append(entry)
        self._answer(200, entries)

    def _file(self, path: str, name: str, commit: str, tree: dict[str, bytes]) -> None:
        if path not in tree:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET" and self.hub.unavailable_after is not None:
            if self.hub.unavailable_after == 0:
                self._answer(404, {"error": "gone"}, {"X-Error-Code": "EntryNotFound"})
                return
            self.hub.unavailable_after -= 1
        data = tree[path]
        headers = {"ETag": f'"{_oid(path, data)}"', "X-Repo-Commit": commit}
        if _is_large(path):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
        status = 200
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, total = 206, len(data)
            headers["Content-Range"] = f"bytes {found[1]}-{total - 1}/{total}"
            data = data[int(found[1]) :]
        self._answer(status, data, headers)

    # How

    def _with_tree(self, name: str, revision: str, answer: Any) -> None:
        if not self._allowed():
            return
        if (repository := self._repository(name)) is None:
            return
        try:
            commit, tree = repository.tree(revision)
        except KeyError:
            headers = {"X-Error-Code": "RevisionNotFound"}
            self._answer(404, {"error": "Invalid rev id"}, headers)
            return
        answer(name, commit, tree)

    def _repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None:
            headers = {"X-Error-Code": "RepoNotFound"}
            self._answer(404, {"error": "Repository not found"}, headers)
        return found

    def _allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._answer(401, {"error": "Invalid username or password."})
        return False

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
            self.hub.sent += len(data) if isinstance(body, bytes) else 0


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", "tokenizer.json"))


def _oid(path: str, data: bytes) -> str:
    """What the Hub calls a file's content: of git, or of LFS."""
    return hashlib.sha256(data).hexdigest() if _is_large(path) else _blob(data)


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
