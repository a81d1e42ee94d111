"""Which files a remote source has.

A listing is kept under temp_data/listings: the first one pins the source, so a later start asks nobody, and works
without a network.
"""

import fnmatch
import hashlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from myllm import paths
from myllm.errors import UserError
from myllm.files import file_lock, read_json, write_json

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUTS_S = (5, 15, 15, 15)
"""To connect, to read, to write, and to wait for a free connection."""


class UnreachableError(UserError):
    """A server did not answer, or not as it should."""


class Missing(UserError):
    """The Hub answers, but has no such repository, revision or file."""


@dataclass(frozen=True)
class RemoteFile:
    name: str
    url: str
    size_bytes: int
    digest: str


def list_hub(repo: str, revision: str | None, pattern: str) -> list[RemoteFile]:
    """The files of a dataset repository that match a glob ("*" crosses folders; empty: all).

    Raises:
        UserError: no such repository, revision or folder, or nothing matches.
        Unreachable: the Hub does not answer.
    """
    return _kept(f"hub {repo} {revision or 'main'} {pattern}", lambda: list(_ask_hub(repo, revision, pattern)))


def _ask_hub(repo: str, revision: str | None, pattern: str) -> Iterator[RemoteFile]:
    pattern = pattern.lstrip("/")
    with _clear_hub_errors(repo, revision):
        # A commit's own hash is the same for ever and saves a question.
        commit = revision if revision and _COMMIT.fullmatch(revision) else None
        commit = commit or next(_hub_pages(f"{repo}/revision/{quote(revision or 'main', safe='')}"))["sha"]
        # Listing the folder that the glob begins with, not the whole repository, which may have 100,000 files.
        plain = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
        folder = plain.rpartition("/")[0] if plain != pattern or Path(pattern).suffix else pattern.rstrip("/")
        pages = _hub_pages(f"{repo}/tree/{commit}/{quote(folder, safe='')}".rstrip("/"), recursive=True)
        files = [each for page in pages for each in page if each["type"] == "file"]
    wanted = [each for each in files if _matches(each["path"], pattern)]
    if not wanted:
        raise UserError(
            f"{repo} has {len(files)} files under {folder or '/'}, but none match {pattern!r}; see "
            f"{hub_endpoint()}/datasets/{repo}/tree/{commit} for what there is"
        )
    for each in sorted(wanted, key=lambda file: file["path"]):
        digest = each["lfs"]["oid"] if each.get("lfs") else f"git:{each['oid']}"
        yield RemoteFile(each["path"], f"hf://datasets/{repo}@{commit}/{each['path']}", each["size"], digest)


def _hub_pages(question: str, **parameters: bool) -> Iterator[Any]:
    """The Hub's answer on a dataset, page by page.

    Not by HfApi: its listings have no time limit, so that a silent server would hold them for ever, and its other
    questions are asked only once.
    """
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id("/".join(question.split("/")[:2]))
    url = address = f"{hub_endpoint()}/api/datasets/{question}"
    params: dict[str, bool] | None = parameters
    while address:
        answer = _ask_server(address, params=params)
        yield answer.json()
        # A mirror may pass on the Hub's own address, where this account's token has no business.
        following = urlsplit(answer.links.get("next", {}).get("url", "")).query
        address, params = f"{url}?{following}" if following else "", None


def _ask_server(url: str, params: dict[str, bool] | None = None) -> Any:
    """The Hub's answer to a GET, with this account's token, after as many tries as a busy server may want."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    answer = http_backoff(
        "GET", url, params=params, headers=build_hf_headers(), timeout=_TIMEOUTS_S, max_retries=3, follow_redirects=True
    )
    hf_raise_for_status(answer)
    return answer


def hub_endpoint() -> str:
    """The Hub's address, or its mirror's.

    Raises:
        UserError: what HF_ENDPOINT says is none; the client would try it for a minute.
    """
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"HF_ENDPOINT is {constants.ENDPOINT!r}, expected a whole address, such as https://huggingface.co; unset "
            "it for the Hub itself"
        )
    return constants.ENDPOINT


def _matches(path: str, pattern: str) -> bool:
    return not pattern or fnmatch.fnmatchcase(path, pattern) or path.startswith(pattern.rstrip("/") + "/")


def list_urls(repo: str, file: str) -> list[RemoteFile]:
    """The URLs in a file of a dataset repository, one a line, with what their server says of each.

    Raises:
        Unreachable: the Hub, or the server of the files, does not answer.
    """
    return _kept(f"urls {repo} {file}", lambda: _ask_urls(repo, file))


def _ask_urls(repo: str, file: str) -> list[RemoteFile]:
    from huggingface_hub import hf_hub_url

    hub_endpoint()
    with _clear_hub_errors(repo):
        text = _ask_server(hf_hub_url(repo, file, repo_type="dataset")).content.decode()
    urls = list(dict.fromkeys(line.strip() for line in text.splitlines() if "://" in line))
    if not urls:
        raise UserError(f"{file} of {repo} lists no URLs")
    _ask_url(urls[0], max_retries=2)  # where nobody answers, one question is enough
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(_ask_url, urls))


def _ask_url(url: str, max_retries: int = 5) -> RemoteFile:
    from huggingface_hub.utils import http_backoff

    host = urlsplit(url).hostname or url
    headers = {"Accept-Encoding": "identity"}  # else the size may be another
    try:
        response = http_backoff(
            "HEAD", url, headers=headers, timeout=_TIMEOUTS_S, max_retries=max_retries, follow_redirects=True
        )
        response.raise_for_status()
    except Exception as error:  # the client's errors have no common class over its versions
        raise UnreachableError(
            f"{host} does not answer for {url}: {first_line(error)}; check the network and a proxy (HTTPS_PROXY)"
        ) from None
    size = int(response.headers.get("content-length") or 0)
    pin = response.headers.get("etag") or response.headers.get("last-modified") or ""
    return RemoteFile(urlsplit(url).path.lstrip("/"), url, size, f"url:{url} {size} {pin}")


@contextmanager
def _clear_hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """What the Hub's client raises, as one message with what to do."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a dataset: {first_line(error)}") from None
    except errors.RepositoryNotFoundError:
        raise Missing(
            f"the Hub has no dataset {repo!r}, or none that this account may read; check the name, accept the "
            f"dataset's terms on {constants.ENDPOINT}/datasets/{repo} if it has any, and log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise Missing(f"the dataset {repo} has no revision {revision!r}; leave it out for the newest") from None
    except errors.RemoteEntryNotFoundError as error:
        raise Missing(
            f"the dataset {repo} has no such file or folder: {urlsplit(str(error.response.url)).path}; see "
            f"{constants.ENDPOINT}/datasets/{repo}/tree/main for what there is"
        ) from None
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # the client's errors have no common class over its versions
        raise UnreachableError(
            f"the Hub at {constants.ENDPOINT} does not answer for {repo}: {first_line(error)}; check the network, a "
            "proxy (HTTPS_PROXY), HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from None


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def suggest_fallback(error: UserError, corpus: str) -> UserError:
    """The same error, with the next best source where there is one.

    A corpus that is known by name has no typing errors in it: one that is missing has been moved or closed.
    """
    if not isinstance(error, UnreachableError | Missing):
        return error
    if not corpus.startswith("dolma"):
        return UnreachableError(str(error))
    return UnreachableError(
        f"Dolma cannot be reached: {error}. C4 is the next best: give c4 as the source, or --fallback c4 "
        "(--data.fallback c4 for pretrain.py) to take it without asking"
    )


def _kept(question: str, ask: Callable[[], list[RemoteFile]]) -> list[RemoteFile]:
    """The answer of the first time, from disk. One process asks; others that want to know wait for its answer."""
    path = listing_path(question)
    if (files := _read_kept(path)) is not None:
        return files
    with ExitStack() as stack:
        with _clear_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(listing_lock(path))
        if (files := _read_kept(path)) is None:
            files = ask()
            with _clear_write_errors(path):
                write_json(path, {"question": question, "files": [asdict(file) for file in files]})
    return files


def listing_path(question: str) -> Path:
    """Where the answer to a question about a source is kept."""
    # Questions that differ in a sign only have names of their own by the hash.
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", question).strip("-")[:100]
    digest = hashlib.sha256(question.encode(errors="surrogateescape")).hexdigest()
    return paths.listings_dir() / f"{name}-{digest[:8]}.json"


@contextmanager
def listing_lock(path: Path) -> Iterator[None]:
    """Be the only process that makes the answer of this path; another one's is waited for."""
    paths.locks_dir().mkdir(parents=True, exist_ok=True)
    with file_lock(paths.locks_dir() / f"{path.name}.lock"):
        yield


def _read_kept(path: Path) -> list[RemoteFile] | None:
    try:
        return [RemoteFile(**file) for file in read_json(path)["files"]]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it readable, or set MYLLM_DATA") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the listing {path} is damaged ({error}); delete it, and it is asked for again") from None


@contextmanager
def _clear_write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room there, or set MYLLM_DATA") from None
