"""The shards of one split as one long array of tokens on disk. A damaged shard is found before its first use."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from myllm.data.tokenizer.base import token_dtype
from myllm.errors import MachineError
from myllm.files import file_sha256

HASH_THREADS = 8
_REMEDY = "run `myllm data verify {0} --repair` to rebuild it from the source, or delete {0} and prepare it again"


@dataclass(frozen=True)
class Shard:
    """One file of tokens, as the manifest describes it."""

    file: str
    split: str
    """"train" or "val"."""
    tokens: int
    documents: int
    """That begin in it."""
    sha256: str

    def __post_init__(self) -> None:
        # Without this, a damaged byte in `split` would leave the shard out of both streams.
        if self.split not in ("train", "val") or not str(self.file).startswith(f"{self.split}_"):
            raise TypeError(f"{self.file} is not a shard of the split {self.split!r}")


def find_damaged(folder: Path, shards: list[Shard]) -> list[str]:
    """Files whose content does not have the manifest's hash, or cannot be read."""

    def is_intact(shard: Shard) -> bool:
        try:
            return file_sha256(folder / shard.file) == shard.sha256
        except OSError:
            return False

    with ThreadPoolExecutor(HASH_THREADS) as pool:  # hashlib releases the GIL
        return [shard.file for shard, intact in zip(shards, pool.map(is_intact, shards), strict=True) if not intact]


class TokenStream:
    """All tokens of a split, in order. The stream of a data set that is still being prepared grows."""

    def __init__(self, dataset: Any, split: str) -> None:
        """
        Args:
            dataset: a Dataset (dataset.py imports this module).
        """
        self.dataset, self._split = dataset, split
        self.dtype = token_dtype(dataset.manifest["tokenizer"]["vocab_size"])
        self._arrays: tuple[np.memmap, ...] = ()
        self._verified: set[int] = set()
        """Shards, by their index in `_arrays`."""
        self._ends = np.zeros(0, dtype=np.int64)
        self.tokens = 0
        self.extend()

    @property
    def complete(self) -> bool:
        return self.dataset.complete

    def extend(self) -> None:
        """Map the shards that were listed since the last call. `tokens` is set last: other threads read up to it."""
        shards = self._shards()
        new = [_map(self.dataset.folder, shard, self.dtype) for shard in shards[len(self._arrays) :]]
        self._ends = np.cumsum([shard.tokens for shard in shards])
        self._arrays = (*self._arrays, *new)
        self.tokens = int(self._ends[-1]) if shards else 0

    def verify(self, starts: np.ndarray, count: int) -> None:
        """Hash the shards that hold `count` tokens from each start, unless this process has hashed them before.

        A disk that returns other bytes than were written changes neither size nor date, so those are not trusted. A
        gigabyte takes a second or two.

        Shapes:
            starts (B,) int64

        Raises:
            MachineError: a shard is damaged.
        """
        if len(self._verified) == len(self._arrays):
            return
        first, last = (np.searchsorted(self._ends, tokens, side="right") for tokens in (starts, starts + count - 1))
        ranges = set(zip(first.tolist(), last.tolist(), strict=True))
        unverified = sorted({shard for a, b in ranges for shard in range(a, b + 1)} - self._verified)
        if not unverified:
            return
        shards, folder = self._shards(), self.dataset.folder
        if damaged := find_damaged(folder, [shards[number] for number in unverified]):
            raise MachineError(
                f"{', '.join(damaged)} in {folder} does not match the manifest, so training on it is refused; "
                f"{_REMEDY.format(folder)}"
            )
        self._verified.update(unverified)

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from `start`, across shards.

        Shapes:
            returns (count,) of `dtype`

        Raises:
            MachineError: a shard was truncated after it was mapped.
        """
        assert 0 <= start <= start + count <= self.tokens, (start, count, self.tokens)
        out = np.empty(count, dtype=self.dtype)
        ends, arrays = self._ends, self._arrays
        filled = 0
        shard = int(np.searchsorted(ends, start, side="right"))
        while filled < count:
            first = start + filled - (int(ends[shard - 1]) if shard else 0)
            _check_size(arrays[shard])
            part = arrays[shard][first : first + count - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        return out

    def _shards(self) -> list[Shard]:
        return [shard for shard in self.dataset.shards if shard.split == self._split]


def _map(folder: Path, shard: Shard, dtype: np.dtype[Any]) -> np.memmap:
    """A shard as a memory map, (shard.tokens,)."""
    path = folder / shard.file
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise MachineError(f"the shard {path} is missing or truncated ({error}); {_REMEDY.format(folder)}") from None
    if array.dtype != dtype or array.shape != (shard.tokens,):
        raise MachineError(
            f"the shard {path} holds {array.dtype} {array.shape}, expected {dtype} ({shard.tokens},); "
            f"{_REMEDY.format(folder)}"
        )
    return array


def _check_size(array: np.memmap) -> None:
    """Reading a map beyond the end of its file kills the process with SIGBUS, without a message. A deleted file stays
    whole while it is mapped."""
    assert array.filename is not None  # NumPy keeps it unless the map was made of an open file
    try:
        size_bytes = os.stat(array.filename).st_size
    except OSError:
        return
    if size_bytes < array.offset + array.nbytes:
        path = Path(array.filename)
        raise MachineError(
            f"the shard {path} was truncated while it was in use: {size_bytes:,} bytes, expected "
            f"{array.offset + array.nbytes:,}; {_REMEDY.format(path.parent)}"
        )
