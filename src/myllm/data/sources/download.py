"""Downloads: one file at a time, resumed where they stopped, verified before the file gets its name.

`hf_hub_download` restarts a file after a kill, which costs gigabytes, so the bytes are fetched here, with the client's
own headers and errors.
"""

import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from myllm.errors import UserError, out_of_space
from myllm.files import add_filename, file_lock, file_sha256, fsync_dir

from .hub_listing import UnreachableError, first_line, hub_endpoint
from .source import SourceFile

CHUNK_BYTES = 1 << 20
TRIES = 8
"""A little over a minute if no server answers."""
_TIMEOUT_S = 60
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB = re.compile(r"hf://datasets/(?P<repo>[^/]+/[^/@]+)@(?P<revision>[^/]+)/(?P<path>.+)")


def local_path(file: SourceFile, downloads: Path) -> Path:
    """Where a file is, or will be once it is downloaded."""
    if not file.remote:
        return Path(file.location)
    # Readers depend on the suffix, so it stays. Other characters are escaped for any file system.
    name = quote(file.name, safe="/-_.")
    parts = name.split("/")
    if len(name) > 1_000 or max(map(len, parts)) > 200 or ".." in parts:
        name = f"{hashlib.sha256(file.name.encode()).hexdigest()[:16]}-{name[-100:].replace('/', '-')}"
    return downloads / name


def download_file(file: SourceFile, downloads: Path, kept: Path | None = None, tries: int = TRIES) -> Path:
    """The path of the file, downloaded if necessary.

    Args:
        kept: a folder to look in first, which is not changed.
        tries: consecutive tries without a new byte.

    Raises:
        UnreachableError: no new byte after all tries.
        UserError: the download is not the listed file.
    """
    path = local_path(file, downloads)
    if not file.remote:
        return path
    if kept is not None and _is_complete(file, local_path(file, kept)):
        return local_path(file, kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Preparations with other settings may share the folder, and a killed one's process may live a moment longer.
    with file_lock(path.with_name(f".{path.name[-200:]}.lock")):
        if not _is_complete(file, path):
            _download_verified(file, path, tries)
    return path


def _is_complete(file: SourceFile, path: Path) -> bool:
    """Whether the path holds the listed file. Another revision's file may have the same name."""
    return path.exists() and not _fault(file, path)


def _download_verified(file: SourceFile, path: Path, tries: int) -> None:
    partial = path.with_name(path.name + ".part")
    for last in (False, True):
        try:
            _download(file, partial, tries)
            fault = _fault(file, partial)
        except _ReplacedError as error:
            fault = str(error)
        if not fault:
            break
        partial.unlink(missing_ok=True)
        if last:
            raise UserError(
                f"the download of {file.location} is not the listed file: {fault}; the server may have replaced it. "
                "Delete the listing under temp_data/listings to use the current file"
            )
    partial.rename(path)
    fsync_dir(path.parent)


class _ReplacedError(Exception):
    """The server has another file at this address than the listed one."""


def _download(file: SourceFile, partial: Path, tries: int) -> None:
    """Append to `partial` until the server has no more.

    Raises:
        _ReplacedError: the server's file may not continue `partial`.
    """
    if _HUB.fullmatch(file.location):
        hub_endpoint()  # an invalid one is not retried
    failures = 0
    while True:
        before = _size(partial)
        try:
            _append_rest(file, partial, before)
            return
        except _ReplacedError:
            raise
        except Exception as error:  # the client's errors have no common class across its versions
            if out_of_space(error):
                raise
            failures = 0 if _size(partial) > before else failures + 1
            if is_permanent(error):
                raise UnreachableError(
                    f"cannot download {file.location}: {first_line(error)}; if the file was moved, delete the listing "
                    "under temp_data/listings; if it is not public, log in with `hf auth login`"
                ) from None
            if failures >= tries:
                raise UnreachableError(
                    f"cannot download {file.location}: {first_line(error)}; check the network, a proxy (HTTPS_PROXY) "
                    "and HF_ENDPOINT. Rerun the same command to resume the download"
                ) from None
            time.sleep(max(retry_after(error), min(2 ** max(failures - 1, 0), 20)))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def retry_after(error: Exception) -> int:
    """Seconds to wait before the next request, as the server asks, up to five minutes."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = getattr(getattr(error, "response", None), "headers", {})
    after = headers.get("retry-after", "")
    if after.isdecimal():
        return min(int(after), 300)
    # The Hub counts requests in windows of five minutes; its own header says when the next one begins.
    window = parse_ratelimit_headers(headers) if headers else None
    return min(window.reset_in_seconds + 1, 301) if window and not window.remaining else 0


def is_permanent(error: Exception) -> bool:
    """Whether a retry is useless: offline mode, not found, not allowed."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", 0)
    return isinstance(error, OfflineModeIsEnabled) or (400 <= status < 500 and status not in (408, 429))


def _append_rest(file: SourceFile, partial: Path, size: int) -> None:
    if file.size_bytes and size == file.size_bytes:
        return
    if file.size_bytes and size > file.size_bytes:  # left by another file
        partial.unlink()
        size = 0
    # Without the client's retries: after a connection lost in the body it would request the same range again.
    with _request(file, f"bytes={size}-" if size else None, max_retries=0) as response:
        if response.status_code == 416:  # the file ends where `partial` does
            return
        _check_unchanged(file, response.headers)
        with add_filename(partial), partial.open("ab") as out:
            if response.status_code != 206:  # the whole file in spite of the range
                out.truncate(0)
            for chunk in response.iter_raw():
                out.write(chunk)
                out.flush()  # a buffered rest is lost with the process


@contextmanager
def _request(file: SourceFile, byte_range: str | None, **options: Any) -> Iterator[Any]:
    """A streamed GET. Only the Hub gets the account's token."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url, headers = file.location, {"Accept-Encoding": "identity"}
    if found := _HUB.fullmatch(url):
        url = hf_hub_url(found["repo"], found["path"], repo_type="dataset", revision=found["revision"])
        headers = build_hf_headers() | headers
    if byte_range:
        headers["Range"] = byte_range
    with http_stream_backoff(
        "GET", url, headers=headers, timeout=_TIMEOUT_S, follow_redirects=True, **options
    ) as response:
        if response.status_code != 416:
            hf_raise_for_status(response)
        yield response


def _check_unchanged(file: SourceFile, headers: Mapping[str, str]) -> None:
    """Compare the ETag or date of a plain URL with the listed one. Files of the Hub have a hash of their content."""
    listed = f"url:{file.location} {file.size_bytes} "
    expected = file.digest.removeprefix(listed) if file.digest.startswith(listed) else ""
    found = headers.get("etag") or headers.get("last-modified") or ""
    if expected and found and expected.removeprefix("W/") != found.removeprefix("W/"):
        raise _ReplacedError(f"its ETag or date is {found}, expected {expected}")


def _fault(file: SourceFile, path: Path) -> str:
    """How a download differs from the listed file, or an empty string."""
    size = _size(path)
    if file.size_bytes and size != file.size_bytes:
        return f"{size:,} bytes, expected {file.size_bytes:,}"
    if _SHA256.fullmatch(file.digest) and (found := file_sha256(path)) != file.digest:
        return f"sha256 {found[:12]}..., expected {file.digest[:12]}..."
    if file.digest.startswith("git:"):  # small files, which the Hub stores in git itself
        found = "git:" + hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest()
        return "" if found == file.digest else f"{found}, expected {file.digest}"
    return ""


def download_head(file: SourceFile, folder: Path, max_bytes: int) -> tuple[Path, int]:
    """The path and size in bytes of a file with the first `max_bytes`, with the same suffix. For samples."""
    path = folder / Path(file.name).name
    with path.open("wb") as out:
        if not file.remote:
            with open(file.location, "rb") as whole:
                out.write(whole.read(max_bytes))
            return path, out.tell()
        try:
            with _request(file, f"bytes=0-{max_bytes - 1}") as response:
                if response.status_code == 416:  # the file is empty
                    return path, 0
                for chunk in response.iter_raw(CHUNK_BYTES):
                    out.write(chunk[: max_bytes - out.tell()])
                    if out.tell() >= max_bytes:
                        break
        except Exception as error:  # the client's errors have no common class across its versions
            if out_of_space(error):
                raise
            raise UnreachableError(f"cannot download {file.location}: {first_line(error)}") from None
        return path, out.tell()
