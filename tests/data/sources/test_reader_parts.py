"""Text columns of parquet and arrow files; files read in parts, each row exactly once."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc

from myllm.data.sources import readers
from myllm.data.sources.readers import READER_BY_SUFFIX, ReadTask, SkipLog, is_splittable, read_file, suffix_of

WORDS = ["", "a", "déjà vu ", "日本語 🙂\n", "x" * 500, "\x00", "<|endoftext|>", "\u2028"]


def read(path: Path, skips: SkipLog | None = None, parts: int = 1, column: str = "text") -> list[str]:
    """The rows of all parts in order; without `skips`, skips are not allowed."""
    found = SkipLog() if skips is None else skips
    rows: list[str] = []
    for part in range(parts):
        rows += read_file(READER_BY_SUFFIX[suffix_of(path)], ReadTask(path, path.name, column, part, parts), found)
    assert skips is not None or not found.counts, found
    return rows


def write(path: Path, table: pa.Table, rows: int = 100) -> Path:
    """Write a parquet or arrow file, by its suffix, with `rows` per group or batch."""
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
    else:
        with pa.OSFile(str(path), "wb") as file, ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, rows)
    return path


BOTH = pytest.mark.parametrize("suffix", [".parquet", ".arrow"])


# -- parts ------------------------------------------------------------------------------------------------------------


def test_compressed_files_not_splittable() -> None:
    assert {suffix for suffix in READER_BY_SUFFIX if is_splittable(f"a{suffix}")} == {".parquet", ".arrow", ".jsonl"}


@BOTH
@pytest.mark.parametrize("rows", [1, 7, 1_000], ids=["a row a group", "several", "one group"])
@pytest.mark.parametrize("parts", [1, 2, 3, 13, 200])
def test_columnar_parts_cover_all_rows(suffix: str, rows: int, parts: int, tmp_path: Path) -> None:
    rng = random.Random(parts)
    texts = [f"{i} " + rng.choice(WORDS) * rng.randint(0, 9) for i in range(120)]
    path = write(tmp_path / f"a{suffix}", pa.table({"id": range(120), "text": texts}), rows)
    assert read(path, parts=parts) == texts


@given(
    lines=st.lists(st.tuples(st.sampled_from(WORDS), st.integers(0, 5), st.sampled_from(["\n", "\r\n", "\n\r\n\n"]))),
    broken=st.sets(st.integers(0, 12)),
    ends=st.booleans(),
    parts=st.integers(2, 40),
)
def test_jsonl_parts_cover_all_lines(
    lines: list[tuple[str, int, str]],
    broken: set[int],
    ends: bool,
    parts: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Lines of any length with any line end, with empty and invalid lines between."""
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    content, expected = "", []
    for number, (word, times, end) in enumerate(lines):
        line = json.dumps({"text": f"{number}{word * times}"}, ensure_ascii=False)
        content += ("{broken é" if number in broken else line) + end
        expected += [] if number in broken else [f"{number}{word * times}"]
    path.write_bytes((content if ends else content.rstrip("\r\n")).encode())
    whole, split = SkipLog(), SkipLog()
    assert read(path, whole) == read(path, split, parts) == expected
    assert split.counts == whole.counts
    assert whole.counts.total() == whole.counts["invalid_json"] == len(broken & set(range(len(lines))))


@given(
    lengths=st.lists(st.sampled_from([10, 40, 49, 50, 51, 99, 100, 101, 130, 500])),
    parts=st.integers(1, 30),
    ends=st.booleans(),
)
def test_overlong_line_skipped_once_across_parts(
    lengths: list[int], parts: int, ends: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "long.jsonl"
    texts = [f"{number}".ljust(length - 13, "x") for number, length in enumerate(lengths)]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    path.write_bytes(b"".join(lines) if ends else b"".join(lines)[:-1])
    skips = SkipLog()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "MAX_LINE_BYTES", 100)
        rows = read(path, skips, parts)
    sizes = [len(line) for line in lines[:-1]] + [len(line) - (not ends) for line in lines[-1:]]
    last = len(lines) - 1
    long = [i for i, size in enumerate(sizes) if size > 100 or (size == 100 and i == last and not ends)]
    assert rows == [text for i, text in enumerate(texts) if i not in long]
    assert skips.counts == ({"line_too_long": len(long)} if long else {})


def test_line_numbers_relative_to_part_start(tmp_path: Path) -> None:
    path, skips = tmp_path / "a.jsonl", SkipLog()
    path.write_bytes(b'{"text": "a"}\n' * 10 + b"broken\n")
    assert len(read(path, skips, parts=2)) == 10
    place = skips.places[0]["place"]
    assert place.startswith("a.jsonl, line ")
    line, _, byte = place.removeprefix("a.jsonl, line ").partition(" after byte ")
    lines = path.read_bytes()[int(byte) :].split(b"\n")  # the first is the end of another part's line
    assert lines[int(line)] == b"broken"


@BOTH
def test_missing_column_logged_once(suffix: str, tmp_path: Path) -> None:
    path, skips = write(tmp_path / f"a{suffix}", pa.table({"body": ["a"] * 50}), 5), SkipLog()
    assert read(path, skips, parts=4) == []
    assert dict(skips.counts) == {"no_text_column": 1}
    assert skips.places[0]["detail"] == "no column 'text'; the file has ['body']"
    assert read(path, column="body", parts=4) == ["a"] * 50


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 4])
def test_truncated_arrow_yields_complete_batches(parts: int, tmp_path: Path) -> None:
    texts = [f"{i} " * 40 for i in range(60)]
    path, skips = write(tmp_path / "a.arrow", pa.table({"text": texts}), 3), SkipLog()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    rows = read(path, skips, parts)
    assert rows == texts[: len(rows)]
    assert len(rows) in range(24, 31, 3)
    assert dict(skips.counts) == {"file_cut_short": 1}
    assert skips.places[0]["place"].startswith("a.arrow")
    assert f"record batch {len(rows) // 3}" in skips.places[0]["detail"]


def test_truncated_parquet_logged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.table({"text": [f"{i} " * 40 for i in range(60)]}), 3)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], whole[:-20] + b"\xff" * 20):
        skips = SkipLog()
        path.write_bytes(damaged)
        assert read(path, skips) == []
        assert dict(skips.counts) == {"unreadable_file": 1}
        assert skips.places[0]["place"] == "a.parquet"


@pytest.mark.parametrize("parts", [1, 3])
def test_skips_only_damaged_row_group(parts: int, tmp_path: Path) -> None:
    texts = [f"{i} " * 40 for i in range(60)]
    path, skips = write(tmp_path / "a.parquet", pa.table({"text": texts}), 10), SkipLog()
    chunk = pq.ParquetFile(path).metadata.row_group(2).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    assert read(path, skips, parts) == texts[:20] + texts[30:]
    assert dict(skips.counts) == {"damaged_row_group": 1}
    assert skips.places[0]["place"] == "a.parquet, row group 2"


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_skips_arrow_batch_with_invalid_offsets(kind: pa.DataType, tmp_path: Path) -> None:
    """Arrow alone would read foreign memory and crash the process."""
    dictionary = pa.types.is_dictionary(kind)
    texts = [f"text {i % 5 if dictionary else i}" for i in range(60)]
    column = pa.chunked_array([pa.array(texts).dictionary_encode() if dictionary else pa.array(texts, kind)])
    path, skips = write(tmp_path / "a.arrow", pa.table({"text": column}), 20), SkipLog()
    wide = 8 if pa.types.is_large_string(kind) else 4
    second = texts[20:40]
    marks = [texts.index(text) for text in second] if dictionary else [sum(map(len, second[:i])) for i in range(21)]
    # The offsets of a batch begin at 0; those of a dictionary's indices are the same in every batch.
    numbers = b"".join(mark.to_bytes(wide, "little") for mark in marks)
    content = path.read_bytes()
    at = content.index(numbers, content.index(numbers) + 1) if dictionary else content.index(numbers)
    wild = bytes([255] * (wide - 1) + [127])
    path.write_bytes(content[: at + 3 * wide] + wild + content[at + 4 * wide :])
    assert read(path, skips) == texts[:20] + texts[40:]
    assert dict(skips.counts) == {"damaged_record_batch": 1}
    assert skips.places[0]["place"] == "a.arrow, record batch 1"


@BOTH
@pytest.mark.parametrize("seed", range(20))
def test_random_damage_never_raises(suffix: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    texts = ["déjà vu " * rng.randint(0, 30) for _ in range(300)]
    path = write(tmp_path / f"a{suffix}", pa.table({"text": texts}), 50)
    whole = path.read_bytes()
    for _ in range(10):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 3, 50])):
            within = rng.choice([len(content), min(1_000, len(content))])
            content[rng.choice([-1, 1]) * rng.randrange(within)] = rng.randrange(256)
        path.write_bytes(content)
        "".join(read(path, SkipLog()))


# -- columns ----------------------------------------------------------------------------------------------------------

TEXTS = ["a", None, "", "été 🙂", "a"] * 120


@BOTH
@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS), pa.array(TEXTS, pa.large_string()), pa.array(TEXTS).dictionary_encode(),
        pa.array(TEXTS, pa.large_string()).dictionary_encode(), pa.array(TEXTS, pa.string_view()),
    ],
    ids=lambda column: str(column.type).replace(" ", ""),
)  # fmt: skip
def test_all_string_types(suffix: str, column: pa.Array, tmp_path: Path) -> None:
    path = write(tmp_path / f"a{suffix}", pa.table({"text": column}), 1_000)
    assert read(path) == [text or "" for text in TEXTS]


@BOTH
def test_null_column_yields_empty_strings(suffix: str, tmp_path: Path) -> None:
    assert read(write(tmp_path / f"a{suffix}", pa.table({"text": pa.nulls(3)}))) == ["", "", ""]
    assert read(write(tmp_path / f"b{suffix}", pa.table({"text": pa.array([], pa.string())}))) == []


@BOTH
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"text": [1, 2]}), "is int64, not text"),
        (pa.table({"text": [b"a"]}), "is binary, not text"),
        (pa.table({"text": [{"body": "a"}]}), "is nested; choose one of text.body"),
        (pa.table([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), "several columns 'text'"),
    ],
    ids=["numbers", "bytes", "nested", "twice"],
)
def test_non_text_column_logged(suffix: str, table: pa.Table, message: str, tmp_path: Path) -> None:
    skips = SkipLog()
    assert read(write(tmp_path / f"a{suffix}", table), skips) == []
    assert dict(skips.counts) == {"no_text_column": 1}
    assert skips.places[0]["place"] == f"a{suffix}"
    assert message in skips.places[0]["detail"]


@BOTH
def test_skips_only_invalid_utf8_row(suffix: str, tmp_path: Path) -> None:
    texts = [b"row %d" % i for i in range(600)]
    texts[400] = b"caf\xe9"
    column = pa.array(texts, pa.binary()).view(pa.string())
    path, skips = write(tmp_path / f"a{suffix}", pa.table({"text": column}), 1_000), SkipLog()
    assert read(path, skips) == [text.decode() for text in texts if text != b"caf\xe9"]
    assert dict(skips.counts) == {"invalid_utf8": 1}
    assert skips.places[0]["place"].endswith("0, row 400")


@BOTH
def test_column_selected_by_name(suffix: str, tmp_path: Path) -> None:
    table = pa.table({"text": ["no"], "the content.en": ["yes"], "id": [1]})
    assert read(write(tmp_path / f"a{suffix}", table), column="the content.en") == ["yes"]
    (tmp_path / "a.jsonl").write_text('{"text": "no", "the content.en": "yes"}\n')
    assert read(tmp_path / "a.jsonl", column="the content.en") == ["yes"]
