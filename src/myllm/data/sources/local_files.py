"""Which local files a path or glob means."""

import os
from pathlib import Path
from typing import NamedTuple

from myllm import paths
from myllm.errors import UserError


class LocalFiles(NamedTuple):
    """What a path or glob means."""

    files: list[Path]
    root: Path
    """The folder that their names are relative to."""
    ignored: list[str]
    """The kind of each entry of the folder that is not read. Files are not counted by suffix here."""


def match_files(path: Path) -> LocalFiles:
    """The files that a file name, a folder or a glob means.

    Hidden files and broken links are ignored and counted, and so are hidden folders and links to folders, without
    looking into them. What this program writes below the folder is ignored.

    Raises:
        OSError: a folder cannot be listed.
    """
    ignored: dict[Path, str] = {}
    if path.is_file() or _is_broken_link(path):
        found, root = [path], path.parent
    elif path.is_dir():
        found, root = _walk(path, ignored), path
    else:
        found, root = glob_files(path)
    ignored |= {file: "broken link(s)" for file in found if _is_broken_link(file)}
    own = _own_output(root) if found or ignored else []  # without any, the root may be an impossible path
    files = [file for file in found if file.is_file() and not _is_below(file, own)]
    return LocalFiles(files, root, [kind for entry, kind in ignored.items() if not _is_below(entry, own)])


def glob_files(pattern: Path) -> tuple[list[Path], Path]:
    """What a glob matches, except hidden files, and the folder before its first wildcard."""
    parts = pattern.parts
    wildcard = next((i for i, part in enumerate(parts) if set("*?[") & set(part)), None)
    if wildcard is None:
        return [], pattern
    root, rest = Path(*parts[:wildcard]), "/".join(parts[wildcard:])
    try:
        # Path.glob, unlike the module glob, ends in loops of links. Its ** alone finds folders only.
        found = sorted(root.glob(f"{rest}/*" if parts[-1] == "**" else rest))
    except ValueError as error:
        raise UserError(f"invalid glob {str(pattern)!r}: {error}") from None
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(root).parts)], root


def _walk(root: Path, ignored: dict[Path, str]) -> list[Path]:
    """Every file below a folder, except what `ignored` gets, each with its kind: hidden ones and links to folders."""

    def fail(error: OSError) -> None:  # os.walk ignores a folder that it cannot list
        raise error

    found = []
    for parent, folders, files in os.walk(root, onerror=fail):
        ignored |= {Path(parent, name): "hidden folder(s)" for name in folders if name.startswith(".")}
        ignored |= {Path(parent, name): "hidden file(s)" for name in files if name.startswith(".")}
        folders[:] = [name for name in folders if not name.startswith(".")]
        ignored |= {path: "link(s) to folders" for name in folders if (path := Path(parent, name)).is_symlink()}
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(found)


def _own_output(root: Path) -> list[Path]:
    """The folders below the root that this program writes: runs, data sets and others."""
    base = root.absolute().resolve()
    own = (
        paths.datasets_dir(), paths.listings_dir(), paths.locks_dir(), paths.downloads_dir(), paths.tokenizers_dir(),
        paths.runs_dir(),
    )  # fmt: skip
    return [folder for folder in (path.resolve() for path in own) if base in folder.parents]


def _is_below(path: Path, folders: list[Path]) -> bool:
    # Path.resolve fails for a link that leads to itself.
    return bool(folders) and any(Path(os.path.realpath(path)).is_relative_to(folder) for folder in folders)


def _is_broken_link(path: Path) -> bool:
    return path.is_symlink() and not path.exists()
