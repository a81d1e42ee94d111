"""Rebuild damaged shards from the source: only those, and byte for byte."""

import shutil
from contextlib import closing
from dataclasses import replace

import numpy as np

from myllm.data.dataset import FORMAT, SPANS, TOKENIZER, Dataset
from myllm.data.preparation_lock import preparation_lock
from myllm.data.settings import read_settings
from myllm.distributed.cpu_threads import usable_cores
from myllm.errors import UserError

from .prepare import disk_errors_for_users
from .progress import progress_bar
from .scheduler import WorkScheduler, item_bytes
from .shard_plan import Span
from .shard_writer import write_shard
from .spec import DatasetSpec, make_spec
from .work_items import tokens_path
from .workers import start_workers


def repair(dataset: Dataset, damaged: list[str], worker_count: int = 0, progress: bool = True) -> None:
    """Rebuild shards and replace the damaged ones.

    Args:
        damaged: their file names.

    Raises:
        UserError: the source has changed or is gone, or no longer gives the same bytes. Then nothing is replaced.
    """
    folder = dataset.folder
    spec = _original_spec(dataset)
    spans = _read_spans(dataset, damaged)
    numbers = sorted({item for shard_spans in spans.values() for item, _, _ in shard_spans})
    work, worker_count = folder / ".repair", worker_count or usable_cores()
    with disk_errors_for_users(), preparation_lock(folder):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            with (
                start_workers(spec, work, worker_count) as workers,
                progress_bar(item_bytes(spec, numbers), progress) as bar,
                closing(WorkScheduler(spec, work, workers, numbers).run(bar)) as finished,
            ):
                for _ in finished:
                    pass
            for file, shard_spans in spans.items():
                copied = [(tokens_path(work, item), start, end) for item, start, end in shard_spans]
                digest = write_shard(work / file, copied, spec.tokenizer.dtype)
                expected = next(shard.sha256 for shard in dataset.shards if shard.file == file)
                if digest != expected:
                    raise UserError(
                        f"the rebuilt {file} has sha256 {digest[:12]}..., expected {expected[:12]}...: a library reads "
                        f"or tokenizes differently than before; delete {folder} and prepare it again"
                    )
                (work / file).replace(folder / file)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _original_spec(dataset: Dataset) -> DatasetSpec:
    config = read_settings(dataset.folder)
    own_tokenizer = dataset.folder / TOKENIZER
    spec = make_spec(replace(config, tokenizer=str(own_tokenizer)) if own_tokenizer.exists() else config)
    # spans.npy has the split into validation and training, so an earlier format's rules for it do not matter.
    ignored = {"format", "val_tokens"} if dataset.manifest["format"] != FORMAT else set()
    changed = [
        key for key, value in spec.describe().items() if dataset.manifest.get(key) != value and key not in ignored
    ]
    if changed:
        raise UserError(
            f"cannot repair {dataset.folder}: {', '.join(changed)} differ from when it was prepared. Restore the "
            "source, or delete the folder and prepare it again"
        )
    return spec


def _read_spans(dataset: Dataset, damaged: list[str]) -> dict[str, list[Span]]:
    """By shard file, the tokens of work items that it holds, in order."""
    path = dataset.folder / SPANS
    try:
        rows = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"cannot repair without {path}, which lists the content of each shard ({error}); delete {dataset.folder} "
            "and prepare it again"
        ) from None
    files = {number: shard.file for number, shard in enumerate(dataset.shards) if shard.file in damaged}
    spans: dict[str, list[Span]] = {file: [] for file in files.values()}
    for shard, item, start, end in rows[np.isin(rows[:, 0], list(files))].tolist():
        spans[files[shard]].append((item, start, end))
    return spans
