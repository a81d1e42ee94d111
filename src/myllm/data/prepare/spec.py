"""The settings that decide the bytes of a data set, and the fingerprint in its name."""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from myllm import paths
from myllm.config import DataConfig
from myllm.data.dataset import FORMAT
from myllm.data.sources.convert import fetch_file
from myllm.data.sources.documents import SPLITTABLE
from myllm.data.sources.hf_datasets.name import absolute_source
from myllm.data.sources.read_task import SkipLog
from myllm.data.sources.source import Source, SourceFile, find_source, read_documents
from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.load import TOKENIZER_FILE, load_tokenizer, trained_vocab_size
from myllm.files import file_lock

from .work_items import WorkItem, make_work_items, order_files

_TOKENS_PER_BYTE = {".parquet": 0.35, ".gz": 0.57, ".zst": 0.57}
"""Rough, for English, for estimates before anything is read. Source: FineWeb-Edu's sample is 28.5 GB of parquet and 10B
tokens, a file of C4 is 318 MB of gzip and about 180M tokens."""
TOKENIZER_DOCUMENTS = 100_000
"""A tokenizer is trained on at most this many documents of its source."""
LONG_DOCUMENT_TOKENS = 10_000
"""More than nearly every document has. Bounds the disk space that `max_documents` documents need."""


@dataclass(frozen=True)
class DatasetSpec:
    """A source, a tokenizer and the settings of a data set."""

    source: Source
    tokenizer: Tokenizer
    config: DataConfig

    @property
    def folder(self) -> Path:
        return paths.datasets_dir() / f"{self.source.name}-{self.fingerprint[:12]}"

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()

    @cached_property
    def work_items(self) -> list[WorkItem]:
        split = self.source.grouping in SPLITTABLE
        return make_work_items(self.source.files, self.config.shuffle_files, self.config.shuffle_seed, split)

    @property
    def estimated_tokens(self) -> int:
        """Of both splits."""
        tokens, config = estimate_tokens(self.source.files), self.config
        if config.target_tokens is not None:
            tokens = min(tokens, config.target_tokens + min(config.val_tokens, config.target_tokens // 9))
        if config.max_documents is not None:
            tokens = min(tokens, config.max_documents * LONG_DOCUMENT_TOKENS)
        return int(tokens)

    @property
    def estimated_val_tokens(self) -> int:
        """Those that are held out (shard_plan.py)."""
        return min(self.config.val_tokens, self.estimated_tokens // 10)

    def describe(self) -> dict[str, Any]:
        """What is hashed into the fingerprint, and written to the manifest."""
        config = self.config
        return {
            "format": FORMAT,
            "source": self.source.name,
            "source_sha256": _content_sha256(self.source),
            "text_column": self.source.column,
            "documents": self.source.grouping,
            "tokenizer": self.tokenizer.describe(),
            "val_tokens": config.val_tokens,
            "target_tokens": config.target_tokens,
            "max_documents": config.max_documents,
            "shard_tokens": config.shard_tokens,
            "shuffle_seed": config.shuffle_seed if config.shuffle_files else None,
            # Keys here keep their first spelling: they are part of the fingerprint of every existing data set.
            "cleaning": {
                "normalise_unicode": config.normalize_unicode,
                "strip_control": config.strip_control,
                "min_chars": config.min_chars,
                "dedup_exact": config.dedup_exact,
            },
        }

    def settings(self) -> dict[str, Any]:
        """The settings that decide the bytes, for `verify --repair`."""
        values = asdict(self.config)
        values["source"] = absolute_source(self.config.source)
        if self.config.tokenizer != self.tokenizer.name and not trained_vocab_size(self.config.tokenizer):
            values["tokenizer"] = str(self.tokenizer.file.absolute())
        irrelevant = ("workers", "keep_downloads", "dataset", "fallback")
        return {key: value for key, value in values.items() if key not in irrelevant}


def make_spec(config: DataConfig, hashed: bool = True) -> DatasetSpec:
    """
    Args:
        hashed: as `with_digests` of `find_source`. Without digests the spec has no fingerprint, and so no folder, and
            GPT-2's tokenizer stands for one that is yet to be trained.

    Raises:
        UserError: bad source or tokenizer.
    """
    source = find_source(config.source, config.text_column, hashed, config.suffixes)
    if (vocab_size := trained_vocab_size(config.tokenizer)) is None:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        tokenizer = _source_tokenizer(source, vocab_size) if hashed else load_tokenizer()
    return DatasetSpec(source, tokenizer, config)


def _source_tokenizer(source: Source, vocab_size: int) -> Tokenizer:
    """The tokenizer train:N: trained on the source's first documents, unless the same source has one already."""
    content = hashlib.sha256(f"{_content_sha256(source)} {source.column} {source.grouping}".encode()).hexdigest()
    file = paths.tokenizers_dir() / f"{source.name}-{content[:12]}-{vocab_size}" / TOKENIZER_FILE
    if not file.is_file():
        from myllm.data.tokenizer.train import train_tokenizer

        file.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(file.with_name(".lock")):  # one of a run's processes trains
            if not file.is_file():
                tqdm.write(f"training a tokenizer of {vocab_size:,} tokens on {source.description}", file=sys.stderr)
                train_tokenizer(first_documents(source, TOKENIZER_DOCUMENTS), vocab_size, file, progress=False)
    return load_tokenizer(file)


def first_documents(source: Source, limit: int) -> Iterator[str]:
    """The source's first documents (0: all), in a fixed random order of its files. Downloads are deleted after use."""

    def all_documents() -> Iterator[str]:
        with tempfile.TemporaryDirectory(dir=paths.tokenizers_dir()) as folder:
            for file in order_files(source.files, shuffle=True, seed=0):
                path = fetch_file(file, source.column, Path(folder), Path(folder))
                yield from read_documents(source, file, path, SkipLog())
                if file.remote or file.builder:
                    path.unlink()

    paths.tokenizers_dir().mkdir(parents=True, exist_ok=True)
    return islice(all_documents(), limit or None)


def _content_sha256(source: Source) -> str:
    """Of the names and digests of its files, and of how `datasets` reads them."""
    content = hashlib.sha256()
    for file in sorted(source.files, key=lambda file: file.name):
        content.update(f"{file.name}\0{file.digest}{file.builder}\n".encode(errors="surrogateescape"))
    return content.hexdigest()


def estimate_tokens(files: Iterable[SourceFile]) -> float:
    """Tokens in files, from their sizes and kinds alone."""
    return sum(file.size_bytes * _TOKENS_PER_BYTE.get(Path(file.name).suffix.lower(), 0.25) for file in files)
