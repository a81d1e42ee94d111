"""A prepared data set on disk: token shards and the manifest that vouches for them.

A folder holds `val_00000.npy`, `train_00000.npy`, ... , one-dimensional uint16 or uint32 arrays in NumPy's own format,
and `manifest.json`, which is written last: a folder without one is not a data set yet. During preparation
`progress.json` lists the shards that are final, so that training can begin. See docs/data_format.md.
"""

import threading
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.load import load_tokenizer
from myllm.errors import UserError
from myllm.files import read_json
from myllm.formatting import format_bytes
from myllm.planning.batch import BatchPlan

from .order import SequenceOrder, StreamOrder
from .preparation_lock import is_being_prepared, preparation_ended
from .token_stream import Shard, TokenStream, find_damaged

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
SETTINGS = "settings.json"
"""For `verify --repair`."""
SPANS = "spans.npy"
"""The tokens of work items that each shard holds, (spans, 4) int64: shard, item, start, end."""
TOKENIZER = "tokenizer.json"
"""A vocabulary other than GPT-2's."""
WORK = "work"
"""What an interrupted preparation continues from."""
FORMAT = "myllm-shards-4"
READABLE = ("myllm-shards-3", FORMAT)
"""They differ only in how validation was chosen."""
_REMEDY = "delete {} and prepare it again"


@dataclass
class Dataset:
    """A folder, its manifest and its two token streams. While the data set is being prepared, `refresh` extends it."""

    folder: Path
    manifest: dict[str, Any]
    complete: bool = True
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path, allow_incomplete: bool = False) -> "Dataset":
        """
        Args:
            allow_incomplete: open a data set that is still being prepared, too.

        Raises:
            UserError: not a data set, another format, or a shard missing or of the wrong size.
        """
        manifest, complete = _read_manifest(folder, allow_incomplete)
        dataset = cls(folder, manifest, complete)
        try:
            _ = dataset.train, dataset.val, dataset.fingerprint, manifest["source"]  # maps every shard
            _ = [manifest["tokenizer"][key] for key in ("kind", "name", "sha256", "end_of_text")]
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / MANIFEST} is damaged ({error!r}); {_REMEDY.format(folder)}") from None
        return dataset

    @classmethod
    def read(cls, folder: Path) -> "Dataset":
        """As `open`, without looking at the shards: they may be damaged or missing."""
        return cls(folder, *_read_manifest(folder, allow_incomplete=False))

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the bytes (prepare/spec.py), known before they exist."""
        return self.manifest["fingerprint"]

    @property
    def end_of_text(self) -> int:
        return self.manifest["tokenizer"]["end_of_text"]

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(Shard(**shard) for shard in self.manifest["shards"])

    @cached_property
    def train(self) -> TokenStream:
        return TokenStream(self, "train")

    @cached_property
    def val(self) -> TokenStream:
        return TokenStream(self, "val")

    def order(self, batch: BatchPlan) -> SequenceOrder:
        """The training sequences in their order."""
        return StreamOrder(self.train, batch.seq_len)

    @property
    def known_train_tokens(self) -> int | None:
        """None while the data set is still being prepared."""
        return self.train.tokens if self.complete else None

    def tokenizer(self) -> Tokenizer:
        """
        Raises:
            UserError: it is missing, or is not the one that the data set was prepared with.
        """
        recorded = self.manifest["tokenizer"]
        tokenizer = load_tokenizer(recorded["name"] if recorded["kind"] == "tiktoken" else self.folder / TOKENIZER)
        if tokenizer.sha256 != recorded["sha256"]:
            raise UserError(
                f"{self.folder} was prepared with another vocabulary than {tokenizer.file}: its sha256 is "
                f"{tokenizer.sha256[:12]}..., expected {recorded['sha256'][:12]}...; {_REMEDY.format(self.folder)}"
            )
        if tokenizer.end_of_text != self.end_of_text:
            raise UserError(
                f"{self.folder / MANIFEST} is damaged: its end_of_text is {self.end_of_text}, but that of "
                f"{tokenizer.name} is {tokenizer.end_of_text}; {_REMEDY.format(self.folder)}"
            )
        return tokenizer

    def refresh(self) -> None:
        """Take over the shards that were finished since the last call. Thread-safe."""
        if self.complete:
            return
        with self._lock:
            manifest, complete = _read_manifest(self.folder, allow_incomplete=True)
            if manifest.get("fingerprint") != self.fingerprint:
                raise UserError(
                    f"{self.folder} was prepared again with other settings while in use; run the command again"
                )
            self.manifest = manifest
            self.train.extend()
            self.val.extend()
            self.complete = complete  # last: other threads rely on the streams after reading it

    def raise_if_abandoned(self) -> None:
        """Refresh a data set that is not complete yet.

        Raises:
            PreparationEnded: no process is preparing the rest of it.
        """
        for _ in range(3):  # one process may be taking over from another
            self.refresh()
            if self.complete or is_being_prepared(self.folder):
                return
            time.sleep(1)
        raise preparation_ended(self.folder)

    def describe_progress(self) -> str:
        """Such as "1,000,000 training tokens so far, from 12% of 3.4 GB"."""
        tokens = f"{self.train.tokens:,} training tokens"
        progress = self.manifest.get("progress")
        if self.complete or not progress or not progress["source_bytes"]:
            return tokens
        fraction = progress["done_bytes"] / progress["source_bytes"]
        return f"{tokens} so far, from {fraction:.0%} of {format_bytes(progress['source_bytes'])}"

    def damaged(self) -> list[str]:
        """Files of shards that do not match the manifest, or cannot be read."""
        return find_damaged(self.folder, list(self.shards))


def _read_manifest(folder: Path, allow_incomplete: bool) -> tuple[dict[str, Any], bool]:
    """The manifest, or while the data set is incomplete its progress.json, and whether it is complete."""
    # Twice: progress.json may just be replaced by the manifest.
    for name in (MANIFEST, PROGRESS, MANIFEST) if allow_incomplete else (MANIFEST,):
        try:
            manifest = read_json(folder / name)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {folder / name}: {error}; {_REMEDY.format(folder)}") from None
        found = manifest.get("format")
        if found not in READABLE:
            raise UserError(f"{folder} has format {found!r}, expected {FORMAT!r}; {_REMEDY.format(folder)}")
        return manifest, name == MANIFEST
    if (folder / PROGRESS).exists() or (folder / WORK).exists():
        raise UserError(
            f"{folder} is incomplete: it is still being prepared, or was interrupted; run the preparation again"
        )
    raise UserError(f"{folder} is not a prepared data set: it has no {MANIFEST}")
