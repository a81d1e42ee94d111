"""What decides the bytes of a data set, and so its name."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from myllm import paths
from myllm.config import DataConfig
from myllm.data.dataset import FORMAT
from myllm.data.sources.source import Source, SourceFile, find_source
from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.load import load_tokenizer
from myllm.paths import user_path

from .work_items import WorkItem, make_work_items

_TOKENS_PER_BYTE = {".parquet": 0.35, ".gz": 0.57, ".zst": 0.57}
"""Rough, for English, for estimates before anything is read. Source: FineWeb-Edu's sample is 28.5 GB of parquet and 10B
tokens, a file of C4 is 318 MB of gzip and about 180M tokens."""
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
        split = self.source.grouping != "articles"  # a part of a file could begin in the middle of an article
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
        content = hashlib.sha256()
        for file in sorted(self.source.files, key=lambda file: file.name):
            content.update(f"{file.name}\0{file.digest}\n".encode(errors="surrogateescape"))
        config = self.config
        return {
            "format": FORMAT,
            "source": self.source.name,
            "source_sha256": content.hexdigest(),
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
        kind, _, where = self.config.source.partition(":")
        if kind == "files":
            values["source"] = f"files:{user_path(where).absolute()}"
        if self.config.tokenizer != self.tokenizer.name:
            values["tokenizer"] = str(self.tokenizer.file.absolute())
        irrelevant = ("workers", "keep_downloads", "dataset", "fallback")
        return {key: value for key, value in values.items() if key not in irrelevant}


def make_spec(config: DataConfig, hashed: bool = True) -> DatasetSpec:
    """
    Args:
        hashed: as `with_digests` of `find_source`. Without digests the spec has no fingerprint, and so no folder.

    Raises:
        UserError: bad source or tokenizer.
    """
    source = find_source(config.source, config.text_column, hashed, config.suffixes)
    return DatasetSpec(source, load_tokenizer(config.tokenizer), config)


def estimate_tokens(files: Iterable[SourceFile]) -> float:
    """Tokens in files, from their sizes and kinds alone."""
    return sum(file.size_bytes * _TOKENS_PER_BYTE.get(Path(file.name).suffix.lower(), 0.25) for file in files)
