"""Room on the disk: what a preparation needs, said before it starts."""

import shutil
from dataclasses import replace
from pathlib import Path

from myllm import paths
from myllm.data.sources.source import SourceFile
from myllm.errors import UserError
from myllm.formatting import format_bytes

from .scheduler import Downloads
from .spec import DatasetSpec, estimate_tokens


def check_disk(recipe: DatasetSpec, workers: int, parts: int = 1) -> str:
    """What the preparation, or one of several parts of it, needs and what there is, as one line.

    Raises:
        UserError: it does not fit.
    """
    folder = recipe.folder
    shards = 2 * recipe.estimated_tokens / parts  # the units of a part are as large as the shards they become
    # Units wait for the ones before them: two a worker, two bytes a token.
    largest = max(
        estimate_tokens(replace(piece.file, size_bytes=piece.size_bytes) for piece in unit) for unit in recipe.units
    )
    units = min(2 * workers * 2 * largest, shards)
    remote = [file for file in recipe.source.files if file.remote]
    downloads = _download_bytes(recipe, remote, workers, parts)
    have = sum(map(_size_on_disk, folder.rglob("*")))
    need, free = int(shards + units + downloads), shutil.disk_usage(folder.parent).free
    what = f"{format_bytes(shards)} of shards, {format_bytes(units)} of work in progress"
    what += f", {format_bytes(downloads)} of downloads" if remote else ""
    if need > free + have:
        raise UserError(
            f"the data set needs about {format_bytes(need)} under {folder.parent} ({what}), which has "
            f"{format_bytes(free)} free; "
            "free some space, set MYLLM_DATA to a folder on a larger disk, or lower data.target_tokens"
        )
    return f"needs about {format_bytes(need)} under {folder.parent} ({what}); {format_bytes(free + have)} free"


def _download_bytes(recipe: DatasetSpec, remote: list[SourceFile], workers: int, parts: int) -> float:
    """Of downloaded files on the disk at a time."""
    sizes = sorted((file.size_bytes for file in remote), reverse=True)
    if recipe.config.keep_downloads:
        kept = paths.downloads_dir() / recipe.source.name
        share = min(recipe.estimated_tokens / max(estimate_tokens(recipe.source.files), 1), 1) / parts
        return max(sum(sizes) * share - sum(map(_size_on_disk, kept.rglob("*"))), 0)
    # Those of the units under way, a few ahead, and one that is just being deleted.
    under_way = int(2.25 * 2 * workers) if all(len(unit) > 1 or unit[0].parts == 1 for unit in recipe.units) else 1
    return sum(sizes[: under_way + Downloads.AHEAD_FILES])


def _size_on_disk(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # of a part that is just being made, or of a worker that outlived its parent by a moment
        return 0
