"""
A stand-in for the Hub on loopback: as much of its HTTP API as huggingface_hub uses to create a repo (a model's or a
Space's), to commit regular and LFS files, and to resolve and download revisions. Set `HF_ENDPOINT` to `Hub.url` before
huggingface_hub is imported, and `HF_HUB_DISABLE_XET=1`, because it has no Xet storage.
"""

import base64
import hashlib
import json
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_of_the_owner"


@dataclass
class Repo:
    """Commits are whole trees, `{path: content}`, by their hash; branches name commits."""

    private: bool
    kind: str = "model"
    sdk: str | None = None
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        parent = self.branches.get(branch, "")
        oid = hashlib.sha1(f"{parent} {sorted(files)} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class Hub:
    """Use as a context manager; serves on a free port."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        # How many more large files are received whole; later ones are cut off in the middle.
        self.uploads_until_cut: float = float("inf")

    def __enter__(self) -> "Hub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision of a repo holds."""
        found = self.repos[repo]
        return found.commits[found.resolve(revision)]


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def blob_id(path: str, content: bytes) -> str:
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Answer(Exception):
    """Ends the handling of a request."""

    def __init__(self, status: int, body: Any = None, headers: dict[str, str] | None = None):
        self.status, self.headers = status, headers or {}
        self.body = body if isinstance(body, bytes) else json.dumps(body or {}).encode()


class _Cut(Exception):
    """Ends the connection without an answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        """Keep quiet; `Hub.requests` has the log."""

    def _handle(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0))) if self.command == "POST" else b""
        try:
            self._route([unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")])
            raise _Answer(404, {"error": f"{self.command} {self.path} is not served"})
        except _Cut:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        except _Answer as answer:
            self.send_response(answer.status)
            headers = {"Content-Length": str(len(answer.body)), "Content-Type": "application/json"} | answer.headers
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _route(self, parts: list[str]) -> None:
        if parts[:2] == ["api", "spaces"]:
            parts = ["api", "models", *parts[2:]]
        elif parts[0] == "spaces":
            parts = parts[1:]
        match self.command, parts:
            case "POST", ["api", "repos", "create"]:
                self._create()
            case "POST", ["api", "validate-yaml"]:
                self._validate(self._json()["content"])
            case "GET", ["api", "models", owner, name]:
                self._info(f"{owner}/{name}", "main")
            case "GET", ["api", "models", owner, name, "revision", revision]:
                self._info(f"{owner}/{name}", revision)
            case "GET", ["api", "models", owner, name, "tree", revision, *folder]:
                self._tree(f"{owner}/{name}", revision, "/".join(folder))
            case "POST", ["api", "models", owner, name, "preupload", revision]:
                self._preupload(f"{owner}/{name}", revision)
            case "POST", ["api", "models", owner, name, "commit", revision]:
                self._commit(f"{owner}/{name}", revision)
            case "POST", ["api", "models", owner, name, "branch", branch]:
                repo = self._repo(f"{owner}/{name}", writes=True)
                repo.branches.setdefault(branch, repo.branches["main"])
                raise _Answer(200)
            case "POST", [owner, name, "info", "lfs", "objects", "batch"]:
                self._offer_uploads(f"{owner}/{name.removesuffix('.git')}")
            case "PUT", ["large", oid]:
                self._receive(oid)
            case "GET" | "HEAD", [owner, name, "resolve", revision, *path]:
                self._resolve(f"{owner}/{name}", revision, "/".join(path))

    def _json(self) -> Any:
        return json.loads(self.body)

    def _is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str, writes: bool = False) -> Repo:
        repo = self.hub.repos.get(name)
        if writes and not self._is_owner():
            raise _Answer(401, {"error": "Invalid username or password."})
        if repo is None or (repo.private and not self._is_owner()):
            raise _Answer(401 if not self._is_owner() else 404, headers={"X-Error-Code": "RepoNotFound"})
        return repo

    def _tree_at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self._repo(name)
        oid = repo.resolve(revision)
        if oid is None:
            raise _Answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        return oid, repo.commits[oid]

    def _create(self) -> None:
        wanted = self._json()
        if not self._is_owner():
            raise _Answer(401, {"error": "Invalid username or password."})
        name = f"{wanted['organization']}/{wanted['name']}"
        answer = {"id": name, "url": f"{self.hub.url}/{name}"}
        if name in self.hub.repos:
            raise _Answer(409, answer)
        repo = self.hub.repos[name] = Repo(
            private=wanted.get("visibility") == "private", kind=wanted.get("type", "model"), sdk=wanted.get("sdk")
        )
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        raise _Answer(200, answer)

    def _validate(self, content: str) -> None:
        """What the Hub checks of a model card's metadata."""
        data = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
        errors = []
        bases = data.get("base_model", [])
        for base in [bases] if isinstance(bases, str) else bases:
            if base.count("/") > 1 or base.startswith("/"):
                errors.append(f'"base_model" {base} is not a repo')
        if data.get("base_model_relation") not in (None, "adapter", "finetune", "merge", "quantized"):
            errors.append('"base_model_relation" is unknown')
        if not isinstance(data.get("tags", []), list):
            errors.append('"tags" must be a list')
        body = {"errors": [{"message": message} for message in errors], "warnings": []}
        raise _Answer(400 if errors else 200, body)

    def _info(self, name: str, revision: str) -> None:
        oid, files = self._tree_at(name, revision)
        siblings = [{"rfilename": path} for path in files]
        raise _Answer(200, {"id": name, "sha": oid, "private": self._repo(name).private, "siblings": siblings})

    def _tree(self, name: str, revision: str, folder: str) -> None:
        _, files = self._tree_at(name, revision)
        if folder and not any(path.startswith(f"{folder}/") for path in files):
            raise _Answer(404, headers={"X-Error-Code": "EntryNotFound"})
        entries = []
        for path, content in files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(path, content)}
            if is_large(path):
                entry["lfs"] = {"oid": blob_id(path, content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        raise _Answer(200, [entry for entry in entries if entry["path"].startswith(folder)])

    def _preupload(self, name: str, revision: str) -> None:
        self._repo(name, writes=True)
        _, files = self._tree_at(name, revision)
        answers = []
        for file in self._json()["files"]:
            path = file["path"]
            answer = {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": blob_id(path, files[path])} if path in files else {}))
        raise _Answer(200, {"files": answers})

    def _offer_uploads(self, name: str) -> None:
        self._repo(name, writes=True)
        objects = []
        for wanted in self._json()["objects"]:
            offered = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large_files:
                offered["actions"] = {"upload": {"href": f"{self.hub.url}/large/{wanted['oid']}"}}
            objects.append(offered)
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def _receive(self, oid: str) -> None:
        length = int(self.headers["Content-Length"])
        if self.hub.uploads_until_cut < 1:
            self.rfile.read(length // 2)
            raise _Cut
        self.hub.uploads_until_cut -= 1
        content = self.rfile.read(length)
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Answer(400, {"error": "the content does not have this hash"})
        self.hub.large_files[oid] = content
        raise _Answer(200)

    def _commit(self, name: str, branch: str) -> None:
        repo = self._repo(name, writes=True)
        files = dict(repo.commits[repo.branches[branch]])
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.hub.large_files:
                        raise _Answer(400, {"error": f"the content of {value['path']} was never uploaded"})
                    files[value["path"]] = self.hub.large_files[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        oid = repo.commit(branch, files)
        raise _Answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        oid, files = self._tree_at(name, revision)
        if path not in files:
            raise _Answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob_id(path, files[path])}"'}
        raise _Answer(200, files[path], headers | {"Content-Type": "application/octet-stream"})
