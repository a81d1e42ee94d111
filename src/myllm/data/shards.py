"""A prepared data set on disk: token shards and the manifest that vouches for them.

A folder holds `val_00000.npy`, `train_00000.npy`, ... , one-dimensional uint16 arrays in NumPy's own format, and
`manifest.json`, which is written last: a folder without one is not a data set. docs/data_format.md describes both.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .. import paths
from ..errors import UserError, nearest
from ..files import file_sha256

MANIFEST = "manifest.json"
FORMAT = "myllm-shards-1"
_REMEDY = "delete {} and prepare it again"


@dataclass(frozen=True)
class Shard:
    file: str
    split: str
    """"train" or "val"."""
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Dataset:
    """A whole data set: its folder, its manifest, and its two token streams."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Dataset":
        """
        Raises:
            UserError: not a data set, another format, or a shard missing or of the wrong size.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{folder} is not a prepared data set: it has no {MANIFEST}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {folder / MANIFEST}: {error}; {_REMEDY.format(folder)}") from None
        found = manifest.get("format") if isinstance(manifest, dict) else None
        if found != FORMAT:
            raise UserError(f"{folder} has format {found!r}, expected {FORMAT!r}; {_REMEDY.format(folder)}")
        dataset = cls(folder, manifest)
        try:
            _ = dataset.train, dataset.val  # maps every shard
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / MANIFEST} is damaged ({error!r}); {_REMEDY.format(folder)}") from None
        return dataset

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def hash(self) -> str:
        """sha256 of what the manifest says, every shard's own hash included."""
        return manifest_hash(self.manifest)

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(Shard(**shard) for shard in self.manifest["shards"])

    @cached_property
    def train(self) -> "TokenStream":
        return TokenStream(self, "train")

    @cached_property
    def val(self) -> "TokenStream":
        return TokenStream(self, "val")

    def damaged(self) -> list[str]:
        """Shards whose content is not what the manifest says, or cannot be read."""
        return [shard.file for shard in self.shards if not self._intact(shard)]

    def _intact(self, shard: Shard) -> bool:
        try:
            return file_sha256(self.folder / shard.file) == shard.sha256
        except OSError:
            return False


class TokenStream:
    """The shards of one split, end to end, as one long array that stays on disk."""

    def __init__(self, dataset: Dataset, split: str) -> None:
        shards = [shard for shard in dataset.shards if shard.split == split]
        self._arrays = [_map(dataset.folder, shard) for shard in shards]
        self._ends = np.cumsum([shard.tokens for shard in shards])
        self.tokens = int(self._ends[-1]) if shards else 0

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from `start`, over shard borders.

        Shapes:
            returns (count,) uint16
        """
        assert 0 <= start <= start + count <= self.tokens, (start, count, self.tokens)
        out = np.empty(count, dtype=np.uint16)
        filled = 0
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while filled < count:
            first = start + filled - (int(self._ends[shard - 1]) if shard else 0)
            part = self._arrays[shard][first : first + count - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        return out


def _map(folder: Path, shard: Shard) -> np.ndarray:
    """A shard as an array that stays on disk, (shard.tokens,) uint16."""
    path = folder / shard.file
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"the shard {path} is missing or cut short ({error}); {_REMEDY.format(folder)}") from None
    if array.dtype != np.uint16 or array.shape != (shard.tokens,):
        raise UserError(
            f"the shard {path} holds {array.dtype} {array.shape}, expected uint16 ({shard.tokens},); "
            f"{_REMEDY.format(folder)}"
        )
    return array


def find_dataset(name: str) -> Dataset:
    """A data set by its folder, its name under temp_data/datasets, or the start of that name where only one fits."""
    for folder in (Path(name).expanduser(), paths.datasets() / name):
        if (folder / MANIFEST).is_file():
            return Dataset.open(folder)
    known = sorted(folder.parent.name for folder in paths.datasets().glob(f"[!.]*/{MANIFEST}"))
    matches = [each for each in known if each.startswith(name)]
    if len(matches) == 1:
        return Dataset.open(paths.datasets() / matches[0])
    seen = f"{len(matches)} begin so: {', '.join(matches)}" if matches else f"known: {', '.join(known) or 'none'}"
    raise UserError(f"no single prepared data set {name!r}{nearest(name, known)}; {seen}")


def manifest_hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
