"""Every kind of file gives its documents; damage is logged and skipped alone."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc

from myllm.data.sources import readers
from myllm.data.sources.read_task import MAX_LOGGED_SKIPS
from myllm.data.sources.readers import (
    MAX_PLAIN_CHARS,
    READER_BY_SUFFIX,
    ReadTask,
    SkipLog,
    read_file,
    split_prose,
    suffix_of,
)

DOCUMENTS = ["Plain words.\n", "été, 日本語 and 🙂", "one\n\ntwo\n", " \x00<|endoftext|>\u2028 ", "x" * 70_000]


def jsonl(documents: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) + "\n" for text in documents).encode()


def write_parquet(path: Path, documents: list[str], rows: int = 2) -> None:
    pq.write_table(pa.table({"text": documents, "id": list(range(len(documents)))}), path, row_group_size=rows)


def write_arrow(path: Path, table: pa.Table, rows: int = 2) -> None:
    """As `save_to_disk` of `datasets` writes it: a stream of record batches."""
    with pa.OSFile(str(path), "wb") as file, ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, rows)


WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    ".txt": lambda path, documents: path.write_text(documents[0], encoding="utf-8"),
    ".md": lambda path, documents: path.write_text(documents[0], encoding="utf-8"),
    ".py": lambda path, documents: path.write_text(documents[0], encoding="utf-8"),
    ".jsonl": lambda path, documents: path.write_bytes(jsonl(documents)),
    ".jsonl.gz": lambda path, documents: path.write_bytes(gzip.compress(jsonl(documents))),
    ".json.gz": lambda path, documents: path.write_bytes(gzip.compress(jsonl(documents))),
    ".jsonl.zst": lambda path, documents: path.write_bytes(zstandard.compress(jsonl(documents))),
    ".parquet": write_parquet,
    ".arrow": lambda path, documents: write_arrow(path, pa.table({"text": documents, "id": range(len(documents))})),
}
PLAIN = (".txt", ".md", ".py")


def read(path: Path, skips: SkipLog | None = None, column: str = "text") -> list[str]:
    """A file's rows; without `skips`, skips are not allowed."""
    found = SkipLog() if skips is None else skips
    rows = list(read_file(READER_BY_SUFFIX[suffix_of(path)], ReadTask(path, path.name, column), found))
    assert skips is not None or not found.counts, found
    return rows


def test_all_formats_covered() -> None:
    assert set(WRITERS) == set(READER_BY_SUFFIX)


@pytest.mark.parametrize("suffix", WRITERS)
def test_all_formats_yield_same_documents(suffix: str, tmp_path: Path) -> None:
    for documents in [[text] for text in DOCUMENTS] if suffix in PLAIN else [DOCUMENTS, DOCUMENTS[:1]]:
        path = tmp_path / f"a{suffix}"
        WRITERS[suffix](path, documents)
        assert read(path) == documents


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("A.TXT", ".txt"), ("v1.2.jsonl.GZ", ".jsonl.gz"), ("a.tar.gz", ".tar.gz"), ("README", ""), (".txt", "")],
)
def test_suffix_of(name: str, suffix: str) -> None:
    assert suffix_of(Path(name)) == suffix_of(name) == suffix


def test_crlf_and_byte_order_marks(tmp_path: Path) -> None:
    for name in ("a.txt", "a.py"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
        assert read(tmp_path / name) == ["one\ntwo\n"]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": null}\r\n{"text": "two"}')
    assert read(tmp_path / "a.jsonl") == ["one", "", "two"]


def test_python_encoding_declaration(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_bytes("# -*- coding: latin-1 -*-\ns = 'été'\n".encode("latin-1"))
    assert "été" in read(path)[0]
    path.write_bytes("f = open('x', encoding='rot13')  # é, and no encoding:rot13x\n".encode())
    assert "é" in read(path)[0]
    path.write_bytes("# coding: none-such\n# é\n".encode())
    assert "é" in read(path)[0]


@given(st.text(alphabet="a \n", max_size=60), st.integers(1, 12))
def test_split_prose_is_lossless(text: str, most: int) -> None:
    pieces = list(split_prose(text, most))
    assert "".join(pieces) == text
    assert all(len(piece) <= most for piece in pieces)


def test_long_prose_splits_at_blank_lines(tmp_path: Path) -> None:
    paragraph = "word " * 2_000 + "\n\n"
    (tmp_path / "a.txt").write_text(paragraph * 30)
    pieces = read(tmp_path / "a.txt")
    assert len(pieces) == -(-30 // (MAX_PLAIN_CHARS // len(paragraph)))
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])


@pytest.mark.parametrize("level", [1, 19])
def test_multi_frame_zstd(level: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    skippable = bytes.fromhex("502a4d18 03000000") + b"abc"  # RFC 8878, section 3.1.2; pzstd writes them
    documents = [f"{i} " * 3_000 for i in range(40)]
    frames = [zstandard.compress(jsonl(documents[i : i + 4]), level) for i in range(0, 40, 4)]
    path.write_bytes(skippable + skippable.join(frames))
    assert read(path) == documents


COMPRESSED = {".jsonl.gz": gzip.compress, ".json.gz": gzip.compress, ".jsonl.zst": zstandard.compress}


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.98, -1, -5])
def test_truncated_compressed_file_yields_leading_rows(suffix: str, keep: float, tmp_path: Path) -> None:
    path, skips = tmp_path / f"a{suffix}", SkipLog()
    documents = [f"document {i * i}" for i in range(2_000)]
    whole = COMPRESSED[suffix](jsonl(documents))
    path.write_bytes(whole[: int(keep) or int(len(whole) * keep)] if keep else b"")
    rows = read(path, skips)
    assert rows == documents[: len(rows)]
    assert len(rows) >= (0 if suffix == ".jsonl.zst" else int(2_000 * 0.9 * keep))  # zstd's blocks are 128 KB
    assert dict(skips.counts) == {"file_cut_short": 1}
    assert skips.places[0]["place"] == path.name


# Name, content, reason, place, a word of the detail, and what is read all the same.
GOOD = b'{"text": "a"}\n'
FAULTS: dict[str, tuple[str, bytes, str, str, str, list[str]]] = {
    "utf-16 cut short": ("a.txt", "hello".encode("utf-16")[:-1], "invalid_text", "a.txt", "damaged", []),
    "utf-16 unmarked": ("a.txt", "hello there".encode("utf-16-le"), "invalid_text", "a.txt", "-f UTF-16LE", []),
    "utf-16 of the other kind": ("a.md", "hello thére".encode("utf-16-be"), "invalid_text", "a.md", "-f UTF-16BE", []),
    "utf-32 unmarked": ("a.py", "x = 'hello'".encode("utf-32-be"), "invalid_text", "a.py", "-f UTF-32BE", []),
    "latin-1": ("a.md", "abc été".encode("latin-1"), "invalid_text", "a.md", "LATIN1", []),
    "latin-1 python": ("a.py", "s = 'été'".encode("latin-1"), "invalid_text", "a.py", "byte 5", []),
    "not what it names": ("a.py", b"# coding: ascii\n\xe9", "invalid_text", "a.py", "ascii", []),
    "not an encoding of text": ("a.py", b"# coding: hex\n\xe9", "invalid_text", "a.py", "hex", []),
    "half a line": ("a.jsonl", GOOD + b'\n{"text": "b', "invalid_json", "a.jsonl, line 3", "", ["a"]),
    "nothing but NUL": ("a.jsonl", GOOD + b"\0\0\0\n" + GOOD, "invalid_json", "a.jsonl, line 2", "", ["a", "a"]),
    "not an object": ("a.jsonl", GOOD + b"[1, 2]\n" + GOOD, "no_text", "a.jsonl, line 2", "list", ["a", "a"]),
    "an array file": ("a.jsonl", b"[" + GOOD.strip() + b"]", "no_text", "a.jsonl, line 1", "list", []),
    "no text": ("a.jsonl", b'{"body": "a"}\n' + GOOD, "no_text", "a.jsonl, line 1", "'body'", ["a"]),
    "a number": ("a.jsonl", GOOD + b'{"text": 3}\n' + GOOD, "no_text", "a.jsonl, line 2", "found 3 (int)", ["a", "a"]),
    "latin-1 lines": ("a.jsonl", GOOD + b'{"text": "\xe9"}\n', "invalid_utf8", "a.jsonl, line 2", "", ["a"]),
    "nested": ("a.jsonl", GOOD + b"[" * 10**6 + b"\n" + GOOD, "invalid_json", "a.jsonl, line 2", "", ["a", "a"]),
    "a number of many digits": ("a.jsonl", GOOD + b"9" * 10_000, "invalid_json", "a.jsonl, line 2", "", ["a"]),
    "not gzip": ("a.jsonl.gz", GOOD, "unreadable_file", "a.jsonl.gz", "gzip", []),
    "wrong sum": ("a.jsonl.gz", gzip.compress(GOOD * 2)[:-8] + b"12345678", "unreadable_file", "a.jsonl.gz", "CRC",
                  ["a", "a"]),
    "damaged gzip": ("a.json.gz", gzip.compress(GOOD)[:10] + b"\xff" * 99, "unreadable_file", "a.json.gz", "", []),
    "more after gzip": ("a.json.gz", gzip.compress(GOOD) + b"garbage", "unreadable_file", "a.json.gz", "", ["a"]),
    "line in gzip": ("a.json.gz", gzip.compress(GOOD + b"x\n" + GOOD), "invalid_json", "a.json.gz, line 2", "",
                     ["a", "a"]),
    "not zstd": ("a.jsonl.zst", GOOD, "unreadable_file", "a.jsonl.zst", "zstd", []),
    "more after zstd": ("a.jsonl.zst", zstandard.compress(GOOD) + b"garbage", "unreadable_file", "a.jsonl.zst",
                        "zstd", ["a"]),
    "not parquet": ("a.parquet", GOOD, "unreadable_file", "a.parquet", "parquet", []),
    "empty parquet": ("a.parquet", b"", "unreadable_file", "a.parquet", "parquet", []),
    "not arrow": ("a.arrow", GOOD, "unreadable_file", "a.arrow", "arrow", []),
    "empty arrow": ("a.arrow", b"", "unreadable_file", "a.arrow", "arrow", []),
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "utf-16-be", "utf-32-be"])
@pytest.mark.parametrize("suffix", [".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_byte_order_mark_sets_encoding(encoding: str, suffix: str, tmp_path: Path) -> None:
    path, skips, text = tmp_path / f"a{suffix}", SkipLog(), "naïve\n\u0a0a 日本 🎲\n"
    content = jsonl([text, "two"]).decode() if "json" in suffix else text
    marked = ("\ufeff" if encoding.endswith("be") else "") + content
    path.write_bytes(COMPRESSED.get(suffix, bytes)(marked.encode(encoding)))
    assert read(path, skips) == ([text, "two"] if "json" in suffix else [text])
    assert not skips.counts


def test_utf16_parts_read_rows_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = [f"document {i}" for i in range(100)]
    path.write_bytes(jsonl(texts).decode().encode("utf-16"))
    parts = [read_file("jsonl", ReadTask(path, path.name, part=part, num_parts=3), SkipLog()) for part in range(3)]
    assert [text for part in parts for text in part] == texts


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_row_logged_and_skipped(fault: str, tmp_path: Path) -> None:
    name, content, reason, place, word, rows = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    skips = SkipLog()
    assert read(tmp_path / name, skips) == rows
    assert dict(skips.counts) == {reason: 1}
    assert [(entry["reason"], entry["place"]) for entry in skips.places] == [(reason, place)]
    assert word in skips.places[0]["detail"]


def test_truncated_utf16_yields_leading_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a" * 70_000, "b"]).decode().encode("utf-16")[:-1])
    skips = SkipLog()
    assert read(tmp_path / "a.jsonl", skips) == ["a" * 70_000]
    assert dict(skips.counts) == {"file_cut_short": 1}


@pytest.mark.parametrize("depth", [500, *range(960, 1_000), 5_000])
def test_skips_deeply_nested_json(depth: int, tmp_path: Path) -> None:
    """At the depth that JSON can just parse, the message must not fail either."""
    nest = b'{"text": ' + b"[" * depth + b"]" * depth + b"}\n"
    (tmp_path / "a.jsonl").write_bytes(GOOD + nest + GOOD)
    skips = SkipLog()
    assert read(tmp_path / "a.jsonl", skips) == ["a", "a"]
    assert skips.counts.total() == 1


@pytest.mark.parametrize("suffix", WRITERS)
def test_unreadable_file_logged(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.mkdir()
    for missing in (path, tmp_path / f"none{suffix}"):
        skips = SkipLog()
        assert read(missing, skips) == []
        assert dict(skips.counts) == {"unreadable_file": 1}
        assert skips.places[0]["place"] == missing.name


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_skips_overlong_line(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1_000)
    path, skips = tmp_path / f"a{suffix}", SkipLog()
    WRITERS[suffix](path, ["before", "x" * 3_000_000, "between", "x" * 980, "after"])
    assert read(path, skips) == ["before", "between", "after"]
    assert dict(skips.counts) == {"line_too_long": 2}
    assert [entry["place"] for entry in skips.places] == [f"a{suffix}, line 2", f"a{suffix}, line 4"]


def test_reads_highly_compressed_line(tmp_path: Path) -> None:
    """zstd gives 50 MB as one chunk; handing it on 64 KB at a time must not copy the rest each time."""
    WRITERS[".jsonl.zst"](tmp_path / "a.jsonl.zst", ["x" * 50_000_000, "after"])
    assert list(map(len, read(tmp_path / "a.jsonl.zst"))) == [50_000_000, 5]


def test_skip_log_counts_all_logs_first() -> None:
    skips = SkipLog()
    for number in range(10 * MAX_LOGGED_SKIPS):
        skips.add("invalid_json", f"line {number}", "found\n\t " + "x" * 10_000)
    assert dict(skips.counts) == {"invalid_json": 10 * MAX_LOGGED_SKIPS}
    assert [entry["place"] for entry in skips.places] == [f"line {number}" for number in range(MAX_LOGGED_SKIPS)]
    assert all(len(entry["detail"]) == 200 and "\n" not in entry["detail"] for entry in skips.places)
