"""A loopback server that speaks the part of the Hugging Face Hub's HTTP interface that reading data sets and publishing
models needs.

The tests then drive the real `huggingface_hub` (HF_ENDPOINT, or `endpoint=`) without the internet, through every
failure that the internet has. The server is of the standard library alone.

    HubServer          what a test holds: add_dataset, add_plain, add_account; fail_next, cut_next, lose_next, slow,
                       hold, ignore_ranges, down; the requests log; environment and reached, which point a client at it
      /api/datasets/ID[/revision/REV]              repo info: the commit sha, the siblings
      /api/datasets/ID/tree/REV[/PATH]             a listing in pages, joined by Link headers
      /api/datasets/ID/paths-info/REV              (POST) the same entries for the paths asked for
      /datasets/ID/resolve/REV/FILE                the file of a commit: as on the Hub, a redirect to the CDN where the
                                                   file is in LFS, the bytes themselves where it is in git
      /cdn/ID/SHA256/FILE                          the bytes, on a second port
      /plain/PATH                                  any bytes at a plain URL, as a mirror serves them
    hub_uploads        the same for models, whose addresses have no "datasets/"; and all that writes them
    hub_replies        an answer before it is sent; blobs and commits are what answers are made from
    hub_connection     one connection: reads and sends, at the pace and up to the byte that the test asked for

The CDN is another port because the client tells the Hub from a CDN by the origin of the URL: a HEAD follows a redirect
that stays on the Hub, and takes the commit and the size from a redirect that leaves it.
"""

import base64
import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from huggingface_hub import close_session, constants
from support.hub_connection import Listener
from support.hub_replies import (
    IN_GIT,
    Blob,
    Commit,
    Fault,
    Reply,
    Request,
    content_reply,
    error_reply,
    is_true,
    json_reply,
    matches,
    repo_info,
)
from support.hub_uploads import Models

if TYPE_CHECKING:
    import pytest  # docs/local_hub.py runs without it

API = re.compile(
    r"/api/(?P<kind>dataset|model)s/(?P<repo>[^/]+/[^/]+)(?:/(?P<verb>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)
RESOLVE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
CDN = re.compile(r"/cdn/[^/]+/[^/]+/(?P<sha256>[0-9a-f]{64})/.+")


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
        self._repos: dict[str, dict[str, Commit]] = {}
        self._refs: dict[str, dict[str, str]] = {}  # branches and tags of a repository
        self._blobs: dict[str, Blob] = {}
        self._plain: dict[str, bytes] = {}
        self._faults: list[Fault] = []
        self._pace: dict[str, float] = {}
        self._held: dict[str, int] = {}
        self._gated: set[str] = set()
        self._down: Reply | None = None
        self._without_ranges: str | None = None
        self.models = Models(self)
        self._listeners = [Listener(self), Listener(self)]
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
        """Environment variables for a process whose client uses only this server, without an account."""
        return {
            "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "",
            "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip

    @contextlib.contextmanager
    def reached(self, monkeypatch: "pytest.MonkeyPatch", home: Path) -> Iterator[None]:
        """The same for this process, whose client read its variables at import."""
        for name, value in self.environment(home).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        close_session()
        yield
        close_session()

    # What is served

    def add_dataset(self, repo: str, files: dict[str, bytes], sha: str | None = None, ref: str = "main") -> str:
        """Make `files` the commit that `ref` means and return its sha; commits made before are still served.

        `sha`: the commit's name, where it has to be a certain one.
        """
        blobs = {path: Blob(content, path.endswith(IN_GIT)) for path, content in sorted(files.items())}
        named = repr((repo, [(path, blob.sha256) for path, blob in blobs.items()]))
        sha = sha or hashlib.sha1(named.encode()).hexdigest()
        with self._lock:
            self._blobs.update({blob.sha256: blob for blob in blobs.values()})
            self._repos.setdefault(repo, {})[sha] = Commit(sha, blobs)
            self._refs.setdefault(repo, {})[ref] = sha
        return sha

    def add_plain(self, path: str, content: bytes) -> str:
        """Serve `content` at a plain URL and return it. A second call replaces the content."""
        self._plain[path.lstrip("/")] = content
        return f"{self.endpoint}/plain/{quote(path.lstrip('/'))}"

    # What goes wrong

    def gate(self, repo: str) -> None:
        """Serve the files of a repository only to accounts; anybody may list them, as on the Hub."""
        self._gated.add(repo)

    def fail_next(
        self,
        pattern: str,
        *,
        status: int = 503,
        times: int = 1,
        retry_after: float | None = 0,
        method: str = "GET",
        message: str = "asked to fail",
    ) -> None:
        """Answer the next requests that match with an error. `method` "*" is any of them."""
        self._add_fault(Fault(pattern, times, method, reply=error_reply(status, message, retry_after)))

    def cut_next(
        self, pattern: str, after_bytes: int, times: int = 1, *, method: str = "GET", reset: bool = False
    ) -> None:
        """Close the connection after that many bytes of a GET's body, in order or with a reset (TCP RST).

        A reset also drops what the kernel has not delivered yet, so that the client may see fewer bytes. `method` "PUT"
        ends an upload, always with a reset, since the rest of it is not read.
        """
        self._add_fault(Fault(pattern, times, method, after_bytes=after_bytes, reset=reset))

    def lose_next(self, pattern: str, *, method: str = "POST", times: int = 1) -> None:
        """Execute the next matching request, then hang up without an answer."""
        self._add_fault(Fault(pattern, times, method, reply=Reply(0), is_lost=True))

    def ignore_ranges(self, pattern: str | None) -> None:
        """Answer matching requests with the whole file (200) despite their range; None ends it."""
        self._without_ranges = pattern

    def slow(self, pattern: str, bytes_per_s: float | None) -> None:
        """Send the bodies of matching GETs, and read those of PUTs, at that pace from now on; None ends it, also for a
        body under way.
        """
        with self._lock:
            self._pace.pop(pattern, None)
            if bytes_per_s is not None:
                self._pace[pattern] = bytes_per_s

    def hold(self, pattern: str, after_bytes: int) -> None:
        """Stop the bodies of matching GETs and PUTs there, with the connection open, until release(). Until then,
        a client is in the middle of the body.
        """
        with self._lock:
            self._held[pattern] = after_bytes

    def release(self) -> None:
        with self._lock:
            self._held.clear()

    def down(self, status: int | None = 503, retry_after: float | None = 0) -> None:
        """Answer everything with an error until up(); with status None, hang up without an answer."""
        self._down = Reply(0) if status is None else error_reply(status, "down for maintenance", retry_after)

    def up(self) -> None:
        self._down = None

    def seen(self, pattern: str, method: str | None = None) -> list[Request]:
        """The logged requests that match."""
        with self._lock:
            requests = list(self.requests)
        return [one for one in requests if method in (None, one.method) and matches(pattern, one.path)]

    def _log(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def _add_fault(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def _take_fault(self, request: Request, cut: bool, lost: bool = False) -> Fault | None:
        """The first fault that is due for a request: an error, or for a body the end of its connection."""
        with self._lock:
            for fault in self._faults:
                fits = (fault.reply is None, fault.is_lost) == (cut, lost) and fault.method in ("*", request.method)
                if fault.times > 0 and fits and matches(fault.pattern, request.path):
                    fault.times -= 1
                    return fault
        return None

    def _pace_of(self, request: Request) -> float | None:
        with self._lock:
            return next((pace for pattern, pace in self._pace.items() if matches(pattern, request.path)), None)

    def _room(self, request: Request, at: int, end: int) -> int:
        """How many bytes of a body may follow the first `at`; waits while it is held there. 0: the server closes."""
        while not self._closing.is_set():
            with self._lock:
                held = [stop for pattern, stop in self._held.items() if matches(pattern, request.path)]
            if (room := min([end, *held]) - at) > 0:
                return room
            self._closing.wait(0.01)
        return 0

    # Answers

    def _reply_to(self, request: Request, target: str, headers: Message, posted: bytes) -> Reply:
        if self._down is not None:
            return self._down
        if (fault := self._take_fault(request, cut=False)) is not None and fault.reply is not None:
            return fault.reply
        reply = self._answer(request, target, headers, posted)
        return reply if self._take_fault(request, cut=False, lost=True) is None else Reply(0)

    def _answer(self, request: Request, target: str, headers: Message, posted: bytes) -> Reply:
        if self._without_ranges is not None and matches(self._without_ranges, request.path):
            headers = Message()
        path, query = urlsplit(target).path, urlsplit(target).query
        parameters = {name: values[-1] for name, values in parse_qs(query).items()}
        written = self.models.reply(request.method, path, request.authorization, posted)
        if written is not None:
            return written
        if found := API.fullmatch(path):
            return self._api(found, parameters, posted)
        if found := RESOLVE.fullmatch(path):
            if unquote(found["repo"]) in self._gated and not request.authorization:
                return error_reply(401, "Access to this dataset is restricted", code="GatedRepo")
            return self._resolve(found, headers)
        if (found := CDN.fullmatch(path)) and found["sha256"] in self._blobs:
            return content_reply(self._blobs[found["sha256"]].content, headers, {"ETag": f'"{found["sha256"]}"'})
        content = self._plain.get(unquote(path).removeprefix("/plain/")) if path.startswith("/plain/") else None
        if content is None:
            return error_reply(404, "Not Found")
        return content_reply(content, headers, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def _commit(self, repo: str, revision: str) -> Commit | Reply:
        # Where nobody is logged in, the Hub itself says 401 for a missing repo; the client takes that for one only at
        # an https:// endpoint. 404 is what it says to a user with a token.
        if repo not in self._repos:
            return error_reply(404, "Repository not found", code="RepoNotFound")
        commit = self._repos[repo].get(self._refs[repo].get(revision, revision))
        return commit or error_reply(404, f"Invalid rev id: {revision}", code="RevisionNotFound")

    def _api(self, found: re.Match[str], parameters: dict[str, str], posted: bytes) -> Reply:
        repo, revision, path = (unquote(found[name] or "") for name in ("repo", "revision", "path"))
        commit = self._commit(repo if found["kind"] == "dataset" else f"models/{repo}", revision or "main")
        if isinstance(commit, Reply):
            return commit
        if found["verb"] == "tree":
            url = f"{self.endpoint}{found.string}"
            return self._page(commit, path, parameters, url)
        if found["verb"] == "paths-info":
            form = parse_qs(posted.decode())
            entries = [commit.entry(path.strip("/"), is_true(form.get("expand"))) for path in form.get("paths", [])]
            return json_reply([entry for entry in entries if entry is not None])
        return json_reply(repo_info(repo, commit, with_blobs=is_true([parameters.get("blobs", "")])))

    def _page(self, commit: Commit, folder: str, parameters: dict[str, str], url: str) -> Reply:
        """A page of a listing; its Link header has the address of the next."""
        recursive, expand = (is_true([parameters.get(name, "")]) for name in ("recursive", "expand"))
        paths = commit.listing(folder, recursive)
        if not paths and folder:
            return error_reply(404, f"{folder} does not exist", code="EntryNotFound", commit=commit.sha)
        # A cursor is opaque on the Hub: nothing is gained from counting with it.
        start = int(base64.urlsafe_b64decode(parameters["cursor"])) if "cursor" in parameters else 0
        end = start + min(self.page_size, int(parameters.get("limit", self.page_size)))
        reply = json_reply([commit.entry(path, expand) for path in paths[start:end]])
        if end < len(paths):
            cursor = base64.urlsafe_b64encode(str(end).encode()).decode()
            reply.headers["Link"] = f'<{url}?{urlencode(parameters | {"cursor": cursor})}>; rel="next"'
        return reply

    def _resolve(self, found: re.Match[str], headers: Message) -> Reply:
        repo, path = unquote(found["repo"]), unquote(found["path"])
        commit = self._commit(repo if found["kind"] else f"models/{repo}", unquote(found["revision"]))
        if isinstance(commit, Reply):
            return commit
        blob = commit.files.get(path)
        if blob is None:
            return error_reply(404, "Entry not found", code="EntryNotFound", commit=commit.sha)
        known = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.git_oid}"', "Accept-Ranges": "bytes"}
        if blob.in_git:
            return content_reply(blob.content, headers, known)
        location = f"{self.cdn}/cdn/{repo}/{blob.sha256}/{quote(path)}?Expires=4102444800&Signature=none"
        linked = {"X-Linked-Size": str(len(blob.content)), "X-Linked-Etag": f'"{blob.sha256}"', "Location": location}
        return Reply(302, known | linked | {"Content-Type": "text/plain"}, f"Found. Redirecting to {location}".encode())
