"""A stream reads as one array; what is damaged or missing on the disk is said."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.data.dataset import Dataset
from myllm.data.find import find_dataset
from myllm.errors import MachineError, UserError

if TYPE_CHECKING:
    from conftest import Growing

MakeDataset = Callable[..., Dataset]
MakeGrowing = Callable[[Dataset], "Growing"]


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
def test_reads_across_shards_match_slices(streams: list[tuple[np.ndarray, Dataset]], data: st.DataObject) -> None:
    tokens, dataset = data.draw(st.sampled_from(streams))
    start = data.draw(st.integers(0, 97))
    count = data.draw(st.integers(0, 97 - start))
    assert dataset.train.read(start, count).tolist() == tokens[start : start + count].tolist()


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 1_001), (1_000, 1), (3, -1)])
def test_out_of_range_read_raises(dataset: Dataset, start: int, count: int) -> None:
    with pytest.raises(AssertionError):
        dataset.train.read(start, count)


def test_read_returns_copy(dataset: Dataset) -> None:
    dataset.train.read(0, 10)[:] = 0
    assert dataset.train.read(0, 10).tolist() == list(range(10))
    assert dataset.damaged() == []


def test_shard_truncated_in_use_raises(dataset: Dataset) -> None:
    """A map of it is still there, and to read that beyond the file's end would be the end of the process."""
    stream = dataset.train
    stream.read(0, 10)
    path = dataset.folder / next(shard.file for shard in dataset.shards if shard.split == "train")
    size = path.stat().st_size
    os.truncate(path, size - 2)
    with pytest.raises(
        MachineError, match=rf"{path.name} was truncated while it was in use: {size - 2:,} bytes, expected"
    ):
        stream.read(0, 10)
    path.unlink()  # its map holds all of it, but what was cut off
    assert len(stream.read(0, 10)) == 10


def test_damaged_detects_single_byte_change(dataset: Dataset) -> None:
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


def test_ids_above_16_bits(make_dataset: MakeDataset) -> None:
    tokens = np.random.default_rng(0).integers(0, 151_669, 97)
    dataset = make_dataset(tokens, tokens[:5], shard_tokens=30)
    assert dataset.train.read(0, 97).tolist() == tokens.tolist()
    assert dataset.train.read(0, 97).dtype == np.uint32
    np.save(dataset.folder / "train_00001.npy", np.zeros(30, dtype=np.uint16))
    with pytest.raises(UserError, match=r"holds uint16 \(30,\), expected uint32 \(30,\)"):
        Dataset.open(dataset.folder)


@pytest.mark.parametrize(
    "damage", ["missing", "folder", "empty", "one token short", "header only", "longer", "wider", "other"]
)
def test_missing_or_invalid_shard_raises(dataset: Dataset, damage: str) -> None:
    path = dataset.folder / "train_00001.npy"
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "other":
        np.save(path, np.zeros(300, dtype=np.int32))
    elif damage == "longer":
        np.save(path, np.zeros(301, dtype=np.uint16))
    elif damage == "wider":
        np.save(path, np.zeros(300, dtype=np.uint32))
    elif damage != "missing":
        path.write_bytes({"empty": b"", "one token short": content[:-2], "header only": content[:60]}[damage])
    with pytest.raises(UserError, match=r"train_00001\.npy.*prepare it again"):
        Dataset.open(dataset.folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a prepared data set"),
        (b"", "cannot read"),
        (b'{"format": "myllm-sh', "cannot read"),
        (b"\xff", "cannot read"),
        (b"[]", "holds a list, expected an object"),
        (b'{"format": "myllm-shards-0"}', "format 'myllm-shards-0'"),
        (b'{"format": "myllm-shards-1"}', "format 'myllm-shards-1', expected 'myllm-shards-4'"),
        (b'{"format": "myllm-shards-3"}', "damaged"),
        (b'{"format": "myllm-shards-3", "fingerprint": "f", "shards": [{"file": "a"}]}', "damaged"),
    ],
)
def test_damaged_manifest_raises(dataset: Dataset, content: bytes | None, message: str) -> None:
    path = dataset.folder / "manifest.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Dataset.open(dataset.folder)


def test_no_damaged_byte_of_a_manifest_changes_what_is_read(dataset: Dataset) -> None:
    """One bit of each byte, one after the other: the same tokens, a shard that its hash betrays, or an error."""

    def tokens(found: Dataset) -> list[list[int]]:
        return [stream.read(0, stream.tokens).tolist() for stream in (found.train, found.val)]

    path, whole, refused = dataset.folder / "manifest.json", tokens(dataset), 0
    content = path.read_bytes()
    for place, byte in enumerate(content):
        path.write_bytes(content[:place] + bytes([byte ^ 1 << place % 7]) + content[place + 1 :])
        try:
            found = Dataset.open(dataset.folder)
            found.tokenizer()
        except UserError:
            refused += 1
            continue
        damage = content[max(place - 20, 0) : place + 20]
        assert (tokens(found), found.end_of_text) == (whole, dataset.end_of_text) or found.damaged(), damage
    assert refused > len(content) / 3


def test_fingerprint_independent_of_manifest_layout(dataset: Dataset) -> None:
    path = dataset.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    assert dataset.fingerprint == manifest["fingerprint"]
    path.write_text(json.dumps(dict(reversed(manifest.items())), indent=4))
    assert Dataset.open(dataset.folder).fingerprint == dataset.fingerprint, "layout and order of keys are not content"


def test_find_dataset(dataset: Dataset, temp_data: Path, tmp_path: Path) -> None:
    for name in ("books-1234", "books-5678", ".partial-news-1", "news-1"):
        (temp_data / "datasets" / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(dataset.folder, temp_data / "datasets" / name)
    assert find_dataset(str(dataset.folder)).folder == dataset.folder
    assert find_dataset("books-1234").name == "books-1234"
    assert find_dataset("new").name == "news-1"
    for name, message in (
        ("books", "2 prepared data sets begin with 'books'; give one name: books-1234, books-5678"),
        ("bocks-1234", "did you mean 'books-1234'"),
        (".partial", "known: books-1234, books-5678, news-1"),
        (str(tmp_path), "no prepared data set"),
    ):
        with pytest.raises(UserError, match=message):
            find_dataset(name)


def test_incomplete_dataset_requires_allow_incomplete(
    dataset: Dataset, make_growing: MakeGrowing, temp_data: Path
) -> None:
    growing = make_growing(dataset)
    (growing.folder / "work").mkdir()
    for _ in range(2):  # before and after its first shards
        with pytest.raises(UserError, match="incomplete: it is still being prepared, or was interrupted"):
            Dataset.open(growing.folder)
        growing.grow(2)
    (temp_data / "datasets").mkdir(parents=True)
    os.symlink(growing.folder, temp_data / "datasets" / "news-1")
    with pytest.raises(UserError, match="no prepared data set"):
        find_dataset("new")
    with pytest.raises(UserError, match="is incomplete"):
        find_dataset("news-1")
    assert not find_dataset("new", allow_incomplete=True).complete


def test_streams_grow_shard_by_shard(dataset: Dataset, make_growing: MakeGrowing) -> None:
    growing = make_growing(dataset)
    growing.grow()
    seen = Dataset.open(growing.folder, allow_incomplete=True)
    assert (seen.val.tokens, seen.train.tokens, seen.complete) == (100, 0, False)
    for there in (300, 600, 900, 1_000):
        growing.grow()
        assert seen.train.tokens < there, "nobody asked to look"
        seen.refresh()
        assert (seen.train.tokens, seen.train.complete) == (there, False)
        assert seen.train.read(0, there).tolist() == list(range(there))
        seen.refresh()  # nothing new is no harm
        assert seen.train.tokens == there
    growing.finish()
    seen.refresh()
    assert seen.complete
    assert seen.manifest == dataset.manifest
    assert seen.train.read(250, 100).tolist() == list(range(250, 350))


def test_refresh_jumps_to_complete_dataset(dataset: Dataset, make_growing: MakeGrowing) -> None:
    growing = make_growing(dataset)
    growing.grow(2)
    seen = Dataset.open(growing.folder, allow_incomplete=True)
    growing.finish()
    seen.refresh()
    assert seen.complete
    assert seen.train.read(0, 1_000).tolist() == list(range(1_000))
    (growing.folder / "manifest.json").unlink()
    seen.refresh()  # a whole one needs nothing more from there


def test_concurrent_reads_and_refreshes(dataset: Dataset, make_growing: MakeGrowing) -> None:
    growing = make_growing(dataset)
    growing.grow(2)
    seen = Dataset.open(growing.folder, allow_incomplete=True)
    failures: list[BaseException] = []

    def look() -> None:
        try:
            while not seen.complete:
                tokens = seen.train.tokens
                seen.refresh()
                assert seen.train.tokens >= tokens
                assert seen.train.read(tokens - 5, 5).tolist() == list(range(tokens - 5, tokens))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    while not growing.whole:
        growing.grow()
        time.sleep(0.02)
    growing.finish()
    for thread in threads:
        thread.join()
    assert failures == []


def test_refresh_rejects_changed_settings(dataset: Dataset, make_growing: MakeGrowing) -> None:
    growing = make_growing(dataset)
    growing.grow(3)
    seen = Dataset.open(growing.folder, allow_incomplete=True)
    path = growing.folder / "progress.json"
    path.write_text(path.read_text().replace("f" * 64, "e" * 64))
    with pytest.raises(UserError, match="was prepared again with other settings"):
        seen.refresh()
    path.unlink()
    with pytest.raises(UserError, match="not a prepared data set"):
        seen.refresh()


def test_verify_rejects_damaged_shard(make_dataset: MakeDataset) -> None:
    """Each shard is hashed before its first use: found are those that hold the asked-for tokens, and no others."""
    dataset = make_dataset(np.arange(1_000), np.arange(40), shard_tokens=100)
    for number, at in ((3, -1), (7, 128)):
        path = dataset.folder / f"train_{number:05d}.npy"
        content, before = bytearray(path.read_bytes()), path.stat()
        content[at] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a failing disk would
    stream = Dataset.open(dataset.folder).train
    stream.verify(np.array([0, 290, 800]), 10)
    stream.verify(np.array([410]), 289)
    for starts, count, shard in (([299], 2, "00003"), ([250], 200, "00003"), ([0, 710], 5, "00007")):
        with pytest.raises(UserError, match=rf"train_{shard}\.npy in .*verify {dataset.folder} --repair"):
            stream.verify(np.array(starts), count)
    with pytest.raises(UserError, match=r"train_00003\.npy, train_00007\.npy"):
        stream.verify(np.array([0]), 1_000)


def test_previous_format_reads_identically(dataset: Dataset) -> None:
    path = dataset.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"format": "myllm-shards-3"}))
    earlier = Dataset.open(dataset.folder)
    assert earlier.shards == dataset.shards
    assert (earlier.train.read(0, 500) == dataset.train.read(0, 500)).all()
