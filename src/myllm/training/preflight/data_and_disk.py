"""What a run's text and its disk look like before anything is prepared. Asks no server, writes and hashes nothing."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from myllm import paths
from myllm.config import DataConfig, RunConfig
from myllm.data.dataset import MANIFEST, SETTINGS, Dataset, find_dataset
from myllm.data.prepare.spec import make_spec
from myllm.data.sources.catalog import CORPORA
from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.load import load_tokenizer
from myllm.files import read_json
from myllm.formatting import parse_count
from myllm.migrations import CONFIG
from myllm.paths import user_path
from myllm.planning.disk import disk_estimate_bytes

from .rehearsal import nearest_existing

IN_FLIGHT_BYTES = 8_000_000_000
"""Downloads that lie on the disk at a time, where they are not kept: about; the preparation reckons exactly."""


@dataclass(frozen=True)
class DataAndDisk:
    """The disk that a run writes to, and how much text it has."""

    folder: Path
    free_bytes: int
    shards_bytes: int
    """Still to be written."""
    downloads_bytes: int
    checkpoints_bytes: int
    """There already, of this run."""
    tokens: int | None
    """To train on, once all is prepared; None: nobody knows yet."""
    tokens_are_counted: bool
    """Or only estimated from the sizes of files."""
    text: str
    """Where they come from, for people."""


def tokenizer_for(config: RunConfig) -> Tokenizer:
    """The vocabulary that the run's text is, or will be, made with."""
    if config.data.dataset is not None:
        return find_dataset(config.data.dataset, unfinished=True).tokenizer()
    return load_tokenizer(config.data.tokenizer)


def inspect_data_and_disk(config: RunConfig) -> DataAndDisk:
    """
    Raises:
        UserError: a source that is not there.
    """
    folder = nearest_existing(paths.runs_dir())
    free = shutil.disk_usage(folder).free
    checkpoints = 0 if config.train.fresh else folder_bytes(paths.RunPaths.of(config.name).root)
    made = find_prepared(config.data)
    if made is not None and made.complete:
        return DataAndDisk(folder, free, 0, 0, checkpoints, made.train.tokens, True, made.name)
    there = folder_bytes(made.folder) if made is not None else 0
    shards = max(disk_estimate_bytes(config)["token shards, at most"] - there, 0)
    source = config.data.source
    corpus = CORPORA.get(source.partition(":")[0])
    if corpus is not None:
        downloads = int(corpus.download_gb * 1e9)
        tokens = parse_count(corpus.tokens, "tokens") if " " not in corpus.tokens else None
        if config.data.target_tokens and tokens and config.data.keep_downloads:
            downloads = int(downloads * min(config.data.target_tokens / tokens, 1))
        downloads = downloads if config.data.keep_downloads else min(downloads, IN_FLIGHT_BYTES)
        return DataAndDisk(folder, free, shards, downloads, checkpoints, tokens, False, source)
    if source.startswith("hub:"):
        return DataAndDisk(folder, free, shards, IN_FLIGHT_BYTES, checkpoints, None, False, source)
    recipe = make_spec(config.data, hashed=False)
    tokens = max(recipe.estimated_tokens - recipe.estimated_val_tokens, 0)
    shards = max(min(shards, 2 * int(recipe.estimated_tokens)) - there, 0)
    return DataAndDisk(folder, free, shards, 0, checkpoints, tokens, False, recipe.source.description)


def find_prepared(config: DataConfig) -> Dataset | None:
    """The data set of these settings if it is there, whole or in part. By its settings, so that nothing is hashed."""
    if config.dataset is not None:
        return find_dataset(config.dataset, unfinished=True)
    wanted = asdict(config)
    kind, _, where = config.source.partition(":")
    if kind == "files":
        wanted["source"] = f"files:{user_path(where).absolute()}"
    for folder in sorted(paths.datasets_dir().glob(f"[!.]*/{SETTINGS}")):
        try:
            settings = CONFIG.upgrade({"data": read_json(folder)})["data"]
            if all(wanted.get(key) == value for key, value in settings.items()):
                return Dataset.open(folder.parent, unfinished=not (folder.parent / MANIFEST).is_file())
        except (
            OSError,
            ValueError,
        ):  # a UserError is one too: damaged or just begun, which the preparation will see to
            continue
    return None


def folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # just being removed
            continue
    return total
