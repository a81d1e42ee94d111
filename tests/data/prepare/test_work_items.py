"""Files make items of work, each file and part in exactly one; a worker makes tokens of them, and an index."""

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.config import DataConfig
from myllm.data.prepare import work_items
from myllm.data.prepare.work_items import (
    PART_BYTES,
    SMALL_BYTES,
    WorkItem,
    is_tokenized,
    load_item_index,
    make_work_items,
    order_files,
    tokenize_item,
    tokens_path,
)
from myllm.data.sources.source import Source, SourceFile, find_source
from myllm.data.tokenizer.gpt2 import GPT2Tokenizer
from myllm.data.tokenizer.load import load_tokenizer
from myllm.errors import UserError


def file(name: str, size_bytes: int = 1, where: str = "/x") -> SourceFile:
    return SourceFile(name, where, "whole", size_bytes, name)


def shape(items: list[WorkItem]) -> list[list[tuple[str, int, int]]]:
    return [[(piece.file.name, piece.part, piece.num_parts) for piece in item] for item in items]


# -- which files together ---------------------------------------------------------------------------------------------

SIZES = st.sampled_from([0, 1, 1_000, 900_000, SMALL_BYTES, 10 * SMALL_BYTES, PART_BYTES, 4 * PART_BYTES, 10**12])


@given(
    st.dictionaries(st.text(min_size=1, max_size=5), st.tuples(SIZES, st.sampled_from([".txt", ".parquet", ".gz"]))),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_work_items_partition_files_and_parts(
    named: dict[str, tuple[int, str]], shuffle: bool, chance: random.Random
) -> None:
    files = [file(f"{name}x{suffix}", min(size, 50 * PART_BYTES)) for name, (size, suffix) in named.items()]
    items = make_work_items(files, shuffle, 3)
    pieces = [piece for item in items for piece in item]
    for source_file in files:
        mine = [piece for piece in pieces if piece.file == source_file]
        parts = len(mine)
        assert sorted((piece.part, piece.num_parts) for piece in mine) == [(part, parts) for part in range(parts)]
        assert (parts > 1) == (source_file.name.endswith(".parquet") and source_file.size_bytes > 1.5 * PART_BYTES)
        assert all(piece.size_bytes <= 1.5 * PART_BYTES for piece in mine if parts > 1)
    assert len(pieces) == sum(len({piece for piece in pieces if piece.file == source_file}) for source_file in files)
    assert all(items)
    shuffled = list(files)
    chance.shuffle(shuffled)
    assert shape(make_work_items(shuffled, shuffle, 3)) == shape(items)


def test_unshuffled_items_sorted_by_name() -> None:
    files = [file("b.parquet", 3 * PART_BYTES), file("c"), file("a/z"), file("a")]
    expected = [[("a", 0, 1), ("a/z", 0, 1)], [("b.parquet", part, 3) for part in range(3)], [("c", 0, 1)]]
    assert shape(make_work_items(files, False, 0)) == [expected[0], *([part] for part in expected[1]), expected[2]]


def test_order_depends_only_on_seed() -> None:
    files = [file(f"{number}.parquet", 2 * PART_BYTES) for number in range(20)]
    orders = [tuple(source_file.name for source_file in order_files(files, True, seed)) for seed in range(5)]
    assert len(set(orders)) == 5
    assert all(set(order) == {source_file.name for source_file in files} for order in orders)
    # Where a file lies, and what is in it, is no matter.
    moved = [SourceFile(source_file.name, "/elsewhere", "jsonl", 2 * PART_BYTES, "digest") for source_file in files]
    assert shape(make_work_items(moved, True, 1)) == shape(make_work_items(files, True, 1))
    numbers = [piece.part for item in make_work_items([file("a.jsonl", 40 * PART_BYTES)], True, 0) for piece in item]
    assert sorted(numbers) == list(range(40)) != numbers, "parts are shuffled too"


def test_small_files_grouped_up_to_limit() -> None:
    assert shape(make_work_items([file(f"{i}", SMALL_BYTES // 4) for i in range(8)], False, 0)) == [
        [(f"{i}", 0, 1) for i in range(4)], [(f"{i}", 0, 1) for i in range(4, 8)]
    ]  # fmt: skip
    items = make_work_items([file(f"{i}", i % 2) for i in range(20_000)], True, 0)
    assert sum(map(len, items)) == 20_000
    assert max(map(len, items)) <= 1_000


def test_files_of_unknown_size_not_grouped() -> None:
    """A server that gives no size is not one whose thousand files are all fetched for the first item."""
    assert len(make_work_items([file(f"{i}.json.gz", 0, f"https://x/{i}") for i in range(10)], True, 0)) == 10


# -- what a worker leaves ---------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Source:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("One text.")
    (folder / "b.txt").write_text("   ")
    (folder / "c.jsonl").write_text('{"text": "two"}\nbroken\n{"text": "three <|endoftext|> \\ud83d"}\n{"text": "two"}')
    return find_source(f"files:{folder}")


def tokenize(source: Source, folder: Path, **settings: object) -> None:
    (item,) = make_work_items(source.files, False, 0)
    paths = {source_file.name: Path(source_file.location) for source_file in source.files}
    tokenize_item(item, paths, source, DataConfig(**settings), tokens_path(folder, 0), folder / "stop")


def test_item_has_concatenated_documents_and_index(source: Source, tmp_path: Path) -> None:
    tokenize(source, tmp_path)
    index, tokenizer = load_item_index(tmp_path, 0), load_tokenizer()
    tokens = np.fromfile(tokens_path(tmp_path, 0), dtype="<u2")
    texts = ["One text.", "two", "three <|endoftext|> \ufffd", "two"]
    documents = np.split(tokens, np.cumsum(index.lengths)[:-1])
    assert [int(document[0]) for document in documents] == [tokenizer.end_of_text] * 4
    assert [tokenizer.decode(document[1:]) for document in documents] == texts
    assert all(tokenizer.end_of_text not in document[1:] for document in documents)
    digests = [hashlib.sha256(document.tobytes()).digest() for document in documents]
    assert index.hashes.tolist() == [int.from_bytes(digest[:8], "little") for digest in digests]
    assert (index.lengths.dtype, index.hashes.dtype) == (np.int64, np.uint64)
    assert {skip["reason"]: skip["place"] for skip in index.skips.places} == {
        "empty": "b.txt, document 1",
        "invalid_json": "c.jsonl, line 2",
        "lone_surrogates_replaced": "c.jsonl, line 3",
        "end_of_text_spelled_out": "c.jsonl, document 2",
    }
    assert set(index.skips.counts.values()) == {1}


def test_cleaning_follows_settings(source: Source, tmp_path: Path) -> None:
    tokenize(source, tmp_path, min_chars=5)
    assert len(load_item_index(tmp_path, 0).lengths) == 2
    assert load_item_index(tmp_path, 0).skips.counts["too_short"] == 2


def test_tokens_independent_of_batch_size(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize(source, tmp_path)
    whole = tokens_path(tmp_path, 0).read_bytes()
    monkeypatch.setattr(work_items, "BATCH_CHARS", 1)
    tokenize(source, tmp_path)
    assert tokens_path(tmp_path, 0).read_bytes() == whole


def test_untokenizable_text_skipped_and_logged(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken's panics are no Exception."""

    class PanicException(BaseException):
        pass

    real = GPT2Tokenizer.encode_documents

    def encode_documents(self: GPT2Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
        if any(text.startswith("three") for text in texts):
            raise PanicException("stack overflow")
        return real(self, texts)

    monkeypatch.setattr(GPT2Tokenizer, "encode_documents", encode_documents)
    tokenize(source, tmp_path)
    found = load_item_index(tmp_path, 0)
    assert len(found.lengths) == 3
    assert found.skips.counts["untokenizable"] == 1
    assert found.skips.places[-1]["place"] == "c.jsonl, a text of 21 characters"
    assert "stack overflow" in found.skips.places[-1]["detail"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(28, "No space left on device")])
def test_system_error_aborts_item(
    error: BaseException, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode_documents(*_: object) -> list[np.ndarray]:
        raise error

    monkeypatch.setattr(GPT2Tokenizer, "encode_documents", encode_documents)
    with pytest.raises(type(error)):
        tokenize(source, tmp_path)
    assert not is_tokenized(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"], "nothing is left behind"


def test_missing_file_raises(source: Source, tmp_path: Path) -> None:
    (tmp_path / "texts" / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt no longer exists"):
        tokenize(source, tmp_path)
    assert not is_tokenized(tmp_path, 0)


def test_stop_file_interrupts_item(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text('{"text": "a"}\n' * 3_000)
    (tmp_path / "stop").touch()
    with pytest.raises(InterruptedError):
        tokenize(find_source(f"files:{tmp_path / 'texts'}"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stop", "texts"]


def test_file_parts_yield_documents_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_items, "PART_BYTES", 1_000)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text("".join(f'{{"text": "number {i}"}}\n' for i in range(300)))
    source = find_source(f"files:{tmp_path / 'texts'}")
    items = make_work_items(source.files, True, 0)
    assert len(items) == round(source.size_bytes / 1_000)
    hashes = []
    for number, item in enumerate(items):
        paths = {"a.jsonl": tmp_path / "texts" / "a.jsonl"}
        tokenize_item(item, paths, source, DataConfig(), tokens_path(tmp_path, number), tmp_path / "stop")
        hashes += load_item_index(tmp_path, number).hashes.tolist()
    assert len(hashes) == len(set(hashes)) == 300
