"""Which files a remote source has.

Listings are cached under temp_data/listings. The first one pins the source: later starts send no request and work
offline.
"""

import fnmatch
import hashlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from myllm import paths
from myllm.errors import UserError
from myllm.files import file_lock, read_json, write_json

T = TypeVar("T")
COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUTS_S = (5, 15, 15, 15)
"""To connect, to read, to write, and to get a connection from the pool."""


class UnreachableError(UserError):
    """A server did not answer, or answered with an error."""


class MissingOnHubError(UserError):
    """The Hub answers, but has no such repository, revision or file."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as its server lists it."""

    name: str
    url: str
    size_bytes: int
    digest: str


def list_hub(repo: str, revision: str | None, pattern: str) -> list[RemoteFile]:
    """The files of a dataset repository that match a glob ("*" also matches "/"; empty: all files).

    Raises:
        UserError: no such repository, revision or folder, or no match.
        UnreachableError: the Hub does not answer.
    """
    return _cached(f"hub {repo} {revision or 'main'} {pattern}", lambda: request_listing(repo, revision, pattern))


def request_listing(repo: str, revision: str | None, pattern: str) -> list[RemoteFile]:
    pattern = pattern.lstrip("/")
    with clear_hub_errors(repo, revision):
        commit = find_commit(repo, revision)
        # Only the folder that the glob begins with: a repository may have 100,000 files.
        plain = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
        folder = plain.rpartition("/")[0] if plain != pattern or Path(pattern).suffix else pattern.rstrip("/")
        pages = _hub_pages(f"{repo}/tree/{commit}/{quote(folder, safe='')}".rstrip("/"), recursive=True)
        files = [entry for page in pages for entry in page if entry["type"] == "file"]
    matching = sorted((file for file in files if _matches(file["path"], pattern)), key=lambda file: file["path"])
    if not matching:
        raise UserError(
            f"{repo} has {len(files)} files under {folder or '/'}, but none matches {pattern!r}; see "
            f"{hub_endpoint()}/datasets/{repo}/tree/{commit}"
        )
    return [
        RemoteFile(
            file["path"],
            f"hf://datasets/{repo}@{commit}/{file['path']}",
            file["size"],
            file["lfs"]["oid"] if file.get("lfs") else f"git:{file['oid']}",
        )
        for file in matching
    ]


def find_commit(repo: str, revision: str | None, always_ask: bool = False) -> str:
    """The hash of the commit that a branch or tag of a dataset repository means now. Errors are the Hub client's.

    Args:
        always_ask: also for a hash, which never changes: to know whether the Hub answers.
    """
    hub_endpoint()
    if revision and COMMIT.fullmatch(revision) and not always_ask:
        return revision
    return str(next(_hub_pages(f"{repo}/revision/{quote(revision or 'main', safe='')}"))["sha"])


def _hub_pages(route: str, **parameters: bool) -> Iterator[Any]:
    """The Hub's answer about a dataset, page by page.

    Without HfApi: its listings have no timeout, so a silent server would block them forever, and it does not retry its
    other requests.
    """
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id("/".join(route.split("/")[:2]))
    url = page_url = f"{hub_endpoint()}/api/datasets/{route}"
    params: dict[str, bool] | None = parameters
    while page_url:
        response = _get(page_url, params=params)
        yield response.json()
        # Only the query of the next link: a mirror may return the Hub's own address, which must not get this token.
        query = urlsplit(response.links.get("next", {}).get("url", "")).query
        page_url, params = f"{url}?{query}" if query else "", None


def _get(url: str, params: dict[str, bool] | None = None) -> Any:
    """The response to a GET with this account's token, after up to three retries."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    response = http_backoff(
        "GET", url, params=params, headers=build_hf_headers(), timeout=_TIMEOUTS_S, max_retries=3, follow_redirects=True
    )
    hf_raise_for_status(response)
    return response


def hub_endpoint() -> str:
    """The address of the Hub or its mirror.

    Raises:
        UserError: HF_ENDPOINT is not an address. The client would retry it for a minute.
    """
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"HF_ENDPOINT is {constants.ENDPOINT!r}, expected a complete address such as https://huggingface.co; unset "
            "it to use the Hub itself"
        )
    return constants.ENDPOINT


def _matches(path: str, pattern: str) -> bool:
    return not pattern or fnmatch.fnmatchcase(path, pattern) or path.startswith(pattern.rstrip("/") + "/")


def list_urls(repo: str, file: str) -> list[RemoteFile]:
    """The URLs in a file of a dataset repository, one per line, with the size and version that their server reports.

    Raises:
        UnreachableError: the Hub, or the server of the files, does not answer.
    """
    return _cached(f"urls {repo} {file}", lambda: _request_urls(repo, file))


def _request_urls(repo: str, file: str) -> list[RemoteFile]:
    from huggingface_hub import hf_hub_url

    hub_endpoint()
    with clear_hub_errors(repo):
        text = _get(hf_hub_url(repo, file, repo_type="dataset")).content.decode()
    urls = list(dict.fromkeys(line.strip() for line in text.splitlines() if "://" in line))
    if not urls:
        raise UserError(f"{file} of {repo} lists no URLs")
    request_head(urls[0], max_retries=2)  # fails early if the server is down
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(request_head, urls))


def request_head(url: str, max_retries: int = 5) -> RemoteFile:
    """A plain URL's file, as its server describes it."""
    from huggingface_hub.utils import http_backoff

    headers = {"Accept-Encoding": "identity"}  # compressed content would have another size
    try:
        response = http_backoff(
            "HEAD", url, headers=headers, timeout=_TIMEOUTS_S, max_retries=max_retries, follow_redirects=True
        )
        response.raise_for_status()
    except Exception as error:  # the client's errors have no common class across its versions
        raise UnreachableError(
            f"{urlsplit(url).hostname or url} does not answer for {url}: {first_line(error)}; check the network and a "
            "proxy (HTTPS_PROXY)"
        ) from None
    size = int(response.headers.get("content-length") or 0)
    version = response.headers.get("etag") or response.headers.get("last-modified") or ""
    return RemoteFile(urlsplit(url).path.lstrip("/"), url, size, f"url:{url} {size} {version}")


@contextmanager
def clear_hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn the errors of the Hub's client into one message with a remedy."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"{repo!r} is not a valid dataset name: {first_line(error)}") from None
    except errors.RepositoryNotFoundError:
        raise no_access_error(repo) from None
    except errors.RevisionNotFoundError:
        raise MissingOnHubError(f"the dataset {repo} has no revision {revision!r}; omit it for the newest") from None
    except errors.RemoteEntryNotFoundError as error:
        raise MissingOnHubError(
            f"the dataset {repo} has no such file or folder: {urlsplit(str(error.response.url)).path}; see "
            f"{constants.ENDPOINT}/datasets/{repo}/tree/main"
        ) from None
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # the client's errors have no common class across its versions
        raise UnreachableError(
            f"the Hub at {constants.ENDPOINT} does not answer for {repo}: {first_line(error)}; check the network, a "
            "proxy (HTTPS_PROXY), HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from None


def no_access_error(repo: str) -> MissingOnHubError:
    """The Hub does not tell a missing repository from one that this account may not read."""
    from huggingface_hub import constants

    return MissingOnHubError(
        f"the Hub has no dataset {repo!r} that this account may read; check the name, accept the dataset's terms at "
        f"{constants.ENDPOINT}/datasets/{repo} if it has any, and log in with `hf auth login`"
    )


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def suggest_fallback(error: UserError, corpus: str) -> UserError:
    """The same error as an UnreachableError, for Dolma with the next best source.

    A known corpus that is missing has been moved or closed: its name cannot be mistyped.
    """
    if not isinstance(error, UnreachableError | MissingOnHubError):
        return error
    advice = "use c4 as the source, or --fallback c4 (--data.fallback c4 for pretrain.py) to switch to it automatically"
    is_dolma = corpus.startswith("dolma")
    return UnreachableError(
        f"Dolma cannot be reached: {error}. C4 is the next best: {advice}" if is_dolma else str(error)
    )


# -- the cache --------------------------------------------------------------------------------------------------------


def _cached(query: str, request: Callable[[], list[RemoteFile]]) -> list[RemoteFile]:
    """The listing from disk, or from one request."""
    return cached(query, lambda: {"files": [asdict(file) for file in request()]}, files_of)


def files_of(listing: dict[str, Any]) -> list[RemoteFile]:
    return [RemoteFile(**file) for file in listing["files"]]


def cached(query: str, request: Callable[[], dict[str, Any]], parse: Callable[[dict[str, Any]], T]) -> T:
    """The parsed answer to a query, from disk or from one request.

    If several processes need it, one sends the request.
    """
    path = listing_path(query)
    if (found := _read_listing(path, parse)) is not None:
        return found
    try:
        with listing_lock(path):
            if (found := _read_listing(path, parse)) is None:
                answer = request()
                write_json(path, {"question": query, **answer})
                found = parse(answer)
            return found
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space there, or set MYLLM_DATA") from None


def listing_path(query: str) -> Path:
    """The cache file of a query. The hash tells queries apart whose readable part is the same."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", query).strip("-")[:100]
    digest = hashlib.sha256(query.encode(errors="surrogateescape")).hexdigest()
    return paths.listings_dir() / f"{name}-{digest[:8]}.json"


@contextmanager
def listing_lock(path: Path) -> Iterator[None]:
    """Hold the lock for writing a cache file, after waiting for another process that holds it."""
    for folder in (path.parent, paths.locks_dir()):
        folder.mkdir(parents=True, exist_ok=True)
    with file_lock(paths.locks_dir() / f"{path.name}.lock"):
        yield


def _read_listing(path: Path, parse: Callable[[dict[str, Any]], T]) -> T | None:
    try:
        return parse(read_json(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it readable, or set MYLLM_DATA") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the listing {path} is damaged ({error}); delete it to request it again") from None
