"""The text and the disk space of a run, before anything is prepared. Asks no server, writes and hashes nothing."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from myllm import paths
from myllm.config import DataConfig, RunConfig, from_dict
from myllm.data.dataset import MANIFEST, SETTINGS, Dataset
from myllm.data.find import find_dataset
from myllm.data.prepare.spec import make_spec
from myllm.data.sources.catalog import CORPORA
from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.load import load_tokenizer, trained_vocab_size
from myllm.files import folder_bytes, read_json
from myllm.formatting import parse_count
from myllm.paths import user_path
from myllm.planning.disk import disk_estimate_bytes

from .scratch import nearest_existing

IN_FLIGHT_BYTES = 8_000_000_000
"""Downloads on the disk at a time if they are not kept: a rough number; the preparation computes its own."""


@dataclass(frozen=True)
class DataAndDisk:
    """The disk that a run writes to, and the text that it trains on."""

    folder: Path
    free_bytes: int
    shards_bytes: int
    """Still to be written."""
    downloads_bytes: int
    run_bytes: int
    """Of this run, on the disk now."""
    tokens: int | None
    """Training tokens once all is prepared. None: unknown."""
    tokens_are_exact: bool
    """Counted, not estimated from file sizes."""
    source: str
    """Name of the text, for messages."""


def tokenizer_for(config: RunConfig) -> Tokenizer:
    """The tokenizer of the run's data set, prepared or not."""
    if config.data.dataset is not None:
        return find_dataset(config.data.dataset, allow_incomplete=True).tokenizer()
    if trained_vocab_size(config.data.tokenizer):
        return make_spec(config.data).tokenizer
    return load_tokenizer(config.data.tokenizer)


def inspect_data_and_disk(config: RunConfig) -> DataAndDisk:
    """
    Raises:
        UserError: the source does not exist.
    """
    data, folder = config.data, nearest_existing(paths.runs_dir())
    dataset = find_prepared(data)
    tokens: int | None
    shards, downloads, exact = disk_estimate_bytes(config)["token shards, at most"], 0, False
    if dataset is not None and dataset.known_train_tokens:
        shards, tokens, exact, source = 0, dataset.known_train_tokens, True, dataset.name
    elif corpus := CORPORA.get(data.source.partition(":")[0]):
        tokens, source = parse_count(corpus.tokens) if " " not in corpus.tokens else None, data.source
        downloads = int(corpus.download_gb * 1e9)
        if data.target_tokens and tokens and data.keep_downloads:
            downloads = int(downloads * min(data.target_tokens / tokens, 1))
        downloads = downloads if data.keep_downloads else min(downloads, IN_FLIGHT_BYTES)
    elif data.source.startswith("hub:"):
        downloads, tokens, source = IN_FLIGHT_BYTES, None, data.source
    else:
        spec = make_spec(data, hashed=False)
        tokens, source = max(spec.estimated_tokens - spec.estimated_val_tokens, 0), spec.source.description
        shards = min(shards, spec.tokenizer.dtype.itemsize * spec.estimated_tokens)
    return DataAndDisk(
        folder,
        free_bytes=shutil.disk_usage(folder).free,
        shards_bytes=max(shards - folder_bytes(dataset.folder), 0) if dataset is not None else shards,
        downloads_bytes=downloads,
        run_bytes=0 if config.train.fresh else folder_bytes(paths.RunPaths.of(config.name).root),
        tokens=tokens,
        tokens_are_exact=exact,
        source=source,
    )


def find_prepared(config: DataConfig) -> Dataset | None:
    """The data set with these settings, complete or not. Compares settings, so that nothing is hashed."""
    if config.dataset is not None:
        return find_dataset(config.dataset, allow_incomplete=True)
    kind, _, path = config.source.partition(":")
    wanted = replace(config, source=f"files:{user_path(path).absolute()}") if kind == "files" else config
    # What settings.json lacks is the same for this purpose, or younger than the data set.
    base = RunConfig(data=replace(wanted, suffixes=DataConfig.suffixes))
    for file in sorted(paths.datasets_dir().glob(f"[!.]*/{SETTINGS}")):
        try:
            if from_dict({"data": read_json(file)}, base).data == wanted:
                return Dataset.open(file.parent, allow_incomplete=not (file.parent / MANIFEST).is_file())
        except (OSError, ValueError):  # also a UserError: damaged or just begun; the preparation deals with it
            continue
    return None
