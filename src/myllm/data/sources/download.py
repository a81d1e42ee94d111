"""Downloads: one file at a time, resumed where it stopped, checked before it gets its name.

`hf_hub_download` starts a file anew after a kill, since its temporary files have names of their own; with files of two
gigabytes that is what a user would notice, so the bytes are fetched here, with the client's own headers and retries.
"""

import hashlib
import re
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from myllm.errors import UserError
from myllm.files import add_filename, file_lock, file_sha256, fsync_dir, out_of_space

from .hub_listing import UnreachableError, first_line, hub_endpoint
from .source import SourceFile

CHUNK_BYTES = 1 << 20
TRIES = 8
"""A little over a minute where nothing answers."""
_TIMEOUT_S = 60
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB = re.compile(r"hf://datasets/(?P<repo>[^/]+/[^/@]+)@(?P<revision>[^/]+)/(?P<path>.+)")


def local_path(file: SourceFile, downloads: Path) -> Path:
    """Where a file is, or will be once it is fetched."""
    if not file.remote:
        return Path(file.where)
    # Its suffix stays: readers go by it. Odd letters become what any file system takes.
    name = quote(file.name, safe="/-_.")
    parts = name.split("/")
    if len(name) > 1_000 or max(map(len, parts)) > 200 or ".." in parts:
        name = f"{hashlib.sha256(file.name.encode()).hexdigest()[:16]}-{name[-100:].replace('/', '-')}"
    return downloads / name


def download_file(file: SourceFile, downloads: Path, kept: Path | None = None, tries: int = TRIES) -> Path:
    """The file on this disk; downloaded if it is not there yet.

    Args:
        kept: a folder where it is looked for first, and in which nothing is changed.
        tries: in a row without a single new byte.

    Raises:
        Unreachable: the server gives no new byte in several tries.
        UserError: what it gives is not what the listing promised.
    """
    path = local_path(file, downloads)
    if not file.remote:
        return path
    if kept is not None and _is_whole(file, local_path(file, kept)):
        return local_path(file, kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Preparations with other settings may share the folder of kept downloads; and a killed one's process may live on
    # for a moment.
    with file_lock(path.with_name(f".{path.name[-200:]}.lock")):
        if not _is_whole(file, path):
            _fetch_whole(file, path, tries)
    return path


def _is_whole(file: SourceFile, path: Path) -> bool:
    """Whether the file is there, and is the one that was listed: another revision's may have the same name."""
    return path.exists() and not _fault(file, path)


def _fetch_whole(file: SourceFile, path: Path, tries: int) -> None:
    partial = path.with_name(path.name + ".part")
    for last in (False, True):
        try:
            _download(file, partial, tries)
            fault = _fault(file, partial)
        except _Replaced as error:
            fault = str(error)
        if not fault:
            break
        partial.unlink(missing_ok=True)
        if last:
            raise UserError(
                f"the download of {file.where} is not what was listed: {fault}; it may have been replaced there. "
                "Delete the listing under temp_data/listings to take what is there now"
            )
    partial.rename(path)
    fsync_dir(path.parent)


class _Replaced(Exception):
    """The server has another file under this address than the one that was listed."""


def _download(file: SourceFile, partial: Path, tries: int) -> None:
    """Append to `partial` until the server has no more.

    Raises:
        _Replaced: what there is of it may not fit what the server has now.
    """
    if _HUB.fullmatch(file.where):
        hub_endpoint()  # one that cannot be is not tried
    vain = 0
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            _continue(file, partial, before)
            return
        except _Replaced:
            raise
        except Exception as error:  # the client's errors have no common class over its versions
            if out_of_space(error):
                raise
            gained = partial.exists() and partial.stat().st_size > before
            vain = 0 if gained else vain + 1
            if is_permanent(error):
                raise UnreachableError(
                    f"cannot download {file.where}: {first_line(error)}; if it was moved, delete the listing under "
                    "temp_data/listings, and if it is not open to all, log in with `hf auth login`"
                ) from None
            if vain >= tries:
                raise UnreachableError(
                    f"cannot download {file.where}: {first_line(error)}; check the network, a proxy (HTTPS_PROXY) and "
                    "HF_ENDPOINT. What there is of it is kept, and the same command goes on from there"
                ) from None
            time.sleep(max(retry_after(error), min(2 ** max(vain - 1, 0), 20)))


def retry_after(error: Exception) -> int:
    """Seconds that the server wants to be left alone for; not more than it may want in earnest."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = getattr(getattr(error, "response", None), "headers", {})
    after = headers.get("retry-after", "")
    if after.isdecimal():
        return min(int(after), 300)
    # The Hub counts requests in windows of five minutes, and says in a header of its own when the next one begins.
    window = parse_ratelimit_headers(headers) if headers else None
    return min(window.reset_in_seconds + 1, 301) if window and not window.remaining else 0


def is_permanent(error: Exception) -> bool:
    """Whether asking again is no use: not found, not allowed."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", 0)
    return isinstance(error, OfflineModeIsEnabled) or (400 <= status < 500 and status not in (408, 429))


def _continue(file: SourceFile, partial: Path, have: int) -> None:
    from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

    if file.size_bytes and have >= file.size_bytes:
        if have > file.size_bytes:
            partial.unlink()  # of another file; starts anew
            have = 0
        else:
            return
    url, headers = _request(file)
    if have:
        headers["Range"] = f"bytes={have}-"
    # Without retries of its own: of a body cut short in the middle it would ask for the same range again.
    with http_stream_backoff(
        "GET", url, headers=headers, timeout=_TIMEOUT_S, max_retries=0, follow_redirects=True
    ) as response:
        if response.status_code == 416:  # nothing lies behind what is there
            return
        hf_raise_for_status(response)
        _check_same(file, response.headers)
        with add_filename(partial), partial.open("ab") as out:
            if response.status_code != 206:  # the whole file, whatever was asked for
                out.truncate(0)
            for chunk in response.iter_raw():  # as it comes: a chunk that is waited for is lost with the connection
                out.write(chunk)


def _check_same(file: SourceFile, headers: Mapping[str, str]) -> None:
    """Compare what a plain URL's server says of its file with what it said when the file was listed.

    The Hub's files are known by a hash of their content; of these, there is nothing else to tell another file by.
    """
    known = f"url:{file.where} {file.size_bytes} "
    said = file.digest.removeprefix(known) if file.digest.startswith(known) else ""
    found = headers.get("etag") or headers.get("last-modified") or ""
    if said and found and said.removeprefix("W/") != found.removeprefix("W/"):
        raise _Replaced(f"its ETag or date is {found}, expected {said}")


def _request(file: SourceFile) -> tuple[str, dict[str, str]]:
    """URL and headers. The account's token goes to the Hub alone."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    headers = {"Accept-Encoding": "identity"}
    found = _HUB.fullmatch(file.where)
    if not found:
        return file.where, headers
    url = hf_hub_url(found["repo"], found["path"], repo_type="dataset", revision=found["revision"])
    return url, build_hf_headers() | headers


def _fault(file: SourceFile, partial: Path) -> str:
    """How a download differs from what was listed, or an empty string."""
    size = partial.stat().st_size if partial.exists() else 0
    if file.size_bytes and size != file.size_bytes:
        return f"{size:,} bytes, expected {file.size_bytes:,}"
    if _SHA256.fullmatch(file.digest) and (found := file_sha256(partial)) != file.digest:
        return f"sha256 {found[:12]}..., expected {file.digest[:12]}..."
    if file.digest.startswith("git:"):  # small files, which the Hub keeps in git itself
        found = "git:" + hashlib.sha1(b"blob %d\0" % size + partial.read_bytes()).hexdigest()
        return "" if found == file.digest else f"{found}, expected {file.digest}"
    return ""


def download_head(file: SourceFile, folder: Path, most_bytes: int) -> tuple[Path, int]:
    """The beginning of a file, under its own suffix, and how many bytes that is. For samples."""
    from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

    path = folder / Path(file.name).name
    with path.open("wb") as out:
        if not file.remote:
            with open(file.where, "rb") as whole:
                out.write(whole.read(most_bytes))
            return path, path.stat().st_size
        url, headers = _request(file)
        headers["Range"] = f"bytes=0-{most_bytes - 1}"
        try:
            with http_stream_backoff("GET", url, headers=headers, timeout=_TIMEOUT_S, follow_redirects=True) as answer:
                hf_raise_for_status(answer)
                for chunk in answer.iter_raw(CHUNK_BYTES):
                    out.write(chunk[: most_bytes - out.tell()])
                    if out.tell() >= most_bytes:
                        break
        except Exception as error:  # the client's errors have no common class over its versions
            if out_of_space(error):
                raise
            raise UnreachableError(f"cannot download {file.where}: {first_line(error)}") from None
    return path, path.stat().st_size
