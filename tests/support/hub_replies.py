"""Parts of the loopback Hub: requests, replies, and files and commits as the Hub describes them."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from email.message import Message
from functools import cached_property
from typing import Any

RANGE = re.compile(r"bytes=(\d*)-(\d*)")
# What a repository's default .gitattributes leaves in git: no LFS info, and resolve answers with the bytes.
IN_GIT = (".gitattributes", ".json", ".md", ".py", ".yaml")
DATE = "2024-05-06T07:08:09.000Z"


@dataclass
class Request:
    """A line of the log. `path` is decoded and has its query; `sent_bytes` grows while a body is being sent.

    Status 0: hung up without an answer.
    """

    method: str
    path: str
    range: str | None
    authorization: str | None = None
    status: int = 0
    received_bytes: int = 0  # of a PUT's body
    sent_bytes: int = 0  # of the body, as given to the kernel: up to a few MB ahead of the client unless throttled


@dataclass
class Reply:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_content: bool = False  # a file's bytes: what cut_next and slow are about


@dataclass
class Fault:
    pattern: str
    times: int
    method: str = "GET"
    reply: Reply | None = None  # an error instead of the answer ...
    after_bytes: int = 0  # ... or the end of the connection
    reset: bool = False
    is_lost: bool = False  # ... or all is done, and the connection ends without an answer


@dataclass(frozen=True)
class Blob:
    """A file's content and its hashes on the Hub."""

    content: bytes
    in_git: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git stores for a file in LFS."""
        oid, size = self.sha256, len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()

    @cached_property
    def git_oid(self) -> str:
        stored = self.content if self.in_git else self.pointer
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()


@dataclass(frozen=True)
class Commit:
    sha: str
    files: dict[str, Blob]
    title: str = "Add files"
    message: str = ""
    parent: str | None = None

    def entry(self, path: str, expand: bool) -> dict[str, Any] | None:
        """A file or a folder as a listing shows it."""
        if path in self.files:
            blob = self.files[path]
            entry = {"type": "file", "oid": blob.git_oid, "size": len(blob.content), "path": path}
            if not blob.in_git:
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
        else:
            below = [f"{name} {blob.git_oid}" for name, blob in self.files.items() if name.startswith(f"{path}/")]
            if not below:
                return None
            oid = hashlib.sha1("\n".join(sorted(below)).encode()).hexdigest()
            entry = {"type": "directory", "oid": oid, "size": 0, "path": path}
        return entry | ({"lastCommit": {"id": self.sha, "title": "Add files", "date": DATE}} if expand else {})

    def listing(self, folder: str, recursive: bool) -> list[str]:
        """Paths under a folder in git's order; a file lists as itself."""
        if folder in self.files:
            return [folder]
        start = len(folder) + 1 if folder else 0
        paths: dict[str, str] = {}  # by the key that git sorts with
        for path in self.files:
            if not path.startswith(f"{folder}/" if folder else ""):
                continue
            names = path[start:].split("/")
            for depth in range(1, len(names) + 1 if recursive else 2):
                at = path[:start] + "/".join(names[:depth])
                paths[at if at == path else f"{at}/"] = at
        return [paths[key] for key in sorted(paths)]


def matches(pattern: str, path: str) -> bool:
    return pattern in path or re.search(pattern, path) is not None


def is_true(values: list[str] | None) -> bool:
    return bool(values) and values[-1].lower() in ("true", "1")


def json_reply(value: object) -> Reply:
    return Reply(200, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(value).encode())


def error_reply(
    status: int, message: str, retry_after: float | None = None, *, code: str | None = None, commit: str | None = None
) -> Reply:
    headers = {"Content-Type": "application/json; charset=utf-8", "X-Error-Message": message}
    after = None if retry_after is None else f"{retry_after:g}"  # the client takes whole seconds only
    optional = {"X-Error-Code": code, "X-Repo-Commit": commit, "Retry-After": after}
    headers |= {name: value for name, value in optional.items() if value is not None}
    return Reply(status, headers, json.dumps({"error": message}).encode())


def repo_info(repo: str, commit: Commit, with_blobs: bool) -> dict[str, Any]:
    siblings: list[dict[str, Any]] = []
    for path, blob in commit.files.items():
        sibling: dict[str, Any] = {"rfilename": path}
        if with_blobs:
            size = len(blob.content)
            sibling |= {"size": size, "blobId": blob.git_oid}
            if not blob.in_git:
                sibling["lfs"] = {"sha256": blob.sha256, "size": size, "pointerSize": len(blob.pointer)}
        siblings.append(sibling)
    known = {"id": repo, "author": repo.split("/")[0], "sha": commit.sha, "siblings": siblings}
    return known | {"lastModified": DATE, "createdAt": DATE, "private": False, "gated": False, "disabled": False}


def content_reply(content: bytes, asked: Message, headers: dict[str, str]) -> Reply:
    """A file or the requested range, never with a Content-Encoding."""
    headers = headers | {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    found = RANGE.fullmatch(asked.get("Range", ""))
    # If-Range: the part only of the file that the client began with.
    if not found or not (found[1] or found[2]) or asked.get("If-Range", headers["ETag"]) != headers["ETag"]:
        return Reply(200, headers, content, is_content=True)
    size = len(content)
    if found[1]:
        start, end = int(found[1]), min(int(found[2] or size - 1), size - 1)
    else:
        start, end = max(size - int(found[2]), 0), size - 1
    if start >= size or start > end:
        return Reply(416, headers | {"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{size}"
    return Reply(206, headers, content[start : end + 1], is_content=True)
