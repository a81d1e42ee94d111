"""Where text comes from. A source is a list of files; reading one file gives documents.

To add a source, write a function that returns a `Source` and enter it in SOURCES. Its files carry a digest each, which
makes up the source's fingerprint: same digests, same data set on disk.
"""

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, nearest
from .readers import READERS, read_topics, suffix_of

Reader = Callable[[Path], Iterator[str]]


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    name: str
    """Relative to the source, the same on every machine."""
    path: Path
    read: Reader
    size_bytes: int
    digest: str
    """sha256 of the content, or whatever pins it as well."""


@dataclass(frozen=True)
class Source:
    name: str
    """Fit for a folder name."""
    description: str
    files: tuple[SourceFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def find_source(spec: str) -> Source:
    """The source that a config names.

    Raises:
        UserError: unknown source, missing or empty path, unreadable file.
    """
    if spec.startswith("files:"):
        return local_files(spec.removeprefix("files:"))
    if spec in SOURCES:
        return SOURCES[spec]()
    if spec in ANNOUNCED:
        raise UserError(
            f"the source {spec!r} has to be downloaded, which this version cannot do yet; "
            "use your own files with --data.source files:PATH, or --data.source python-stdlib"
        )
    raise UserError(
        f"unknown source {spec!r}{nearest(spec, [*SOURCES, 'files:'])}; "
        f"known sources: {', '.join(SOURCES)}, files:PATH (a file, folder or glob of your own)"
    )


def local_files(where: str) -> Source:
    """One's own text: a file, every readable file below a folder, or a glob (** for any depth).

    Hidden files are left out, and links to folders are not followed.
    """
    if not where:
        raise UserError("files: needs a path, such as files:~/texts (files:. for this folder)")
    path = Path(where).expanduser()
    try:
        if path.is_file() or _leads_nowhere(path):
            found, root = [path], path.parent
        elif path.is_dir():
            found, root = _below(path), path
        else:
            found, root = _matching(path)
        files = [file for file in found if file.is_file() or _leads_nowhere(file)]
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror}; make it readable") from None
    readable = [file for file in files if suffix_of(file) in READERS]
    if not readable:
        seen = f"only {len(files)} file(s) of other kinds" if files else "nothing"
        raise UserError(
            f"no text found at {where!r}: there is {seen}; expected a file, folder or glob of {', '.join(READERS)}"
        )
    name = os.path.basename(os.path.abspath(path if path.exists() else root))
    name = "files-" + "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:40]
    return Source(name, f"local files at {where}", _describe(readable, root))


def _below(folder: Path) -> list[Path]:
    """Every file below a folder, but hidden ones."""

    def refuse(error: OSError) -> None:  # os.walk would pass over what it cannot list
        raise error

    found = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(found)


def _matching(pattern: Path) -> tuple[list[Path], Path]:
    """What a glob finds, but hidden files, and the folder before its first wildcard."""
    parts = pattern.parts
    plain = next((i for i, part in enumerate(parts) if set("*?[") & set(part)), None)
    if plain is None:
        return [], pattern
    root, rest = Path(*parts[:plain]), "/".join(parts[plain:])
    try:
        # Path.glob, unlike the module glob, goes round no loop of links. Its ** alone finds folders only.
        found = sorted(root.glob(f"{rest}/*" if parts[-1] == "**" else rest))
    except ValueError as error:
        raise UserError(f"the glob {str(pattern)!r} cannot be read: {error}") from None
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(root).parts)], root


def _leads_nowhere(path: Path) -> bool:
    """A broken link, which must not pass for a file that was never there."""
    return path.is_symlink() and not path.exists()


def python_stdlib() -> Source:
    """The source and reference text that ship with the running Python: about 10 MB, on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    # Tests and tables are most of the library's bytes and read like no other text; site-packages is not the library.
    left_out = {
        "test", "tests", "idle_test", "encodings", "lib2to3", "pydoc_data", "ensurepip", "site-packages",
        "dist-packages", "__pycache__",
    }  # fmt: skip
    found = [file for file in sorted(root.rglob("*.py")) if not left_out & set(file.relative_to(root).parts[:-1])]
    if len(found) < 50:
        raise UserError(
            f"this Python keeps no readable standard library at {root}: found {len(found)} .py files; "
            "use your own files with --data.source files:PATH"
        )
    topics = root / "pydoc_data" / "topics.py"
    files = _describe(found, root)
    if topics.is_file():
        files += _describe([topics], root, read_topics)
    return Source("python-stdlib", f"the standard library of Python at {root}", files)


SOURCES: dict[str, Callable[[], Source]] = {"python-stdlib": python_stdlib}
# Named by presets; they need the Hub.
ANNOUNCED = ("fineweb-edu-10bt", "fineweb-10bt", "dolma-sample", "c4", "bookcorpus", "tinystories", "wikitext-103")


def _describe(files: list[Path], root: Path, read: Reader | None = None) -> tuple[SourceFile, ...]:
    """Files with size and digest; hashed in threads, since hashlib lets go of the lock."""
    with ThreadPoolExecutor() as pool:
        return tuple(pool.map(lambda file: _describe_one(file, root, read or READERS[suffix_of(file)]), files))


def _describe_one(path: Path, root: Path, read: Reader) -> SourceFile:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return SourceFile(path.relative_to(root).as_posix(), path.absolute(), read, path.stat().st_size, digest)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; make it readable, or leave it out of the source"
        ) from None
