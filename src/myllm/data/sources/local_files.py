"""Which local files a path or glob means."""

import os
from pathlib import Path

from myllm import paths
from myllm.errors import UserError


def match_files(path: Path) -> tuple[list[Path], Path]:
    """The files that a file name, a folder or a glob means, and the folder that their names are relative to.

    Hidden files are ignored, and so is what this program writes below the folder. Broken links are included, so that
    reading them fails: they must not pass for files that never existed.

    Raises:
        OSError: a folder cannot be listed.
    """
    if path.is_file() or _is_broken_link(path):
        found, root = [path], path.parent
    elif path.is_dir():
        found, root = _walk(path), path
    else:
        found, root = glob_files(path)
    return [file for file in _without_own_output(found, root) if file.is_file() or _is_broken_link(file)], root


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


def _walk(root: Path) -> list[Path]:
    """Every file below a folder that is not hidden. Links to folders are not followed."""

    def fail(error: OSError) -> None:  # os.walk ignores a folder that it cannot list
        raise error

    found = []
    for parent, folders, files in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(found)


def _without_own_output(files: list[Path], root: Path) -> list[Path]:
    """The files, except runs, data sets and whatever else this program writes below the root."""
    if not files:  # the root may be an impossible path
        return files
    base = root.absolute().resolve()
    functions = (paths.datasets_dir, paths.listings_dir, paths.downloads_dir, paths.tokenizers_dir, paths.runs_dir)
    folders = [function().resolve() for function in functions]
    own = [folder for folder in folders if folder != base and folder.is_relative_to(base)]
    if not own:
        return files
    return [file for file in files if not any(file.absolute().resolve().is_relative_to(folder) for folder in own)]


def _is_broken_link(path: Path) -> bool:
    return path.is_symlink() and not path.exists()
