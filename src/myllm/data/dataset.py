"""A prepared data set on disk: token shards and the manifest that vouches for them.

A folder holds `val_00000.npy`, `train_00000.npy`, ... , one-dimensional uint16 arrays in NumPy's own format, and
`manifest.json`, which is written last: a folder without one is not a data set yet. While it is being made,
`progress.json` lists the shards that are sealed, so that training can begin. docs/data_format.md describes all of it.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from myllm import paths
from myllm.config import DataConfig, RunConfig, from_dict
from myllm.data.sources.catalog import actual_source
from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.gpt2 import NAME
from myllm.data.tokenizer.load import load_tokenizer
from myllm.errors import MachineError, UserError, did_you_mean
from myllm.files import file_sha256, read_json
from myllm.paths import user_path

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
SETTINGS = "settings.json"
"""What `verify --repair` makes it from again."""
SPANS = "spans.npy"
"""Which tokens of which unit each shard holds, (spans, 4) int64: shard, unit, start, end."""
TOKENIZER = "tokenizer.json"
"""A vocabulary of one's own."""
WORK = "work"
"""What an unfinished preparation goes on from."""
FORMAT = "myllm-shards-4"
READABLE = ("myllm-shards-3", FORMAT)
"""Older data sets read the same; only what was held out was chosen in another way."""
_REMEDY = "delete {} and prepare it again"
_REPAIR = (
    "`myllm data verify {0} --repair` makes it again from the source; failing that, delete {0} and prepare it again"
)
HASHING = 8
"""Threads that hash shards."""


@dataclass(frozen=True)
class Shard:
    file: str
    split: str
    """"train" or "val"."""
    tokens: int
    documents: int
    """That begin in it."""
    sha256: str


@dataclass
class Dataset:
    """A data set: its folder, its manifest, and its two token streams. One that is still being made grows."""

    folder: Path
    manifest: dict[str, Any]
    complete: bool = True
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path, unfinished: bool = False) -> "Dataset":
        """
        Args:
            unfinished: take one that is still being made, too.

        Raises:
            UserError: not a data set, another format, or a shard missing or of the wrong size.
        """
        manifest, complete = _read_manifest(folder, unfinished)
        dataset = cls(folder, manifest, complete)
        try:
            _ = dataset.train, dataset.val, dataset.fingerprint  # maps every shard
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / MANIFEST} is damaged ({error!r}); {_REMEDY.format(folder)}") from None
        return dataset

    @classmethod
    def read(cls, folder: Path) -> "Dataset":
        """As `open`, of a data set whose shards may be damaged or missing: none is looked at yet."""
        return cls(folder, *_read_manifest(folder, unfinished=False))

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def fingerprint(self) -> str:
        """The recipe's fingerprint: what decided the bytes. Known before they are all there."""
        return self.manifest["fingerprint"]

    @property
    def end_of_text(self) -> int:
        return self.manifest["tokenizer"]["end_of_text"]

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(Shard(**shard) for shard in self.manifest["shards"])

    @cached_property
    def train(self) -> "TokenStream":
        return TokenStream(self, "train")

    @cached_property
    def val(self) -> "TokenStream":
        return TokenStream(self, "val")

    @property
    def known_train_tokens(self) -> int | None:
        """None while the data set is still being prepared."""
        return self.train.tokens if self.complete else None

    def tokenizer(self) -> Tokenizer:
        """The vocabulary that made it.

        Raises:
            UserError: it is missing, or another one now.
        """
        said = self.manifest["tokenizer"]
        own = self.folder / TOKENIZER
        tokenizer = load_tokenizer(own if said["kind"] != "tiktoken" else said["name"])
        if tokenizer.sha256 != said["sha256"]:
            raise UserError(
                f"the vocabulary {tokenizer.file} is not the one that made {self.folder}: its sha256 is "
                f"{tokenizer.sha256[:12]}..., expected {said['sha256'][:12]}...; {_REMEDY.format(self.folder)}"
            )
        return tokenizer

    def settings(self, config: DataConfig) -> DataConfig:
        """What this data set was made of, whatever `config` says of it: presets name sources of their own.

        Args:
            config: what it was asked for with; settings that change no byte are taken from here.
        """
        recorded = self.manifest["source"]
        if config.dataset is None:  # found by this very config, or by its fallback
            same = actual_source(config.source, None, recorded) == config.source
            return config if same else replace(config, source=config.fallback or recorded)
        try:
            values = read_json(self.folder / SETTINGS)
            made_with = from_dict({"data": values}, RunConfig()).data
        except (OSError, UserError):  # lost; the manifest has all but where the text was
            names = ("source", "text_column", "val_tokens", "target_tokens", "max_documents", "shard_tokens")
            said = {name: self.manifest[name] for name in names if name in self.manifest}
            made_with = from_dict({"data": said | self.manifest.get("cleaning", {})}, RunConfig()).data
        vocabulary = config.tokenizer
        if vocabulary == NAME and self.manifest["tokenizer"]["kind"] != "tiktoken":
            vocabulary = paths.relative_to_data(self.folder / TOKENIZER)
        return replace(
            made_with,
            source=actual_source(made_with.source, None, recorded),
            dataset=paths.relative_to_data(self.folder, paths.datasets_dir()),
            tokenizer=vocabulary,
            workers=config.workers,
            keep_downloads=config.keep_downloads,
            fallback=config.fallback,
        )

    def refresh(self) -> None:
        """See what was sealed meanwhile. Any thread may ask."""
        if self.complete:
            return
        with self._lock:
            manifest, complete = _read_manifest(self.folder, unfinished=True)
            if manifest.get("fingerprint") != self.fingerprint:
                raise UserError(f"{self.folder} was made anew with other settings while it was in use; start again")
            self.manifest = manifest
            self.train.extend()
            self.val.extend()
            self.complete = complete  # last: who reads it relies on the streams

    def damaged(self) -> list[str]:
        """Shards whose content is not what the manifest says, or cannot be read."""
        shards = self.shards
        with ThreadPoolExecutor(HASHING) as pool:  # hashlib lets go of the lock
            intact = list(pool.map(self.intact, shards))
        return [shard.file for shard, good in zip(shards, intact, strict=True) if not good]

    def intact(self, shard: Shard) -> bool:
        """Whether a shard's content is what the manifest says."""
        try:
            return file_sha256(self.folder / shard.file) == shard.sha256
        except OSError:
            return False


def _read_manifest(folder: Path, unfinished: bool) -> tuple[dict[str, Any], bool]:
    """The manifest, and whether it is the final one."""
    for name in (MANIFEST, PROGRESS, MANIFEST) if unfinished else (MANIFEST,):  # the last turns into the first
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
            f"{folder} is not whole yet: its preparation is under way, or was interrupted; start it again to go on"
        )
    raise UserError(f"{folder} is not a prepared data set: it has no {MANIFEST}")


class TokenStream:
    """The shards of one split, end to end, as one long array that stays on disk."""

    def __init__(self, dataset: Dataset, split: str) -> None:
        self.dataset, self._split = dataset, split
        self._arrays: tuple[np.memmap, ...] = ()
        self._intact: set[int] = set()
        self._ends = np.zeros(0, dtype=np.int64)
        self.tokens = 0
        self.extend()

    def extend(self) -> None:
        """Map the shards that the manifest has and this has not yet. Readers see them once `tokens` says so."""
        shards = [shard for shard in self.dataset.shards if shard.split == self._split]
        fresh = [_map(self.dataset.folder, shard) for shard in shards[len(self._arrays) :]]
        self._ends = np.cumsum([shard.tokens for shard in shards])
        self._arrays = (*self._arrays, *fresh)
        self.tokens = int(self._ends[-1]) if shards else 0

    @property
    def complete(self) -> bool:
        return self.dataset.complete

    def verify(self, starts: np.ndarray, count: int) -> None:
        """Make sure of the shards that hold `count` tokens from each start: hash those that were not looked at before.

        A disk that returns other bytes than were written says nothing about it, so this trusts no size or date. Every
        process does it once for each shard, before the shard's first token is used: a gigabyte takes a second or two.

        Shapes:
            starts (B,) int64

        Raises:
            MachineError: a shard's content is not what the manifest says.
        """
        if len(self._intact) == len(self._arrays):
            return
        firsts, lasts = (np.searchsorted(self._ends, each, side="right") for each in (starts, starts + count - 1))
        borders = set(zip(firsts.tolist(), lasts.tolist(), strict=True))
        wanted = sorted({shard for first, last in borders for shard in range(first, last + 1)} - self._intact)
        if not wanted:
            return
        shards = [shard for shard in self.dataset.shards if shard.split == self._split]
        with ThreadPoolExecutor(HASHING) as pool:
            intact = list(pool.map(self.dataset.intact, (shards[number] for number in wanted)))
        damaged = [shards[number].file for number, good in zip(wanted, intact, strict=True) if not good]
        if damaged:
            folder = self.dataset.folder
            raise MachineError(
                f"the content of {', '.join(damaged)} in {folder} is not what its {MANIFEST} says, and is not trained "
                f"on; {_REPAIR.format(folder)}"
            )
        self._intact.update(wanted)

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from `start`, over shard borders.

        Shapes:
            returns (count,) uint16

        Raises:
            MachineError: a shard was cut short meanwhile.
        """
        assert 0 <= start <= start + count <= self.tokens, (start, count, self.tokens)
        out = np.empty(count, dtype=np.uint16)
        ends, arrays = self._ends, self._arrays
        filled = 0
        shard = int(np.searchsorted(ends, start, side="right"))
        while filled < count:
            first = start + filled - (int(ends[shard - 1]) if shard else 0)
            _check_whole(arrays[shard])
            part = arrays[shard][first : first + count - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        return out


def _map(folder: Path, shard: Shard) -> np.memmap:
    """A shard as an array that stays on disk, (shard.tokens,) uint16."""
    path = folder / shard.file
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise MachineError(f"the shard {path} is missing or cut short ({error}); {_REPAIR.format(folder)}") from None
    if array.dtype != np.uint16 or array.shape != (shard.tokens,):
        raise MachineError(
            f"the shard {path} holds {array.dtype} {array.shape}, expected uint16 ({shard.tokens},); "
            f"{_REPAIR.format(folder)}"
        )
    return array


def _check_whole(array: np.memmap) -> None:
    """Look at a shard's size before its content: to read a map beyond the end of its file ends the process (SIGBUS),
    without a word. A file that was deleted is whole for as long as it is mapped."""
    try:
        size_bytes = os.stat(array.filename).st_size
    except OSError:
        return
    if size_bytes < array.offset + array.nbytes:
        path = Path(array.filename)
        raise MachineError(
            f"the shard {path} was cut short while it was in use: {size_bytes:,} bytes, expected "
            f"{array.offset + array.nbytes:,}; {_REPAIR.format(path.parent)}"
        )


def find_dataset(name: str, unfinished: bool = False) -> Dataset:
    """A data set by its folder, its name under temp_data/datasets, or the start of that name where only one fits."""
    return Dataset.open(find_dataset_folder(name, (MANIFEST, PROGRESS) if unfinished else (MANIFEST,)), unfinished)


def find_dataset_folder(name: str, marks: tuple[str, ...] = (MANIFEST,)) -> Path:
    """The folder that `find_dataset` opens: one that holds one of the marks.

    Raises:
        UserError: there is none, or more than one.
    """
    for folder in (user_path(name), paths.datasets_dir() / name):
        if any((folder / mark).is_file() for mark in (*marks, PROGRESS)):
            paths.warn_if_ambiguous(name, folder, paths.datasets_dir() / name)
            return folder
    known = sorted({each.parent.name for mark in marks for each in paths.datasets_dir().glob(f"[!.]*/{mark}")})
    matches = [each for each in known if each.startswith(name)]
    if len(matches) == 1:
        return paths.datasets_dir() / matches[0]
    seen = f"{len(matches)} begin so: {', '.join(matches)}" if matches else f"known: {', '.join(known) or 'none'}"
    raise UserError(f"no single prepared data set {name!r}{did_you_mean(name, known)}; {seen}")
