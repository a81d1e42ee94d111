"""The disk space that a preparation needs, checked before it starts."""

import shutil
from dataclasses import replace

from myllm import paths
from myllm.errors import UserError
from myllm.files import folder_bytes
from myllm.formatting import format_bytes

from .spec import DatasetSpec, estimate_tokens
from .workers import Downloads


def check_disk(spec: DatasetSpec, worker_count: int, worker_shards: int = 1) -> str:
    """What the preparation needs and what is free, as one line.

    Args:
        worker_shards: how many machines share the preparation, each with a disk of its own.

    Raises:
        UserError: it does not fit.
    """
    folder = spec.folder
    width = spec.tokenizer.dtype.itemsize
    shards = width * spec.estimated_tokens / worker_shards  # the tokens of a worker shard are as large as its shards
    # Items wait for earlier ones: two for each worker.
    largest = max(
        estimate_tokens(replace(part.file, size_bytes=part.size_bytes) for part in item) for item in spec.work_items
    )
    in_progress = min(2 * worker_count * width * largest, shards)
    downloads = _download_bytes(spec, worker_count, worker_shards)
    need = int(shards + in_progress + downloads)
    free, own = shutil.disk_usage(folder.parent).free, folder_bytes(folder)
    parts = f"{format_bytes(shards)} of shards, {format_bytes(in_progress)} of work in progress"
    if downloads:
        parts += f", {format_bytes(downloads)} of downloads"
    if need > free + own:
        raise UserError(
            f"the data set needs about {format_bytes(need)} under {folder.parent} ({parts}), but only "
            f"{format_bytes(free)} are free; free some space, set MYLLM_DATA to a folder on a larger disk, or lower "
            "data.target_tokens"
        )
    return f"needs about {format_bytes(need)} under {folder.parent} ({parts}); {format_bytes(free + own)} free"


def _download_bytes(spec: DatasetSpec, worker_count: int, worker_shards: int) -> float:
    """Bytes of downloaded or converted files on the disk at a time."""
    sizes = sorted((file.size_bytes for file in spec.source.files if file.remote or file.builder), reverse=True)
    if spec.config.keep_downloads:
        kept = paths.downloads_dir() / spec.source.name
        fraction = min(spec.estimated_tokens / max(estimate_tokens(spec.source.files), 1), 1) / worker_shards
        return max(sum(sizes) * fraction - folder_bytes(kept), 0)
    # Those of the items under way, a few ahead, and one that is just being deleted.
    whole_files = all(len(item) > 1 or item[0].num_parts == 1 for item in spec.work_items)
    return sum(sizes[: (int(2.25 * 2 * worker_count) if whole_files else 1) + Downloads.AHEAD_FILES])
