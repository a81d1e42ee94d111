"""Every kind of file gives its documents, and a damaged one says where it is damaged."""

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

from myllm.data.readers import MAX_PLAIN_CHARS, READERS, _split_lines, read_prose, suffix_of
from myllm.errors import UserError

DOCUMENTS = ["Plain words.\n", "été, 日本語 and 🙂", "one\n\ntwo\n", " \x00<|endoftext|>\u2028 ", "x" * 70_000]


def jsonl(documents: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) + "\n" for text in documents).encode()


def write_parquet(path: Path, documents: list[str]) -> None:
    pq.write_table(pa.table({"text": documents, "id": list(range(len(documents)))}), path, row_group_size=2)


WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    ".txt": lambda path, documents: path.write_text(documents[0], encoding="utf-8"),
    ".md": lambda path, documents: path.write_text(documents[0], encoding="utf-8"),
    ".py": lambda path, documents: path.write_text(documents[0], encoding="utf-8"),
    ".jsonl": lambda path, documents: path.write_bytes(jsonl(documents)),
    ".jsonl.gz": lambda path, documents: path.write_bytes(gzip.compress(jsonl(documents))),
    ".json.gz": lambda path, documents: path.write_bytes(gzip.compress(jsonl(documents))),
    ".jsonl.zst": lambda path, documents: path.write_bytes(zstandard.compress(jsonl(documents))),
    ".parquet": write_parquet,
}
PLAIN = (".txt", ".md", ".py")


def read(path: Path) -> list[str]:
    return list(READERS[suffix_of(path)](path))


def test_every_kind_is_tested() -> None:
    assert set(WRITERS) == set(READERS)


@pytest.mark.parametrize("suffix", WRITERS)
def test_same_documents_from_every_kind(suffix: str, tmp_path: Path) -> None:
    for documents in [[text] for text in DOCUMENTS] if suffix in PLAIN else [DOCUMENTS, DOCUMENTS[:1]]:
        path = tmp_path / f"a{suffix}"
        WRITERS[suffix](path, documents)
        assert read(path) == documents


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("A.TXT", ".txt"), ("v1.2.jsonl.GZ", ".jsonl.gz"), ("a.tar.gz", ".tar.gz"), ("README", ""), (".txt", "")],
)
def test_kind_by_name(name: str, suffix: str) -> None:
    assert suffix_of(Path(name)) == suffix


def test_line_ends_and_byte_order_marks_of_other_systems(tmp_path: Path) -> None:
    for name in ("a.txt", "a.py"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
        assert read(tmp_path / name) == ["one\ntwo\n"]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": null}\r\n{"text": "\\ud83d"}')
    assert read(tmp_path / "a.jsonl") == ["one", "", "\ud83d"]


def test_python_files_name_their_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_bytes("# -*- coding: latin-1 -*-\ns = 'été'\n".encode("latin-1"))
    assert "été" in read(path)[0]
    path.write_bytes("f = open('x', encoding='rot13')  # é, and no encoding:rot13x\n".encode())
    assert "é" in read(path)[0]
    path.write_bytes("# coding: none-such\n# é\n".encode())
    assert "é" in read(path)[0]


@given(st.text(alphabet="a \n", max_size=60), st.integers(1, 12))
def test_long_prose_is_cut_without_loss(tmp_path_factory: pytest.TempPathFactory, text: str, most: int) -> None:
    path = tmp_path_factory.getbasetemp() / "prose.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("myllm.data.readers.MAX_PLAIN_CHARS", most)
        pieces = list(read_prose(path))
    assert "".join(pieces) == text
    assert all(len(piece) <= most for piece in pieces)


def test_long_prose_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraph = "word " * 2_000 + "\n\n"
    (tmp_path / "a.txt").write_text(paragraph * 30)
    pieces = read(tmp_path / "a.txt")
    assert len(pieces) == -(-30 // (MAX_PLAIN_CHARS // len(paragraph)))
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])


@given(st.lists(st.binary(max_size=6)))
def test_lines_of_chunks(chunks: list[bytes]) -> None:
    assert list(_split_lines(chunks)) == b"".join(chunks).split(b"\n")


@pytest.mark.parametrize("level", [1, 19])
def test_zstd_frames_of_any_number_and_size(level: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    skippable = bytes.fromhex("502a4d18 03000000") + b"abc"  # RFC 8878, section 3.1.2; pzstd writes them
    documents = [f"{i} " * 3_000 for i in range(40)]
    frames = [zstandard.compress(jsonl(documents[i : i + 4]), level) for i in range(0, 40, 4)]
    path.write_bytes(skippable + skippable.join(frames))
    assert read(path) == documents


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


COMPRESSED = {".jsonl.gz": gzip.compress, ".json.gz": gzip.compress, ".jsonl.zst": zstandard.compress}


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.98, -1, -5])
def test_a_compressed_file_that_ends_early(suffix: str, keep: float, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    whole = COMPRESSED[suffix](jsonl([f"document {i * i}" for i in range(2_000)]))
    path.write_bytes(whole[: int(keep) or int(len(whole) * keep)] if keep else b"")
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(path) in str(caught.value)


FAULTS = {
    "utf-16": ("a.txt", "hello".encode("utf-16"), "byte 0"),
    "latin-1": ("a.md", "abc été".encode("latin-1"), "byte 4"),
    "latin-1 python": ("a.py", "s = 'été'".encode("latin-1"), "byte 5"),
    "not what it names": ("a.py", b"# coding: ascii\n\xe9", "ascii"),
    "not an encoding of text": ("a.py", b"# coding: hex\n\xe9", "hex"),
    "half a line": ("a.jsonl", b'{"text": "a"}\n\n{"text": "b', "line 3"),
    "not an object": ("a.jsonl", b'{"text": "a"}\n[1, 2]\n', "line 2"),
    "no text": ("a.jsonl", b'{"body": "a"}\n', "line 1.*'body'"),
    "a number": ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2.*3"),
    "utf-16 lines": ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "line 1"),
    "latin-1 lines": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2"),
    "nested": ("a.jsonl", b"[" * 100_000, "line 1"),
    "not gzip": ("a.jsonl.gz", jsonl(["a"]), "gzip"),
    "damaged gzip": ("a.jsonl.gz", gzip.compress(jsonl(["a" * 99, "b"]))[:-8] + b"12345678", "CRC"),
    "line in gzip": ("a.json.gz", gzip.compress(b'{"text": "a"}\nx'), "line 2"),
    "not zstd": ("a.jsonl.zst", jsonl(["a"]), "zstd"),
    "more after zstd": ("a.jsonl.zst", zstandard.compress(jsonl(["a"])) + b"garbage", "zstd"),
    "not parquet": ("a.parquet", jsonl(["a"]), "parquet"),
    "empty parquet": ("a.parquet", b"", "parquet"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_file_and_place(fault: str, tmp_path: Path) -> None:
    name, content, place = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=place) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_faults_of_parquet_files(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, DOCUMENTS)
    whole = path.read_bytes()
    middle = len(whole) // 3
    for damaged in (whole[: len(whole) // 2], whole[:-1], whole[:middle] + b"\xff" * 400 + whole[middle + 400 :]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.parquet"):
            read(path)
    pq.write_table(pa.table({"body": ["a"]}), path)
    with pytest.raises(UserError, match=r"no column 'text', but \['body'\]"):
        read(path)
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match=r"row 1.*should be a text"):
        read(path)
    bad = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
    pq.write_table(pa.table({"text": bad}), path)
    with pytest.raises(UserError, match="row 2"):
        read(path)


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_that_cannot_be_opened(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.mkdir()
    for missing in (path, tmp_path / f"none{suffix}"):
        with pytest.raises(UserError, match=r"cannot read|is not a whole") as caught:
            read(missing)
        assert str(missing) in str(caught.value)
