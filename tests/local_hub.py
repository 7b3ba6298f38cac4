"""A small hub on this machine: it speaks as much of the Hugging Face hub's protocol as push and download need.

Repositories with branches of immutable commits; files over `LFS_OVER` bytes go through git-LFS batch, upload and
verify. `cut_uploads` and `cut_commits` close the connection in the middle of that many requests.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right_token_for_tests"
LFS_OVER = 20_000
Files = Mapping[str, bytes]


def oid_of(content: bytes) -> str:
    """The content's SHA-256, as LFS names it."""
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repository:
    """Branches of commits; a commit is all its files."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, list[str]] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        """Put a new commit at the end of a branch."""
        names = "".join(f"{name}{oid_of(content)}" for name, content in files.items())
        oid = hashlib.sha1(f"{len(self.commits)}{names}".encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.branches.setdefault(branch, []).append(oid)
        return oid

    def oid(self, revision: str) -> str | None:
        """The commit that a branch or a commit's own name stands for."""
        return self.branches[revision][-1] if revision in self.branches else revision * (revision in self.commits)

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.branches[revision][-1]]


class Hub(ThreadingHTTPServer):
    """The server, and what it holds."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.cut_uploads = 0
        self.cut_commits = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers while inside."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            self._whoami()
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/refs", path):
            self._refs(found[1])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            self._tree(found[1], found[2], found[3] or "")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(found[1], found[2], found[3])
        else:
            self._json({"error": f"no such page: {path}"}, 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif not self._may_write():
            self._json({"error": "Invalid credentials in Authorization header"}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            repository = self.server.repositories[found[1]]
            repository.branches[found[2]] = list(repository.branches["main"])
            self._json({})
        elif re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            self._json({"files": [self._upload_mode(file) for file in json.loads(body)["files"]]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._json({"objects": [self._large(each) for each in json.loads(body)["objects"]]})
        elif path == "/lfs/verify":
            self._json({}, 200 if json.loads(body)["oid"] in self.server.large_files else 404)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self._commit(found[1], found[2], [json.loads(line) for line in body.splitlines()])
        else:
            self._json({"error": f"no such page: {path}"}, 404)

    def do_PUT(self) -> None:
        length = int(self.headers["Content-Length"])
        if self.server.cut_uploads > 0:
            self.server.cut_uploads -= 1
            self.rfile.read(length // 2)
            self._cut()
            return
        content = self.rfile.read(length)
        oid = self.path.rpartition("/")[2]
        if oid_of(content) == oid:
            self.server.large_files[oid] = content
        self._json({}, 200 if oid in self.server.large_files else 400)

    # --- what the pages say --------------------------------------------------------------------------------------

    def _whoami(self) -> None:
        if self._may_write():
            self._json({"name": "jane", "type": "user", "auth": {"type": "access_token"}})
        else:
            self._json({"error": "Invalid username or password."}, 401)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != "jane":
            message = f"You don't have the rights to create a model under the namespace {wanted['organization']!r}"
            self._json({"error": message}, 403)
        elif name in self.server.repositories:
            self._json({"error": "You already created this model repo"}, 409)
        else:
            repository = Repository(private=wanted.get("visibility") == "private")
            repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.server.repositories[name] = repository
            self._json({"url": f"{self.server.url}/{name}"})

    def _refs(self, name: str) -> None:
        if repository := self._readable(name):
            heads = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commits[-1]}
                for branch, commits in repository.branches.items()
            ]
            self._json({"branches": heads, "converts": [], "tags": []})

    def _tree(self, name: str, revision: str, folder: str) -> None:
        repository = self._readable(name)
        if repository is None or (oid := self._oid(repository, revision)) is None:
            return
        files = {path: content for path, content in repository.commits[oid].items() if path.startswith(folder)}
        if folder and not files:
            self._json({"error": "no such folder"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]
        self._json(entries)

    def _info(self, name: str, revision: str) -> None:
        repository = self._readable(name)
        if repository is not None and (oid := self._oid(repository, revision)) is not None:
            siblings = [{"rfilename": path} for path in repository.commits[oid]]
            self._json({"id": name, "sha": oid, "private": repository.private, "siblings": siblings})

    def _file(self, name: str, revision: str, path: str) -> None:
        repository = self._readable(name)
        if repository is None or (oid := self._oid(repository, revision)) is None:
            return
        content = repository.commits[oid].get(path)
        if content is None:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
            return
        self._bytes(content, 200, {"X-Repo-Commit": oid, "ETag": f'"{oid_of(content)}"'})

    def _commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        if self.server.cut_commits > 0:
            self.server.cut_commits -= 1
            self._cut()
            return
        repository = self.server.repositories[name]
        files = dict(repository.files(branch))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(branch, files)
        self._json({"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})

    def _upload_mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["size"] > LFS_OVER else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _large(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.server.large_files:
            return wanted
        upload = {"href": f"{self.server.url}/lfs/{wanted['oid']}"}
        return {**wanted, "actions": {"upload": upload, "verify": {"href": f"{self.server.url}/lfs/verify"}}}

    # --- answering -----------------------------------------------------------------------------------------------

    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _readable(self, name: str) -> Repository | None:
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self._may_write()):
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def _oid(self, repository: Repository, revision: str) -> str | None:
        if not (oid := repository.oid(revision)):
            self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return oid or None

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _json(self, answer: Any, code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        message = {"X-Error-Message": answer["error"]} if code >= 400 and "error" in answer else {}
        kind = {"Content-Type": "application/json"}
        self._bytes(json.dumps(answer).encode(), code, {**kind, **message, **(headers or {})})

    def _bytes(self, content: bytes, code: int, headers: Mapping[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
