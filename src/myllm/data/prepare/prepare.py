"""Text to shards: download, tokenize in parallel, hold out validation, write, hash.

    files ─▶ seeded order ─▶ work items ─▶ [download] ─▶ [worker: read, tokenize] ─▶ work/000012.bin, .npz ─┐
                                                                                                            ▼
         shards, in their final order ◀─ [worker: copy, hash] ◀─ shard plan ◀─ documents in order: val first, then train

Work items depend on the source's files alone, and shards are planned in the items' order, so the bytes do not depend
on the number of workers. Items, shards and downloads get their final names when they are complete, so the next call
continues after any interruption.
"""

import errno
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection

from tqdm import tqdm

from myllm import paths
from myllm.config import DataConfig
from myllm.data.dataset import MANIFEST, WORK, Dataset
from myllm.data.find import find_dataset
from myllm.data.mixture.mixed_dataset import MixedDataset
from myllm.data.mixture.spec import component_configs, find_mixture
from myllm.data.preparation_lock import preparation_lock
from myllm.data.sources.hub_listing import UnreachableError
from myllm.data.sources.source import find_source
from myllm.distributed.cpu_threads import usable_cores
from myllm.distributed.terminal import wrap
from myllm.errors import UserError, explain_os_error, full_disk_path, out_of_space

from .disk_space import check_disk
from .progress import progress_bar
from .scheduler import WorkScheduler, item_bytes
from .shard_writer import NotEnoughText, ShardWriter
from .spec import DatasetSpec, estimate_tokens, make_spec
from .work_dir import (
    adopt_worker_shards,
    delete_damaged_items,
    delete_unfinished,
    is_complete,
    open_work_dir,
    remove_dataset,
    remove_work_dir,
)
from .workers import start_workers


def prepare(config: DataConfig, progress: bool = True, terminal: Connection | None = None) -> Dataset:
    """The config's data set. Prepares it if it does not exist, and continues an interrupted preparation.

    A second process that asks for the same data set waits for the first.

    Args:
        terminal: see `progress_bar`.

    Raises:
        UserError: bad source, too little text, not enough disk space. Finished work is kept.
    """
    if config.dataset is not None:
        return find_dataset(config.dataset)
    if mixture := find_mixture(config):
        return MixedDataset.of(mixture, [prepare(part, progress) for part in component_configs(config, mixture)])
    spec = resolve(config)
    if not is_complete(spec.folder) or (spec.folder / WORK).exists():
        with disk_errors_for_users(), preparation_lock(spec.folder):
            if not is_complete(spec.folder):  # another process may have prepared it in the meantime
                try:
                    _build(spec, config.workers or usable_cores(), progress, terminal)
                except NotEnoughText:  # another try would fail too
                    remove_dataset(spec.folder)
                    raise
            remove_work_dir(spec.folder)  # also if an earlier call was killed right after it wrote the manifest
    return Dataset.open(spec.folder)


def resolve(config: DataConfig) -> DatasetSpec:
    """The config's data set, or its fallback if the source cannot be reached."""
    try:
        return make_spec(config)
    except UnreachableError as error:
        if config.fallback is None:
            raise
        find_source(config.fallback, config.text_column, suffixes=config.suffixes)  # raises if that is wrong itself
        tqdm.write(f"{error}\nusing {config.fallback} instead", file=sys.stderr)
        return make_spec(replace(config, source=config.fallback, fallback=None))


def _build(spec: DatasetSpec, worker_count: int, progress: bool, terminal: Connection | None) -> None:
    work = spec.folder / WORK
    open_work_dir(spec, work)
    delete_unfinished(spec, work)
    space = check_disk(spec, worker_count)
    if progress:
        for note in (f"preparing {spec.folder.name}: {space}", spec.source.ignored_note, *similar_datasets(spec)):
            if note:
                tqdm.write(wrap(note) if sys.stderr.isatty() else note, file=sys.stderr)
    adopt_worker_shards(spec, work)
    with (
        start_workers(spec, work, worker_count) as workers,
        progress_bar(_bytes_to_read(spec), progress, taken_over=terminal) as bar,
    ):
        delete_damaged_items(spec, work, workers.pool)
        writer = ShardWriter(spec, work, workers.pool)
        # While the next item is tokenized, written shards are listed: training may be waiting for them.
        with closing(WorkScheduler(spec, work, workers, while_waiting=writer.list_written).run(bar)) as finished:
            for number in finished:
                writer.add(number, item_bytes(spec, [number]))
                bar.set_postfix_str(f"{writer.plan.counts['train_tokens'] / 1e6:,.1f}M tokens", refresh=False)
                if writer.plan.full:
                    break
        writer.finish()


def _bytes_to_read(spec: DatasetSpec) -> int:
    fraction = spec.estimated_tokens / max(estimate_tokens(spec.source.files), 1)
    return int(spec.source.size_bytes * min(fraction, 1))


def similar_datasets(spec: DatasetSpec) -> Iterator[str]:
    """A note on each complete data set of the same text and vocabulary in other amounts: it may do as well."""
    wanted = spec.describe()
    amounts = ("val_tokens", "target_tokens", "max_documents", "shard_tokens", "shuffle_seed")
    for file in sorted(paths.datasets_dir().glob(f"[!.]*/{MANIFEST}")):
        try:
            manifest = Dataset.read(file.parent).manifest
        except UserError:
            continue
        if any(manifest.get(key) != wanted[key] for key in wanted.keys() - {*amounts, "format"}):
            continue
        differences = ", ".join(
            f"{key} {manifest.get(key)} instead of {wanted[key]}" for key in amounts if manifest.get(key) != wanted[key]
        )
        yield (
            f"note: {file.parent.name} has {manifest['counts']['train_tokens']:,} training tokens of the same source "
            f"({differences or 'an earlier format'}); to train on it instead: --data.dataset {file.parent.name}"
        )


@contextmanager
def disk_errors_for_users() -> Iterator[None]:
    """Turn a full disk, or a folder that cannot be used, into a UserError. Other errors keep their traceback."""
    try:
        yield
    except OSError as error:
        folder = paths.datasets_dir()
        full = full_disk_path(error, folder)
        if out_of_space(error) and full is not None and full.is_relative_to(folder):
            raise UserError(
                f"no room to write the data set under {folder}: {error.strerror}. Finished work is kept: free some "
                "space and run the same command again, or set MYLLM_DATA to a folder on a larger disk"
            ) from None
        if message := explain_os_error(error, paths.temp_data()):
            raise UserError(message) from None
        if error.errno == errno.ENOENT:
            raise UserError(
                f"cannot find {error.filename or folder}: {error.strerror}; run the command again, and set MYLLM_DATA "
                "to another folder if the path does not exist"
            ) from None
        raise
