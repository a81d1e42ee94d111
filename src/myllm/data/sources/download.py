"""Downloads of whole files, verified before they get their name.

The Hub's client downloads them. It resumes after a lost connection, but not after a kill, which costs the file again.
"""

import hashlib
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tqdm import tqdm

from myllm.errors import UserError, out_of_space
from myllm.files import add_filename, file_lock, file_sha256, fsync_dir

from .hub_listing import UnreachableError, first_line, hub_endpoint, request_head
from .source import SourceFile

TRIES = 4
"""Within each, the client tries several times. About two minutes if no server answers."""
_TIMEOUT_S = 60
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB = re.compile(r"hf://datasets/(?P<repo>[^/]+/[^/@]+)@(?P<revision>[^/]+)/(?P<path>.+)")
_IDENTITY = {"Accept-Encoding": "identity"}  # compressed content would have another size


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

    Raises:
        UnreachableError: all tries failed.
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
            partial = path.with_name(path.name + ".part")
            try:
                _download(file, partial, tries).rename(path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            fsync_dir(path.parent)
    return path


def _is_complete(file: SourceFile, path: Path) -> bool:
    """Whether the path holds the listed file. Another revision's file may have the same name."""
    return path.exists() and not _fault(file, path)


def _download(file: SourceFile, folder: Path, tries: int) -> Path:
    """Download and verify a file, and return its path in the folder. A wrong one is downloaded once more."""
    if _HUB.fullmatch(file.location):
        hub_endpoint()  # an invalid one is not retried
    fault = ""
    for _ in range(2):
        path = _fetch_with_retries(file, folder, tries)
        fault = _fault(file, path) or _replaced(file)
        if not fault:
            return path
    raise UserError(
        f"the download of {file.location} is not the listed file: {fault}; the server may have replaced it. "
        "Delete the listing under temp_data/listings to use the current file"
    )


def _fetch_with_retries(file: SourceFile, folder: Path, tries: int) -> Path:
    failures = 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)  # left by a failed try, or a killed process
        folder.mkdir()
        try:
            with add_filename(folder):
                return _fetch(file, folder)
        except Exception as error:  # the client's errors have no common class across its versions
            if out_of_space(error):
                raise
            # If the server does not answer, the client reports a file that is missing from its cache.
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            failures += 1
            if is_permanent(cause):
                raise UnreachableError(
                    f"cannot download {file.location}: {first_line(cause)}; if the file was moved, delete the listing "
                    "under temp_data/listings; if it is not public, log in with `hf auth login`"
                ) from None
            if failures >= tries:
                raise UnreachableError(
                    f"cannot download {file.location}: {first_line(cause)}; check the network, a proxy (HTTPS_PROXY) "
                    "and HF_ENDPOINT. Rerun the same command to continue"
                ) from None
            time.sleep(max(retry_after(cause), min(2 ** (failures - 1), 20)))


class _SilentBar(tqdm):  # preparations have a bar of their own
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"disable": True})


def _fetch(file: SourceFile, folder: Path) -> Path:
    """Download a file into a folder. Only the Hub gets the account's token."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.file_download import http_get

    if found := _HUB.fullmatch(file.location):
        return Path(
            hf_hub_download(
                found["repo"], found["path"], repo_type="dataset", revision=found["revision"], local_dir=folder,
                tqdm_class=_SilentBar,
            )
        )  # fmt: skip
    with (folder / "file").open("wb") as out:
        http_get(file.location, out, headers=_IDENTITY, tqdm_class=_SilentBar)
    return folder / "file"


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


def _fault(file: SourceFile, path: Path) -> str:
    """How a download differs from the listed file, or an empty string."""
    size = path.stat().st_size
    if file.size_bytes and size != file.size_bytes:
        return f"{size:,} bytes, expected {file.size_bytes:,}"
    if _SHA256.fullmatch(file.digest) and (found := file_sha256(path)) != file.digest:
        return f"sha256 {found[:12]}..., expected {file.digest[:12]}..."
    if file.digest.startswith("git:"):  # small files, which the Hub stores in git itself
        found = "git:" + hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest()
        return "" if found == file.digest else f"{found}, expected {file.digest}"
    return ""


def _replaced(file: SourceFile) -> str:
    """How the file at a plain URL, which has no hash, differs from the listed one by now, or an empty string."""
    if not file.digest.startswith("url:") or (found := request_head(file.location).digest) == file.digest:
        return ""
    return f"its size and ETag or date are {found.split(' ', 1)[1]}, expected {file.digest.split(' ', 1)[1]}"


def download_head(file: SourceFile, folder: Path, max_bytes: int) -> tuple[Path, int]:
    """The path and size in bytes of a file with the first `max_bytes`, with the same suffix. For samples."""
    path = folder / Path(file.name).name
    with path.open("wb") as out:
        if not file.remote:
            with open(file.location, "rb") as whole:
                out.write(whole.read(max_bytes))
            return path, out.tell()
        try:
            for chunk in _stream_head(file, max_bytes):
                out.write(chunk[: max_bytes - out.tell()])  # a server may ignore the range
                if out.tell() >= max_bytes:
                    break
        except Exception as error:  # the client's errors have no common class across its versions
            if out_of_space(error):
                raise
            raise UnreachableError(f"cannot download {file.location}: {first_line(error)}") from None
        return path, out.tell()


def _stream_head(file: SourceFile, max_bytes: int) -> Iterator[bytes]:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url, headers = file.location, _IDENTITY | {"Range": f"bytes=0-{max_bytes - 1}"}
    if found := _HUB.fullmatch(url):
        url = hf_hub_url(found["repo"], found["path"], repo_type="dataset", revision=found["revision"])
        headers = build_hf_headers() | headers
    with http_stream_backoff("GET", url, headers=headers, timeout=_TIMEOUT_S) as response:
        if response.status_code != 416:  # the file is empty
            hf_raise_for_status(response)
            yield from response.iter_raw()
