"""Sources of text, by the words of `--data.source`: lists of files, each with a digest, that yield documents.

The digests make up the source's fingerprint: the same digests give the same data set. catalog.py describes the public
corpora, hub_listing.py finds their files, download.py fetches them.
"""

import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from myllm.errors import UserError, did_you_mean
from myllm.paths import user_path

from .catalog import CORPORA, Corpus
from .documents import GROUPINGS
from .file_digests import file_digests
from .hf_datasets.listing import OWN_SUFFIXES, list_dataset
from .hf_datasets.name import absolute_source, parse_name
from .hub_listing import RemoteFile, list_hub, list_urls, listing_path, suggest_fallback
from .local_files import glob_files, match_files
from .read_task import ReadTask, SkipLog
from .readers import READER_BY_SUFFIX, read_file, suffix_of
from .text_column import parse_text_column

SHOWN_SUFFIXES = 6
SUFFIX_ADVICE = (
    "`--suffix .rst .html` (pretrain.py: `--data.suffix`) reads other kinds as plain text, `datasets:PATH` .csv, .tsv "
    "and .json as rows; convert .pdf, .docx and .epub to .txt first (pdftotext, pandoc)"
)
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tgz")
COMPRESSED_ADVICE = "decompress other compressed files first (gunzip, unzip, tar)"
FOLDER_ADVICE = "a hidden or linked folder is read where `files:` names it"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?(:.+)?", re.ASCII)


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, here or on a server."""

    name: str
    """Relative to the source, the same on every machine."""
    location: str
    """An absolute path, or a URL: https://..., or hf://datasets/NAMESPACE/NAME@REVISION/PATH."""
    reader: str
    """Key of readers.READERS."""
    size_bytes: int
    """As stored, compressed or not; 0 if the server does not say."""
    digest: str = ""
    """sha256 of the content, or another identifier of this version of the file."""
    builder: str = ""
    """Not empty: only `datasets` can read the file; its module and settings, as JSON (convert.py)."""

    @property
    def remote(self) -> bool:
        return "://" in self.location


@dataclass(frozen=True)
class Source:
    """Files of text, and how rows become documents."""

    name: str
    """Usable as a folder name."""
    description: str
    files: tuple[SourceFile, ...]
    column: str = "text"
    grouping: str = "rows"
    """Key of documents.GROUPINGS."""
    ignored: tuple[str, ...] = ()
    """The suffix of each local file without a reader, and the kind of everything else that is not read."""

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def ignored_note(self) -> str:
        """What is ignored below a local folder, by kind, as text; empty if nothing."""
        if not self.ignored:
            return ""
        return f"ignored {count_kinds(self.ignored)}, reading {len(self.files):,} other file(s){advice(self.ignored)}"


def find_source(
    spec: str, column: str | None = None, with_digests: bool = True, suffixes: Sequence[str] = ()
) -> Source:
    """
    Args:
        column: overrides the source's own text column.
        with_digests: False saves reading all local files.
        suffixes: of more local files to read as plain text.

    Raises:
        UserError: unknown source, missing or empty path, unreadable file.
        UnreachableError: a listing could not be downloaded.
    """
    kind, _, rest = spec.partition(":")
    parse_text_column(column or "text")
    if kind == "files" and ":" in spec:
        source = local_files(rest, suffixes)
    elif kind == "datasets" and rest:
        source = dataset_files(rest, column)
    elif kind == "hub" and rest:
        source = hub_files(rest)
    elif spec == "python-stdlib":
        source = python_stdlib()
    elif kind in CORPORA:
        source = known_corpus(CORPORA[kind], rest)
    else:
        known = ["python-stdlib", *CORPORA]
        hint = _hint(spec) or did_you_mean(spec, [*known, "files:", "hub:", "datasets:"])
        raise UserError(
            f"unknown source {spec!r}{hint}; known sources: {', '.join(known)}, hub:NAMESPACE/NAME[:GLOB] (any "
            "repository of parquet or jsonl files), datasets:NAMESPACE/NAME[:CONFIG][:SPLIT] (whatever "
            "datasets.load_dataset opens), files:PATH (a local file, folder or glob)"
        )
    if with_digests and not any(file.remote for file in source.files):
        source = replace(source, files=_add_digests(source.files, listing_path(absolute_source(spec))))
    return replace(source, column=column) if column else source


def check_source(spec: str, suffixes: Sequence[str] = ()) -> None:
    """Reject an invalid source without reading texts or sending requests.

    Raises:
        UserError: as `find_source`.
    """
    kind, _, rest = spec.partition(":")
    if kind == "datasets" and rest:
        parse_name(rest)
    elif spec != "python-stdlib" and kind not in CORPORA and not (kind == "hub" and rest):
        find_source(spec, with_digests=False, suffixes=suffixes)


def _hint(spec: str) -> str:
    """The probable source if the user omitted its kind."""
    try:
        exists = bool(spec) and (user_path(spec).exists() or bool(glob_files(user_path(spec))[0]))
    except (OSError, ValueError, UserError):
        exists = False
    if exists or spec.startswith(("/", "./", "../", "~")):
        return f", did you mean 'files:{spec}'?" + ("" if exists else " (there is nothing at that path)")
    if _REPOSITORY.fullmatch(spec):
        return f", did you mean 'hub:{spec}', of the Hub, or 'files:{spec}' (there is nothing at that path)?"
    return ""


def read_documents(
    source: Source, file: SourceFile, path: Path, skips: SkipLog, part: int = 0, num_parts: int = 1
) -> Iterator[str]:
    """The documents of one file, or of one part of it, at `path`."""
    column = "text" if file.builder else source.column
    task = ReadTask(path, file.name, column, part, num_parts)
    return GROUPINGS[source.grouping](read_file(file.reader, task, skips))


def folder_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in text)[:40]


# -- the Hub ----------------------------------------------------------------------------------------------------------


def known_corpus(corpus: Corpus, variant: str) -> Source:
    """One of the corpus's URL lists, if it has any; the first for an empty variant."""
    if variant and variant not in corpus.variants:
        advice = f"expected one of {', '.join(corpus.variants)}" if corpus.variants else f"use {corpus.name} alone"
        raise UserError(
            f"{corpus.name} has no variant {variant!r}{did_you_mean(variant, list(corpus.variants))}; {advice}"
        )
    try:
        if corpus.url_list:
            found = list_urls(corpus.repo, corpus.url_list.format(variant or corpus.variants[0]))
        else:
            found = list_hub(corpus.repo, corpus.revision, corpus.pattern)
    except UserError as error:
        raise suggest_fallback(error, corpus.name) from None
    name = f"{corpus.name}-{variant}" if variant else corpus.name
    return Source(name, corpus.description, _remote_files(found, name), corpus.column, corpus.grouping)


def hub_files(spec: str) -> Source:
    """Any dataset repository of the Hub: NAMESPACE/NAME[@REVISION][:GLOB].

    Without a glob: its files of rows or, if it has none, its plain text.
    """
    where, _, pattern = spec.partition(":")
    repo, _, revision = where.partition("@")
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UserError(f"hub:{spec}: expected hub:NAMESPACE/NAME, such as hub:roneneldan/TinyStories:data/train-*")
    found = list_hub(repo, revision or None, pattern)
    if not pattern:  # a repository's card and scripts are not its texts
        rows = [file for file in found if READER_BY_SUFFIX.get(suffix_of(file.name)) in ("jsonl", "parquet", "arrow")]
        found = rows or [file for file in found if file.name != "README.md"]
    name = "hub-" + folder_name(repo.replace("/", "-") + (f"-{pattern}" if pattern else ""))
    return Source(name, f"the dataset {repo} of the Hub", _remote_files(found, f"hub:{spec}"))


def _remote_files(found: list[RemoteFile], name: str) -> tuple[SourceFile, ...]:
    readable = [(file, reader) for file in found if (reader := READER_BY_SUFFIX.get(suffix_of(file.name)))]
    if not readable:
        seen = ", ".join(sorted({suffix_of(file.name) or "(none)" for file in found})[:8])
        raise UserError(
            f"{name} has no readable files: found {len(found)} with the suffixes {seen or '(none)'}, expected "
            f"{', '.join(READER_BY_SUFFIX)}. A glob selects files: hub:NAMESPACE/NAME:GLOB"
        )
    return tuple(SourceFile(file.name, file.url, reader, file.size_bytes, file.digest) for file, reader in readable)


# -- the package datasets ---------------------------------------------------------------------------------------------


def dataset_files(spec: str, column: str | None = None) -> Source:
    """What `datasets.load_dataset` opens: NAMESPACE/NAME[@REVISION][:CONFIG][:SPLIT] or PATH[:CONFIG][:SPLIT].

    Raises:
        UserError: it opens nothing there, an unknown configuration or split, or a column without text.
    """
    name = parse_name(spec)
    listing = list_dataset(name)
    column = column or "text"
    fault = parse_text_column(column).fault(listing.columns) if listing.columns else ""
    if fault:
        raise UserError(
            f"{name} (split {listing.split}): {fault.replace('the file has', 'it has')}; --data.text-column chooses "
            "a column, or several by a template such as '{title}\\n{text}'"
        )
    builder = json.dumps({"module": listing.module, "options": listing.options}, sort_keys=True)
    native = () if listing.options else OWN_SUFFIXES.get(listing.module, ())
    files = []
    for file in listing.files:
        own = suffix_of(file.name) in native
        reader = READER_BY_SUFFIX[suffix_of(file.name)] if own else "arrow"
        size_bytes = _size_bytes(Path(file.url)) if name.path else file.size_bytes
        files.append(SourceFile(file.name, file.url, reader, size_bytes, file.digest, "" if own else builder))
    where = name.path.name if name.path else name.where
    words = [where, listing.config.removeprefix("default"), listing.split]
    label = "datasets-" + folder_name("-".join(filter(None, words)).replace("/", "-"))
    return Source(label, f"{name} (split {listing.split})", tuple(files), column)


# -- local files ------------------------------------------------------------------------------------------------------


def local_files(spec: str, suffixes: Sequence[str] = ()) -> Source:
    """A file, every readable file below a folder, or a glob (** for any depth).

    What is hidden is ignored, and what this program writes below the folder. Links to folders are not followed.

    Args:
        suffixes: of more files to read as plain text; `.rst`, `rst` and `*.rst` mean the same.
    """
    if not spec:
        raise UserError("files: needs a path, such as files:~/texts (files:. for this folder)")
    path = user_path(spec)
    with _clear_read_errors():
        files, root, ignored_kinds = match_files(path)
    readers = dict.fromkeys(("." + suffix.lstrip("*.").lower() for suffix in suffixes), "prose") | READER_BY_SUFFIX
    readable = [file for file in files if suffix_of(file) in readers]
    ignored = (*ignored_kinds, *(suffix_of(file) for file in files if suffix_of(file) not in readers))
    if not readable:
        nothing = "nothing" if path.exists() else "nothing: no such file or folder"
        seen = f"only {count_kinds(ignored)}" if ignored else nothing
        expected = f"expected one of {', '.join(readers)}"
        raise UserError(f"no text found at {spec!r}: found {seen}, {expected}{advice(ignored)}")
    name = os.path.basename(os.path.abspath(path if path.exists() else root))
    described = _describe(readable, root, readers)
    return Source("files-" + folder_name(name), f"local files at {spec}", described, ignored=ignored)


def count_kinds(kinds: Iterable[str]) -> str:
    """Such as "1 broken link(s), 289 .html, 3 .pdf": suffixes last, the most frequent first."""
    counts = sorted(Counter(kinds).items(), key=lambda item: (_is_suffix(item[0]), -item[1], item[0]))
    shown = [f"{count:,} {kind or 'without suffix'}" for kind, count in counts[:SHOWN_SUFFIXES]]
    rest = sum(count for _, count in counts[SHOWN_SUFFIXES:])
    return ", ".join(shown + ([f"{rest:,} of other kinds"] if rest else []))


def advice(ignored: Iterable[str]) -> str:
    """What to do about ignored files and folders, for the end of a message."""
    suffixes = [kind for kind in ignored if _is_suffix(kind)]
    lines = {
        SUFFIX_ADVICE: any(not kind.endswith(COMPRESSED) for kind in suffixes),
        COMPRESSED_ADVICE: any(kind.endswith(COMPRESSED) for kind in suffixes),
        FOLDER_ADVICE: any("folder" in kind for kind in ignored),
    }
    return "".join(f"; {line}" for line, applies in lines.items() if applies)


def _is_suffix(kind: str) -> bool:
    return not kind or kind.startswith(".")


def python_stdlib() -> Source:
    """The code and reference text that ship with the running Python: about 10 MB, on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    # Tests and tables are most of the bytes and read like no other text; site-packages is not the library.
    excluded = {
        "test", "tests", "idle_test", "encodings", "lib2to3", "pydoc_data", "ensurepip", "site-packages",
        "dist-packages", "__pycache__",
    }  # fmt: skip
    found = [file for file in sorted(root.rglob("*.py")) if not excluded & set(file.relative_to(root).parts[:-1])]
    if len(found) < 50:
        raise UserError(
            f"this Python has no readable standard library at {root}: found {len(found)} .py files; use local files "
            "with --data.source files:PATH"
        )
    topics = root / "pydoc_data" / "topics.py"
    files = _describe(found, root)
    if topics.is_file():
        [described] = _describe([topics], root)
        files += (replace(described, reader="topics"),)
    return Source("python-stdlib", f"the standard library of Python at {root}", files)


def _describe(files: list[Path], root: Path, readers: Mapping[str, str] = READER_BY_SUFFIX) -> tuple[SourceFile, ...]:
    return tuple(
        SourceFile(file.relative_to(root).as_posix(), str(file.absolute()), readers[suffix_of(file)], _size_bytes(file))
        for file in files
    )


def _size_bytes(file: Path) -> int:
    with _clear_read_errors():
        return file.stat().st_size


def _add_digests(files: tuple[SourceFile, ...], cache: Path) -> tuple[SourceFile, ...]:
    """Local files with their sha256."""
    with _clear_read_errors():
        found = file_digests([file.location for file in files], cache)
    return tuple(
        replace(file, size_bytes=size, digest=digest) for file, (size, digest) in zip(files, found, strict=True)
    )


@contextmanager
def _clear_read_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: {error.strerror}; make it readable, or move it out of the source"
        ) from None
