"""A loopback server that speaks the part of the Hugging Face Hub's HTTP interface that reading data sets needs.

The tests then drive the real `huggingface_hub` (HF_ENDPOINT, or `endpoint=`) without the internet, through every
failure that the internet has. The server is of the standard library alone.

    HubServer          what a test holds: add_dataset, add_plain; fail_next, cut_next, slow, ignore_ranges, down; the
                       requests log; environment and reached, which point a client at it
      /api/datasets/ID[/revision/REV]              repo info: the commit sha, the siblings
      /api/datasets/ID/tree/REV[/PATH]             a listing in pages, joined by Link headers
      /api/datasets/ID/paths-info/REV              (POST) the same entries for the paths asked for
      /datasets/ID/resolve/REV/FILE                the file of a commit: as on the Hub, a redirect to the CDN where the
                                                   file is in LFS, the bytes themselves where it is in git
      /cdn/ID/SHA256/FILE                          the bytes, on a second port
      /plain/PATH                                  any bytes at a plain URL, as a mirror serves them
    _Reply             an answer before it is sent; _Blob and _Commit are what answers are made from
    _Answer            one connection: sends replies, at the pace and up to the byte that the test asked for

The CDN is another port because the client tells the Hub from a CDN by the origin of the URL: a HEAD follows a redirect
that stays on the Hub, and takes the commit and the size from a redirect that leaves it.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import pytest
from huggingface_hub import close_session, constants

API = re.compile(
    r"/api/datasets/(?P<repo>[^/]+/[^/]+)(?:/(?P<verb>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)
RESOLVE = re.compile(r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
CDN = re.compile(r"/cdn/[^/]+/[^/]+/(?P<sha256>[0-9a-f]{64})/.+")
RANGE = re.compile(r"bytes=(\d*)-(\d*)")
# What a data set's default .gitattributes leaves in git: no LFS info, and resolve answers with the bytes.
IN_GIT = (".gitattributes", ".json", ".md", ".py", ".yaml")
DATE = "2024-05-06T07:08:09.000Z"
PIECE = 1 << 18


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
    sent_bytes: int = 0  # of the body, as given to the kernel: up to a few MB ahead of the client unless throttled


@dataclass
class _Reply:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_content: bool = False  # a file's bytes: what cut_next and slow are about


@dataclass
class _Fault:
    pattern: str
    times: int
    method: str = "GET"
    reply: _Reply | None = None  # an error instead of the answer ...
    after_bytes: int = 0  # ... or the end of the connection
    reset: bool = False


@dataclass(frozen=True)
class _Blob:
    """A file's content, and the names that the Hub has for it."""

    content: bytes
    in_git: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git holds for a file in LFS."""
        oid, size = self.sha256, len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()

    @cached_property
    def git_oid(self) -> str:
        stored = self.content if self.in_git else self.pointer
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()


@dataclass(frozen=True)
class _Commit:
    sha: str
    files: dict[str, _Blob]

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


class HubServer:
    """`with HubServer() as hub:` serves at `hub.endpoint` until the block ends.

    A `pattern` is a substring or a regular expression, searched in the decoded path with its query. The client asks for
    a file under two paths, `/datasets/ID/resolve/REV/FILE` (HEAD; GET too where it reads ranges) and, for the bytes,
    `/cdn/ID/SHA256/FILE`: "FILE" matches both, "/cdn/.*FILE" and "/resolve/.*FILE" one of them.
    """

    def __init__(self, page_size: int = 1000) -> None:
        self.page_size = page_size
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()  # wakes throttled connections up
        self._repos: dict[str, dict[str, _Commit]] = {}
        self._main: dict[str, str] = {}
        self._blobs: dict[str, _Blob] = {}
        self._plain: dict[str, bytes] = {}
        self._faults: list[_Fault] = []
        self._pace: dict[str, float] = {}
        self._down: _Reply | None = None
        self._without_ranges: str | None = None
        self._listeners = [_Listener(self), _Listener(self)]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{listener.server_address[1]}" for listener in self._listeners)

    def __enter__(self) -> "HubServer":
        for listener in self._listeners:
            # The interval is what shutdown waits for.
            threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._closing.set()
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()

    # Who asks

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a process whose client is to ask this server alone, and knows no account."""
        return {
            "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "",
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip

    @contextlib.contextmanager
    def reached(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[None]:
        """The same for the client of this process, which read its variables when it was imported."""
        for name, value in self.environment(home).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        close_session()
        yield
        close_session()

    # What is served

    def add_dataset(self, repo: str, files: dict[str, bytes], sha: str | None = None) -> str:
        """Make `files` the commit that "main" means and return its sha; commits made before are still served.

        `sha`: the commit's name, where it has to be a certain one.
        """
        blobs = {path: _Blob(content, path.endswith(IN_GIT)) for path, content in sorted(files.items())}
        named = repr((repo, [(path, blob.sha256) for path, blob in blobs.items()]))
        sha = sha or hashlib.sha1(named.encode()).hexdigest()
        with self._lock:
            self._blobs.update({blob.sha256: blob for blob in blobs.values()})
            self._repos.setdefault(repo, {})[sha] = _Commit(sha, blobs)
            self._main[repo] = sha
        return sha

    def add_plain(self, path: str, content: bytes) -> str:
        """Serve `content` at a plain URL, which is returned; again with other content, the file there changes."""
        self._plain[path.lstrip("/")] = content
        return f"{self.endpoint}/plain/{quote(path.lstrip('/'))}"

    # What goes wrong

    def fail_next(
        self,
        pattern: str,
        *,
        status: int = 503,
        times: int = 1,
        retry_after: float | None = 0,
        method: str = "GET",
    ) -> None:
        """Answer the next requests that match with an error. `method` "*" is any of them."""
        self._add_fault(_Fault(pattern, times, method, reply=_error(status, "asked to fail", retry_after)))

    def cut_next(self, pattern: str, after_bytes: int, times: int = 1, *, reset: bool = False) -> None:
        """Close the connection after that many bytes of a GET's body, in order or with a reset (TCP RST).

        A reset also drops what the kernel has not delivered yet, so that the client may see fewer bytes.
        """
        self._add_fault(_Fault(pattern, times, after_bytes=after_bytes, reset=reset))

    def ignore_ranges(self, pattern: str | None) -> None:
        """Answer matching requests with the whole file (200), whatever range they ask for; None ends it."""
        self._without_ranges = pattern

    def slow(self, pattern: str, bytes_per_s: float | None) -> None:
        """Send the bodies of matching GETs at that pace from now on; None ends it, also for a body under way."""
        with self._lock:
            self._pace.pop(pattern, None)
            if bytes_per_s is not None:
                self._pace[pattern] = bytes_per_s

    def down(self, status: int | None = 503, retry_after: float | None = 0) -> None:
        """Answer everything with an error until up(); status None hangs up without an answer."""
        self._down = _Reply(0) if status is None else _error(status, "down for maintenance", retry_after)

    def up(self) -> None:
        self._down = None

    def seen(self, pattern: str, method: str | None = None) -> list[Request]:
        """The logged requests that match."""
        with self._lock:
            requests = list(self.requests)
        return [one for one in requests if method in (None, one.method) and _matches(pattern, one.path)]

    def _add_fault(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def _take_fault(self, request: Request, cut: bool) -> _Fault | None:
        """The first fault that is due for a request: an error, or for a body the end of its connection."""
        with self._lock:
            for fault in self._faults:
                is_due = fault.times > 0 and (fault.reply is None) == cut and fault.method in ("*", request.method)
                if is_due and _matches(fault.pattern, request.path):
                    fault.times -= 1
                    return fault
        return None

    def _pace_of(self, request: Request) -> float | None:
        with self._lock:
            return next((pace for pattern, pace in self._pace.items() if _matches(pattern, request.path)), None)

    # Answers

    def _reply_to(self, request: Request, target: str, headers: Message, posted: bytes) -> _Reply:
        if self._down is not None:
            return self._down
        if (fault := self._take_fault(request, cut=False)) is not None and fault.reply is not None:
            return fault.reply
        if self._without_ranges is not None and _matches(self._without_ranges, request.path):
            headers = Message()
        path, query = urlsplit(target).path, urlsplit(target).query
        parameters = {name: values[-1] for name, values in parse_qs(query).items()}
        if found := API.fullmatch(path):
            return self._api(found, parameters, posted)
        if found := RESOLVE.fullmatch(path):
            return self._resolve(found, headers)
        if (found := CDN.fullmatch(path)) and found["sha256"] in self._blobs:
            return _content(self._blobs[found["sha256"]].content, headers, {"ETag": f'"{found["sha256"]}"'})
        content = self._plain.get(unquote(path).removeprefix("/plain/")) if path.startswith("/plain/") else None
        if content is None:
            return _error(404, "Not Found")
        return _content(content, headers, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def _commit(self, repo: str, revision: str) -> _Commit | _Reply:
        # Where nobody is logged in, the Hub itself says 401 for a missing repo; the client takes that for one only at
        # an https:// endpoint. 404 is what it says to a user with a token.
        if repo not in self._repos:
            return _error(404, "Repository not found", code="RepoNotFound")
        sha = self._main[repo] if revision == "main" else revision
        commit = self._repos[repo].get(sha)
        return commit or _error(404, f"Invalid rev id: {revision}", code="RevisionNotFound")

    def _api(self, found: re.Match[str], parameters: dict[str, str], posted: bytes) -> _Reply:
        repo, revision, path = (
            unquote(found["repo"]),
            unquote(found["revision"] or "main"),
            unquote(found["path"] or ""),
        )
        commit = self._commit(repo, revision)
        if isinstance(commit, _Reply):
            return commit
        if found["verb"] == "tree":
            url = f"{self.endpoint}{found.string}"
            return self._page(commit, path, parameters, url)
        if found["verb"] == "paths-info":
            form = parse_qs(posted.decode())
            entries = [commit.entry(path.strip("/"), _is_true(form.get("expand"))) for path in form.get("paths", [])]
            return _json([entry for entry in entries if entry is not None])
        return _json(_repo_info(repo, commit, with_blobs=_is_true([parameters.get("blobs", "")])))

    def _page(self, commit: _Commit, folder: str, parameters: dict[str, str], url: str) -> _Reply:
        """A page of a listing; its Link header has the address of the next."""
        recursive, expand = (_is_true([parameters.get(name, "")]) for name in ("recursive", "expand"))
        paths = commit.listing(folder, recursive)
        if not paths and folder:
            return _error(404, f"{folder} does not exist", code="EntryNotFound", commit=commit.sha)
        # A cursor is opaque on the Hub: nothing is gained from counting with it.
        start = int(base64.urlsafe_b64decode(parameters["cursor"])) if "cursor" in parameters else 0
        end = start + min(self.page_size, int(parameters.get("limit", self.page_size)))
        reply = _json([commit.entry(path, expand) for path in paths[start:end]])
        if end < len(paths):
            cursor = base64.urlsafe_b64encode(str(end).encode()).decode()
            reply.headers["Link"] = f'<{url}?{urlencode(parameters | {"cursor": cursor})}>; rel="next"'
        return reply

    def _resolve(self, found: re.Match[str], headers: Message) -> _Reply:
        repo, path = unquote(found["repo"]), unquote(found["path"])
        commit = self._commit(repo, unquote(found["revision"]))
        if isinstance(commit, _Reply):
            return commit
        blob = commit.files.get(path)
        if blob is None:
            return _error(404, "Entry not found", code="EntryNotFound", commit=commit.sha)
        known = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.git_oid}"', "Accept-Ranges": "bytes"}
        if blob.in_git:
            return _content(blob.content, headers, known)
        location = f"{self.cdn}/cdn/{repo}/{blob.sha256}/{quote(path)}?Expires=4102444800&Signature=none"
        linked = {"X-Linked-Size": str(len(blob.content)), "X-Linked-Etag": f'"{blob.sha256}"', "Location": location}
        return _Reply(
            302, known | linked | {"Content-Type": "text/plain"}, f"Found. Redirecting to {location}".encode()
        )


def _matches(pattern: str, path: str) -> bool:
    return pattern in path or re.search(pattern, path) is not None


def _is_true(values: list[str] | None) -> bool:
    return bool(values) and values[-1].lower() in ("true", "1")


def _json(value: object) -> _Reply:
    return _Reply(200, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(value).encode())


def _error(
    status: int, message: str, retry_after: float | None = None, *, code: str | None = None, commit: str | None = None
) -> _Reply:
    headers = {"Content-Type": "application/json; charset=utf-8", "X-Error-Message": message}
    after = None if retry_after is None else f"{retry_after:g}"  # the client takes whole seconds only
    optional = {"X-Error-Code": code, "X-Repo-Commit": commit, "Retry-After": after}
    headers |= {name: value for name, value in optional.items() if value is not None}
    return _Reply(status, headers, json.dumps({"error": message}).encode())


def _repo_info(repo: str, commit: _Commit, with_blobs: bool) -> dict[str, Any]:
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


def _content(content: bytes, asked: Message, headers: dict[str, str]) -> _Reply:
    """A file, or the range of it that was asked for, never with a Content-Encoding."""
    headers = headers | {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    found = RANGE.fullmatch(asked.get("Range", ""))
    # If-Range: the part only of the file that the client began with.
    if not found or not (found[1] or found[2]) or asked.get("If-Range", headers["ETag"]) != headers["ETag"]:
        return _Reply(200, headers, content, is_content=True)
    size = len(content)
    if found[1]:
        start, end = int(found[1]), min(int(found[2] or size - 1), size - 1)
    else:
        start, end = max(size - int(found[2]), 0), size - 1
    if start >= size or start > end:
        return _Reply(416, headers | {"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{size}"
    return _Reply(206, headers, content[start : end + 1], is_content=True)


class _Listener(ThreadingHTTPServer):
    request_queue_size = 64

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Answer)

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that was killed is what the tests are about; a fault of the server's own must be seen.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept, as the client expects
    disable_nagle_algorithm = True
    server: _Listener

    def do_GET(self) -> None:
        hub = self.server.hub
        posted = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(
            self.command, unquote(self.path), self.headers.get("Range"), self.headers.get("Authorization")
        )
        asked = self.headers if self.command == "GET" else Message()  # ranges are defined for GET alone
        reply = hub._reply_to(request, self.path, asked, posted)
        request.status = reply.status
        with hub._lock:
            hub.requests.append(request)
        if reply.status == 0 or hub._closing.is_set():
            self._hang_up(reset=False)
            return
        self.send_response(reply.status)
        for name, value in (reply.headers | {"Content-Length": str(len(reply.body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(request, reply)

    do_HEAD = do_POST = do_GET

    def _send_body(self, request: Request, reply: _Reply) -> None:
        hub = self.server.hub
        cut = hub._take_fault(request, cut=True) if reply.is_content else None
        end = len(reply.body) if cut is None else min(cut.after_bytes, len(reply.body))
        try:
            for piece in self._pieces(request, memoryview(reply.body)[:end], reply.is_content):
                request.sent_bytes += len(piece)  # before, so that a client which has it all finds it all logged
                self.wfile.write(piece)
        except ConnectionError:  # the client is gone
            request.sent_bytes -= len(piece)
            self.close_connection = True
            return
        if cut is not None or request.sent_bytes < len(reply.body):
            self._hang_up(reset=cut is not None and cut.reset)

    def _pieces(self, request: Request, body: memoryview, is_content: bool) -> Iterator[memoryview]:
        """The body in pieces, each followed by the wait that the pace asks for, until the server closes."""
        hub, at = self.server.hub, 0
        while at < len(body) and not hub._closing.is_set():
            pace = hub._pace_of(request) if is_content else None
            size = PIECE if pace is None else max(1, min(PIECE, int(pace / 20)))
            yield body[at : at + size]
            at += size
            if pace is not None:
                hub._closing.wait(size / pace)

    def _hang_up(self, reset: bool) -> None:
        self.close_connection = True
        if not reset:
            with contextlib.suppress(OSError):  # the client was faster
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        # A lingering time of zero makes close() send RST. The descriptor is taken out of the socket object, which would
        # otherwise wait for its reader to be closed and be shut down in order first.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the log is `HubServer.requests`."""
