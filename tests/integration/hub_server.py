"""A small Hub on the loopback interface: the endpoints that ``huggingface_hub`` uses for models, kept in memory.

It speaks regular files and LFS (redirects to a second URL, ranges), branches and commits, and checks cards by the rules
that the Hub documents. It can cut a download off, as a network does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.integration.hub_cards import card_problems, space_problems
from tests.integration.hub_state import Hub, Repo
from tests.integration.streaming_server import running

TOKEN = "hf_loopback"  # noqa: S105 - of this server alone
OWNER = "owner"
LFS_SUFFIXES = (".safetensors", ".bin", ".model")


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a Hub until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url, hub.storage = (f"http://{host}:{server.server_address[1]}" for host in ("127.0.0.1", "localhost"))
    with running(server):
        yield hub


class _RefusedError(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        body = self._body()
        try:
            for pattern, name in _ROUTES[self.command]:
                if match := re.fullmatch(pattern, path):
                    getattr(self, name)(*match.groups(), body=body, query=query)
                    return
            raise _RefusedError(404, "", f"{self.command} {path} is not part of this Hub")
        except _RefusedError as error:
            self._send(error.status, json.dumps({"error": str(error)}).encode(), {"X-Error-Code": error.code})

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    # What is asked of the Hub.

    def create_repo(self, *, body: bytes, query: Any) -> None:
        self._check_token()
        asked = json.loads(body)
        is_space = asked.get("type") == "space"
        repo_id = f"{'spaces/' if is_space else ''}{asked.get('organization') or OWNER}/{asked['name']}"
        created = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repos:
            self._send_json({**created, "error": "You already created this model repo"}, status=409)
            return
        repo = self.hub.repos[repo_id] = Repo(
            private=asked.get("private", asked.get("visibility") == "private"),
            sdk=asked["sdk"] if is_space else None,
        )
        repo.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._send_json(created)

    def create_branch(self, repo_id: str, branch: str, *, body: bytes, query: Any) -> None:
        self._check_token()
        repo = self._repo(repo_id)
        if branch in repo.branches:
            raise _RefusedError(409, "", f"Reference already exists: {branch}")
        repo.branches[branch] = repo.branches[json.loads(body or b"{}").get("startingPoint", "main")]
        self._send_json({})

    def validate_card(self, *, body: bytes, query: Any) -> None:
        asked = json.loads(body)
        problems = (space_problems if asked["repoType"] == "space" else card_problems)(asked["content"])
        answer = {"errors": [{"message": problem} for problem in problems], "warnings": []}
        self._send_json(answer, status=400 if problems else 200)

    def preupload(self, repo_id: str, revision: str, *, body: bytes, query: Any) -> None:
        self._check_token()
        self._commit_id(repo_id, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self._send_json({"files": files})

    def lfs_batch(self, repo_id: str, *, body: bytes, query: Any) -> None:
        self._check_token()
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        self._send_json({"transfer": "basic", "objects": objects})

    def put_object(self, oid: str, *, body: bytes, query: Any) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _RefusedError(400, "", "the content is not that of its SHA-256")
        self.hub.objects[oid] = body
        self._send(200, b"")

    def commit(self, repo_id: str, branch: str, *, body: bytes, query: Any) -> None:
        self._check_token()
        self._commit_id(repo_id, branch)
        lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines[1:]:
            value = line["value"]
            is_lfs = line["key"] == "lfsFile"
            files[value["path"]] = self.hub.objects[value["oid"]] if is_lfs else base64.b64decode(value["content"])
        find_problems = card_problems if self._repo(repo_id).sdk is None else space_problems
        if problems := find_problems(files.get("README.md", b"").decode()):
            raise _RefusedError(400, "", f"Invalid metadata in README.md: {problems}")
        target = "refs/pr/1" if query.get("create_pr") else branch
        repo = self._repo(repo_id)
        repo.branches.setdefault(target, repo.branches[branch])
        oid = repo.commit(target, lines[0]["value"]["summary"], files)
        answer = {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid}
        self._send_json({**answer, "pullRequestUrl": f"{self.hub.url}/{repo_id}/discussions/1"})

    def model_info(self, repo_id: str, revision: str | None = None, *, body: bytes, query: Any) -> None:
        oid = self._commit_id(repo_id, revision or "main")
        files = self._repo(repo_id).commits[oid]
        siblings = [{"rfilename": path} for path in files]
        self._send_json({"id": repo_id, "modelId": repo_id, "sha": oid, "siblings": siblings, "tags": []})

    def tree(self, repo_id: str, revision: str, *, body: bytes, query: Any) -> None:
        files = self._repo(repo_id).commits[self._commit_id(repo_id, revision)]
        entries = []
        for path, content in files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self._send_json(entries)

    def resolve(self, repo_id: str, revision: str, path: str, *, body: bytes, query: Any) -> None:
        oid = self._commit_id(repo_id, revision)
        content = self._repo(repo_id).commits[oid].get(path)
        if content is None:
            raise _RefusedError(404, "EntryNotFound", f"{path} is not in {repo_id}")
        headers = {"X-Repo-Commit": oid}
        if not path.endswith(LFS_SUFFIXES):
            self._send_file(path, content, {**headers, "ETag": f'"{_blob_id(content)}"'})
            return
        sha256 = hashlib.sha256(content).hexdigest()
        self.hub.objects[sha256] = content
        linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
        self._send(302, b"", {**headers, **linked, "Location": f"{self.hub.storage}/objects/{sha256}?name={path}"})

    def get_object(self, oid: str, *, body: bytes, query: Any) -> None:
        self._send_file(query.get("name", [oid])[0], self.hub.objects[oid], {"ETag": f'"{oid}"'})

    # How it answers.

    def _repo(self, repo_id: str) -> Repo:
        if repo_id not in self.hub.repos:
            raise _RefusedError(401, "RepoNotFound", f"no repository {repo_id}")
        return self.hub.repos[repo_id]

    def _commit_id(self, repo_id: str, revision: str) -> str:
        repo = self._repo(repo_id)
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    def _check_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _RefusedError(401, "", "Invalid username or password.")

    def _send_file(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        status, start = 200, 0
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            status, start = 206, int(asked[1])
            end = min(int(asked[2]) + 1 if asked[2] else len(content), len(content))
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
            content = content[start:end]
        length = self.hub.cut(name) if self.command == "GET" else None
        self._send(status, content, headers, length=length)

    def _send_json(self, answer: Any, *, status: int = 200) -> None:
        self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None, *, length: int | None = None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:length])
        if length is not None:
            self.close_connection = True  # before all was sent, which the client notices


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES = {
    "HEAD": [(rf"/{_ID}/resolve/([^/]+)/(.+)", "resolve")],
    "GET": [
        (rf"/api/models/{_ID}", "model_info"),
        (rf"/api/models/{_ID}/revision/(.+)", "model_info"),
        (rf"/api/models/{_ID}/tree/([^/]+)", "tree"),
        (rf"/{_ID}/resolve/([^/]+)/(.+)", "resolve"),
        (r"/objects/(\w+)", "get_object"),
    ],
    "POST": [
        (r"/api/repos/create", "create_repo"),
        (r"/api/validate-yaml", "validate_card"),
        (rf"/api/models/{_ID}/branch/(.+)", "create_branch"),
        (rf"/api/models/{_ID}/preupload/(.+)", "preupload"),
        (rf"/api/models/{_ID}/commit/(.+)", "commit"),
        (rf"/api/(spaces/{_ID[1:]}/preupload/(.+)", "preupload"),
        (rf"/api/(spaces/{_ID[1:]}/commit/(.+)", "commit"),
        (rf"/{_ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    ],
    "PUT": [(r"/objects/(\w+)", "put_object")],
}
