"""A stream reads as one array; what is damaged or missing on the disk is said."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.data.shards import Dataset, find_dataset
from myllm.errors import UserError

MakeDataset = Callable[..., Dataset]


@pytest.fixture
def dataset(make_dataset: MakeDataset) -> Dataset:
    return make_dataset(np.arange(1_000), np.arange(100) + 7, shard_tokens=300)


def test_streams(dataset: Dataset) -> None:
    assert (dataset.train.tokens, dataset.val.tokens) == (1_000, 100)
    assert [shard.file for shard in dataset.shards] == ["val_00000.npy", *(f"train_0000{i}.npy" for i in range(4))]
    assert dataset.train.read(0, 1_000).tolist() == list(range(1_000))
    assert dataset.val.read(0, 100).tolist() == list(range(7, 107))
    assert dataset.train.read(5, 3).dtype == np.uint16
    assert dataset.name == dataset.folder.name


@pytest.fixture(scope="session")
def streams(make_dataset: MakeDataset) -> list[tuple[np.ndarray, Dataset]]:
    tokens = np.random.default_rng(0).integers(0, 50_257, 97).astype(np.uint16)
    return [(tokens, make_dataset(tokens, tokens[:5], size)) for size in (1, 2, 7, 48, 96, 97, 200)]


@given(st.data())
def test_reads_over_borders_are_slices_of_the_whole(
    streams: list[tuple[np.ndarray, Dataset]], data: st.DataObject
) -> None:
    tokens, dataset = data.draw(st.sampled_from(streams))
    start = data.draw(st.integers(0, 97))
    count = data.draw(st.integers(0, 97 - start))
    assert dataset.train.read(start, count).tolist() == tokens[start : start + count].tolist()


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 1_001), (1_000, 1), (3, -1)])
def test_reads_outside_are_refused(dataset: Dataset, start: int, count: int) -> None:
    with pytest.raises(AssertionError):
        dataset.train.read(start, count)


def test_a_read_does_not_touch_the_disk(dataset: Dataset) -> None:
    dataset.train.read(0, 10)[:] = 0
    assert dataset.train.read(0, 10).tolist() == list(range(10))
    assert dataset.damaged() == []


def test_one_changed_byte_is_found(dataset: Dataset) -> None:
    path = dataset.folder / "train_00002.npy"
    content = bytearray(path.read_bytes())
    for at in (-1, 128, 5):  # the last token, the first, and the header
        content[at] ^= 1
        path.write_bytes(content)
        assert dataset.damaged() == ["train_00002.npy"]
        content[at] ^= 1
    path.write_bytes(content)
    assert dataset.damaged() == []
    path.unlink()
    assert dataset.damaged() == ["train_00002.npy"]


@pytest.mark.parametrize("damage", ["missing", "folder", "empty", "one token short", "header only", "longer", "other"])
def test_a_missing_or_short_shard_is_refused(dataset: Dataset, damage: str) -> None:
    path = dataset.folder / "train_00001.npy"
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "other":
        np.save(path, np.zeros(300, dtype=np.int32))
    elif damage == "longer":
        np.save(path, np.zeros(301, dtype=np.uint16))
    elif damage != "missing":
        path.write_bytes({"empty": b"", "one token short": content[:-2], "header only": content[:60]}[damage])
    with pytest.raises(UserError, match=r"train_00001\.npy.*prepare it again"):
        Dataset.open(dataset.folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "not a prepared data set"),
        (b"", "cannot read"),
        (b'{"format": "myllm-sh', "cannot read"),
        (b"\xff", "cannot read"),
        (b"[]", "format None"),
        (b'{"format": "myllm-shards-0"}', "format 'myllm-shards-0'"),
        (b'{"format": "myllm-shards-1"}', "damaged"),
        (b'{"format": "myllm-shards-1", "shards": [{"file": "a"}]}', "damaged"),
    ],
)
def test_a_damaged_manifest_is_refused(dataset: Dataset, content: bytes | None, said: str) -> None:
    path = dataset.folder / "manifest.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        Dataset.open(dataset.folder)


def test_the_hash_is_of_the_content(dataset: Dataset, make_dataset: MakeDataset, tmp_path: Path) -> None:
    same = make_dataset(np.arange(1_000), np.arange(100) + 7, shard_tokens=300)
    other = make_dataset(np.arange(1_000), np.arange(100) + 8, shard_tokens=300)
    assert dataset.hash == same.hash != other.hash
    manifest = json.loads((same.folder / "manifest.json").read_text())
    (same.folder / "manifest.json").write_text(json.dumps(dict(reversed(manifest.items())), indent=4))
    assert Dataset.open(same.folder).hash == dataset.hash, "layout and order of keys are not content"


def test_finding_a_data_set(dataset: Dataset, temp_data: Path, tmp_path: Path) -> None:
    for name in ("books-1234", "books-5678", ".partial-news-1", "news-1"):
        (temp_data / "datasets" / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(dataset.folder, temp_data / "datasets" / name)
    assert find_dataset(str(dataset.folder)).folder == dataset.folder
    assert find_dataset("books-1234").name == "books-1234"
    assert find_dataset("new").name == "news-1"
    for name, said in (
        ("books", "2 begin so: books-1234, books-5678"),
        ("bocks-1234", "did you mean 'books-1234'"),
        (".partial", "known: books-1234, books-5678, news-1"),
        (str(tmp_path), "no single prepared data set"),
    ):
        with pytest.raises(UserError, match=said):
            find_dataset(name)
