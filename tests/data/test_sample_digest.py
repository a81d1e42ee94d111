"""A receipt says what was trained on: the same however the work is shared out, another after any fault."""

import hashlib
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from myllm.data import sampler
from myllm.data.dataloader import BatchLoader
from myllm.data.dataset import Dataset
from myllm.data.sample_digest import LANES, SampleDigest, hash_samples
from myllm.data.sampler import DataPosition
from myllm.planning.batch import BatchPlan

T = 8
SEQUENCES = 8
FORMAT = Path(__file__).resolve().parents[2] / "docs/data_format.md"


@pytest.fixture(scope="session")
def dataset(make_dataset: Callable[..., Dataset]) -> Dataset:
    """50 sequences of 8 in five shards, each token its own place: a bit more than six steps an epoch."""
    return make_dataset(np.arange(50 * T + 3), np.arange(40), shard_tokens=90)


def delivered(dataset: Dataset, first: int, steps: int, world_size: int = 1, micro: int = 2) -> np.ndarray:
    """What the loaders of all ranks hand over in some steps, added up."""
    plan = BatchPlan(SEQUENCES * T, T, micro, world_size)
    start = DataPosition(0, 0, 3, dataset.fingerprint).advance(first * SEQUENCES, 50)
    sums = np.zeros(LANES, dtype=np.int64)
    for rank in range(world_size):
        with BatchLoader(dataset.order(plan), plan, start, rank, torch.device("cpu")) as loader:
            for _ in range(steps * plan.grad_accum_steps):
                loader.next_batch()
            sums += loader.digest_sums
    return sums


def test_digest_independent_of_ranks_and_restarts(dataset: Dataset) -> None:
    """Ten steps, into the second epoch: on 1, 2, 4 and 8 ranks, and interrupted anywhere with the ranks changed."""
    whole = SampleDigest().add(delivered(dataset, 0, 10))
    for world_size, micro in ((1, 1), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)):
        assert SampleDigest().add(delivered(dataset, 0, 10, world_size, micro)) == whole
    for stop in range(1, 10):
        first = SampleDigest().add(delivered(dataset, 0, stop, 2, 2))
        assert first.add(delivered(dataset, stop, 10 - stop, 4, 1)) == whole


@pytest.fixture
def samples(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places of the first three steps; sequences and rows of four."""
    sequences = sampler.step_sequences(DataPosition(0, 0, 3, ""), 4 * SEQUENCES, 50, 50)
    rows = np.stack([dataset.train.read(int(i) * T, T + 1) for i in sequences])
    return np.arange(3 * SEQUENCES), sequences, rows


def test_hash_samples_matches_loader(dataset: Dataset, samples: tuple[np.ndarray, ...]) -> None:
    places, sequences, rows = samples
    assert (hash_samples(places, sequences[places], rows[places]) == delivered(dataset, 0, 3)).all()


def test_data_order_faults_change_digest(samples: tuple[np.ndarray, ...]) -> None:
    places, sequences, rows = samples
    honest = SampleDigest().add(hash_samples(places, sequences[places], rows[places]))

    def after(picked: np.ndarray, at: np.ndarray = places) -> SampleDigest:
        return SampleDigest().add(hash_samples(at, sequences[picked], rows[picked]))

    assert after(places) == honest
    found = [honest]
    for i in range(len(places)):
        without = np.delete(places, i)
        found.append(after(without, without))  # skipped, and its place left empty
        found.append(after(np.append(without, 24), places))  # skipped, and the ones behind it moved up
        found.append(after(np.insert(places, i, i), np.append(places, 24)))  # trained on twice
        swapped = places.copy()
        other = (i + SEQUENCES) % len(places)
        swapped[[i, other]] = swapped[[other, i]]
        found.append(after(swapped)) if i < 2 * SEQUENCES else None  # with the same place of another step
    assert len({receipt.digest for receipt in found[1:]}) == len(found) - 1, "two faults look alike"
    assert honest not in found[1:]


def test_changed_token_changes_digest(samples: tuple[np.ndarray, ...]) -> None:
    places, sequences, rows = samples[0], samples[1][samples[0]], samples[2][samples[0]]
    for i, j in ((0, 0), (5, T), (23, 3)):  # column T is a target only
        changed = rows.copy()
        changed[i, j] ^= 1
        assert (hash_samples(places, sequences, changed) != hash_samples(places, sequences, rows)).any()


@pytest.mark.parametrize(("dtype", "code", "last"), [("uint16", "H", 65_535), ("uint32", "I", 151_668)])
def test_digest_matches_manual_hash(dtype: str, code: str, last: int) -> None:
    row = struct.pack(f"<2q3{code}", 7, 41, 1, 2, last)
    by_hand = hashlib.blake2b(row, digest_size=16).hexdigest()
    sums = hash_samples(np.array([7]), np.array([41]), np.array([[1, 2, last]], dtype=dtype))
    assert SampleDigest().add(sums).digest == by_hand
    twice = SampleDigest().add(sums).add(sums).digest
    lanes = [2 * lane % 2**32 for lane in struct.unpack("<4I", bytes.fromhex(by_hand))]
    assert twice == struct.pack("<4I", *lanes).hex()


@pytest.mark.parametrize("offset", [0, 65_500], ids=["uint16", "uint32"])
def test_documented_program_matches_digest(offset: int, make_dataset: Callable[..., Dataset], tmp_path: Path) -> None:
    """docs/data_format.md recomputes a receipt in a few lines that know nothing of myllm."""
    dataset = make_dataset(np.arange(50 * T + 3) + offset, np.arange(40), shard_tokens=90)
    chapter = FORMAT.read_text(encoding="utf-8").partition("## Receipts")[2]
    program = re.search(r"```python\n(.*?)```", chapter, re.DOTALL)[1]
    (tmp_path / "receipt.py").write_text(program, encoding="utf-8")
    for steps in (1, 5, 10):
        words = [str(dataset.folder), "3", str(T), str(SEQUENCES * T), str(steps)]
        command = [sys.executable, str(tmp_path / "receipt.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
        assert done.stdout.strip() == SampleDigest().add(delivered(dataset, 0, steps)).digest
