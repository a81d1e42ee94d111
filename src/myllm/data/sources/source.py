"""Where text comes from. A source is a list of files, each with a digest; reading one gives documents.

The digests make up the source's fingerprint: same digests, same data set on disk. What is known of public corpora is in
catalog.py, how their files are found in listing.py, how they are downloaded in fetch.py.
"""

import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from myllm import paths
from myllm.errors import UserError, did_you_mean
from myllm.paths import user_path

from .catalog import CORPORA, Corpus
from .documents import group_rows
from .file_digests import file_digests, size_of
from .hub_listing import RemoteFile, list_hub, list_urls, listing_path, suggest_fallback
from .read_task import ReadTask, SkipLog
from .readers import READER_BY_SUFFIX, read_file, suffix_of

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?(:.+)?", re.ASCII)
SHOWN_SUFFIXES = 6


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    name: str
    """Relative to the source, the same on every machine."""
    where: str
    """An absolute path, or a URL: https://..., or hf://datasets/NAMESPACE/NAME@REVISION/PATH."""
    reader: str
    """Key of readers.READERS."""
    size_bytes: int
    """As stored, compressed or not; 0 where a server does not say."""
    digest: str
    """sha256 of the content, or whatever pins it as well."""

    @property
    def remote(self) -> bool:
        return "://" in self.where


@dataclass(frozen=True)
class Source:
    name: str
    """Fit for a folder name."""
    description: str
    files: tuple[SourceFile, ...]
    column: str = "text"
    group: str = "rows"
    """What makes a document of rows: see documents.group_rows."""
    ignored: tuple[str, ...] = ()
    """Suffixes of local files that no reader takes, one a file."""

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def ignored_note(self) -> str:
        """For people: which local files are left out, by suffix; empty if none is."""
        if not self.ignored:
            return ""
        kinds = " ".join(READER_BY_SUFFIX)
        return f"left out: {count_suffixes(self.ignored)}; {len(self.files):,} file(s) are read, of the kinds {kinds}"


def find_source(spec: str, column: str | None = None, hashed: bool = True) -> Source:
    """The source that a config names.

    Args:
        column: overrides the source's own text column.
        hashed: with digests; files of one's own are read for theirs, which takes a while where there is much text.

    Raises:
        UserError: unknown source, missing or empty path, unreadable file.
        Unreachable: a listing that has to be downloaded could not be.
    """
    kind, _, rest = spec.partition(":")
    if kind == "files" and ":" in spec:
        source = local_files(rest, hashed)
    elif kind == "hub" and rest:
        source = hub_files(rest)
    elif spec == "python-stdlib":
        source = python_stdlib(hashed)
    elif kind in CORPORA:
        source = known_corpus(CORPORA[kind], rest)
    else:
        known = ["python-stdlib", *CORPORA]
        meant = _meant(spec) or did_you_mean(spec, [*known, "files:", "hub:"])
        raise UserError(
            f"unknown source {spec!r}{meant}; known sources: {', '.join(known)}, "
            "hub:NAMESPACE/NAME[:GLOB] (any repository of parquet or jsonl), files:PATH (a file, folder or glob of "
            "your own)"
        )
    return replace(source, column=column) if column else source


def check_source(spec: str) -> None:
    """Refuse a source that cannot be, without reading a text or asking a server.

    Raises:
        UserError: as `find_source`.
    """
    kind, colon, rest = spec.partition(":")
    if kind == "files" and colon:
        local_files(rest, hashed=False)
    elif spec != "python-stdlib" and kind not in CORPORA and not (kind == "hub" and rest):
        find_source(spec)


def _meant(spec: str) -> str:
    """What somebody wanted who left out the kind of source, if that can be told."""
    try:
        here = bool(spec) and (user_path(spec).exists() or bool(_matching(user_path(spec))[0]))
    except (OSError, RuntimeError, ValueError, UserError):
        here = False
    if here or spec.startswith(("/", "./", "../", "~")):
        return f", did you mean 'files:{spec}'?" + ("" if here else " (there is nothing at that path)")
    if _REPOSITORY.fullmatch(spec):
        return f", did you mean 'hub:{spec}', of the Hub, or 'files:{spec}' (there is nothing at that path)?"
    return ""


def read_documents(
    source: Source, file: SourceFile, path: Path, faults: SkipLog, part: int = 0, parts: int = 1
) -> Iterator[str]:
    """The documents of one file, or of one part of it, at `path`."""
    task = ReadTask(path, file.name, source.column, part, parts)
    return group_rows(read_file(file.reader, task, faults), source.group)


# -- public corpora ---------------------------------------------------------------------------------------------------


def known_corpus(corpus: Corpus, variant: str) -> Source:
    """A corpus of the catalogue; `variant` chooses among its lists of files, where it has several."""
    if variant and not corpus.variants:
        raise UserError(f"the source {corpus.name} has no variants, found {variant!r}; give {corpus.name} alone")
    if variant and variant not in corpus.variants:
        raise UserError(
            f"{corpus.name} has no list {variant!r}{did_you_mean(variant, list(corpus.variants))}; "
            f"it has {', '.join(corpus.variants)}"
        )
    try:
        if corpus.url_list:
            found = list_urls(corpus.repo, corpus.url_list.format(variant or corpus.variants[0]))
        else:
            found = list_hub(corpus.repo, corpus.revision, corpus.pattern)
    except UserError as error:
        raise suggest_fallback(error, corpus.name) from None
    name = f"{corpus.name}-{variant}" if variant else corpus.name
    return Source(name, corpus.about, _remote_files(found, name), corpus.column, corpus.group)


def hub_files(spec: str) -> Source:
    """Any dataset repository of the Hub: NAMESPACE/NAME[@REVISION][:GLOB].

    Without a glob, files of rows are taken; where there are none, plain text.
    """
    where, _, pattern = spec.partition(":")
    repo, _, revision = where.partition("@")
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UserError(f"hub:{spec}: expected hub:NAMESPACE/NAME, such as hub:roneneldan/TinyStories:data/train-*")
    found = list_hub(repo, revision or None, pattern)
    if not pattern:  # a repository's card and scripts speak of its texts, and are none of them
        rows = [file for file in found if READER_BY_SUFFIX.get(suffix_of(file.name)) in ("jsonl", "parquet", "arrow")]
        found = rows or [file for file in found if file.name != "README.md"]
    name = "hub-" + folder_name(repo.replace("/", "-") + (f"-{pattern}" if pattern else ""))
    return Source(name, f"the dataset {repo} of the Hub", _remote_files(found, f"hub:{spec}"))


def _remote_files(found: list[RemoteFile], name: str) -> tuple[SourceFile, ...]:
    readable = [file for file in found if suffix_of(file.name) in READER_BY_SUFFIX]
    if not readable:
        seen = ", ".join(sorted({suffix_of(file.name) or "(none)" for file in found})[:8])
        raise UserError(
            f"{name} has no readable files: found {len(found)} of kind {seen or 'none'}; expected "
            f"{', '.join(READER_BY_SUFFIX)}. A glob behind the name chooses files: hub:NAMESPACE/NAME:GLOB"
        )
    return tuple(
        SourceFile(file.name, file.url, READER_BY_SUFFIX[suffix_of(file.name)], file.size_bytes, file.digest)
        for file in readable
    )


def folder_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in text)[:40]


# -- files of one's own -----------------------------------------------------------------------------------------------


def local_files(where: str, hashed: bool = True) -> Source:
    """One's own text: a file, every readable file below a folder, or a glob (** for any depth).

    Hidden files are left out, and what this program itself writes below the folder. Links to folders are not followed.
    """
    if not where:
        raise UserError("files: needs a path, such as files:~/texts (files:. for this folder)")
    path = user_path(where)
    try:
        if path.is_file() or _leads_nowhere(path):
            found, root = [path], path.parent
        elif path.is_dir():
            found, root = _below(path), path
        else:
            found, root = _matching(path)
        files = [file for file in _without_own(found, root) if file.is_file() or _leads_nowhere(file)]
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror}; make it readable") from None
    readable = [file for file in files if suffix_of(file) in READER_BY_SUFFIX]
    if not readable:
        kinds = count_suffixes(suffix_of(file) for file in files)
        seen = f"only {len(files):,} file(s) of other kinds ({kinds})" if files else "nothing"
        raise UserError(f"no text found at {where!r}: there is {seen}; expected one of {', '.join(READER_BY_SUFFIX)}")
    name = os.path.basename(os.path.abspath(path if path.exists() else root))
    ignored = tuple(suffix_of(file) for file in files if suffix_of(file) not in READER_BY_SUFFIX)
    described = _describe(readable, root, f"files {os.path.abspath(path)}" if hashed else None)
    return Source("files-" + folder_name(name), f"local files at {where}", described, ignored=ignored)


def count_suffixes(suffixes: Iterable[str]) -> str:
    """Such as "289 .html, 3 .pdf", the most frequent first."""
    counts = sorted(Counter(suffixes).items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count:,} {suffix or 'without suffix'}" for suffix, count in counts[:SHOWN_SUFFIXES]]
    rest = sum(count for _, count in counts[SHOWN_SUFFIXES:])
    return ", ".join(shown + ([f"{rest:,} of other kinds"] if rest else []))


def _without_own(files: list[Path], root: Path) -> list[Path]:
    """The files, but for runs, data sets and what else this program writes below the root."""
    if not files:
        return files
    folders = (
        paths.datasets_dir(),
        paths.listings_dir(),
        paths.downloads_dir(),
        paths.tokenizers_dir(),
        paths.runs_dir(),
    )
    base = root.absolute().resolve()
    own = [folder for each in folders if (folder := each.resolve()) != base and folder.is_relative_to(base)]
    if not own:
        return files
    return [file for file in files if not any(file.absolute().resolve().is_relative_to(folder) for folder in own)]


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


def python_stdlib(hashed: bool = True) -> Source:
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
    question = f"python-stdlib {root}" if hashed else None
    described = _describe([*found, *([topics] if topics.is_file() else [])], root, question)
    files = tuple(replace(file, reader="topics") if file.where == str(topics) else file for file in described)
    return Source("python-stdlib", f"the standard library of Python at {root}", files)


def _describe(files: list[Path], root: Path, question: str | None) -> tuple[SourceFile, ...]:
    """Files with size and digest.

    Args:
        question: what the digests are kept under; None: there are to be none.
    """
    where = [str(path.absolute()) for path in files]
    known = file_digests(where, listing_path(question)) if question else [(size_of(file), "") for file in where]
    return tuple(
        SourceFile(
            path.relative_to(root).as_posix(), str(path.absolute()), READER_BY_SUFFIX[suffix_of(path)], *size_and_digest
        )
        for path, size_and_digest in zip(files, known, strict=True)
    )
