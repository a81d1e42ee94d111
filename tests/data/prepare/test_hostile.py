"""Hostile files, from the file to the tokens: handled, or skipped, counted and named, and nothing else is skipped.

Every test goes through what a worker does, `tokenize_item`, and reads the tokens and the index that it leaves.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from myllm.config import DataConfig
from myllm.data.prepare import work_items
from myllm.data.prepare.work_items import load_item_index, make_work_items, tokenize_item, tokens_path
from myllm.data.sources import readers
from myllm.data.sources.read_task import MAX_LOGGED_SKIPS
from myllm.data.sources.source import find_source
from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.load import load_tokenizer

Work = Callable[..., tuple[list[str], dict[str, int], list[str]]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture
def work(tmp_path: Path, tokenizer: Tokenizer) -> Work:
    """Tokenize a folder. Returns its documents, decoded, in order; the counts; and the logged places."""

    def do(folder: Path, **settings: object) -> tuple[list[str], dict[str, int], list[str]]:
        source = find_source(f"files:{folder}", settings.pop("column", None))
        texts, counts, places = [], {}, []
        for number, item in enumerate(make_work_items(source.files, False, 0)):
            paths = {file.name: Path(file.location) for file in source.files}
            tokenize_item(item, paths, source, DataConfig(**settings), tokens_path(tmp_path, number), tmp_path / "stop")
            index = load_item_index(tmp_path, number)
            tokens = np.fromfile(tokens_path(tmp_path, number), dtype="<u2")
            assert len(tokens) == index.lengths.sum()
            for document in np.split(tokens, np.cumsum(index.lengths)[:-1]) if len(tokens) else []:
                assert document[0] == tokenizer.end_of_text
                assert tokenizer.end_of_text not in document[1:]
                texts.append(tokenizer.decode(document[1:]))
            counts.update({key: counts.get(key, 0) + count for key, count in index.skips.counts.items()})
            places += [skip["place"] for skip in index.skips.places]
        return texts, counts, places

    return do


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    return tmp_path / "texts"


def line(text: str | None) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


# What is said of a text that is kept.
KEPT = {"NUL in the text": "nul_characters_kept", "a lone surrogate": "lone_surrogates_replaced",
        "end of text, spelled out": "end_of_text_spelled_out"}  # fmt: skip
# What is between two good lines, and the result: texts, or the reason why it is skipped.
LINES: dict[str, tuple[bytes, list[str] | str]] = {
    "a million spaces": (line(" " * 10**6), "empty"),
    "a million line ends": (line("\n" * 10**6), "empty"),
    "a million spaces between letters": (line("a" + " " * 10**6 + "b"), ["a" + " " * 10**6 + "b"]),
    "a million of one letter": (line("x" * 10**6), ["x" * 10**6]),
    "a million marks": (line("!" * 10**6), ["!" * 10**6]),
    "a line of white space": (b" \t" * 10**5 + b"\n", []),
    "NUL in the text": (line("a\0b\0"), ["a\0b\0"]),
    "NUL bytes in the line": (b'{"text": "a\0b"}\n', "invalid_json"),
    "NUL bytes alone": (b"\0" * 1_000 + b"\n", "invalid_json"),
    "a lone surrogate": (b'{"text": "a\\ud83db"}\n', ["a\ufffdb"]),
    "a lone surrogate in bytes": (b'{"text": "a\xed\xa0\xbd"}\n', "invalid_utf8"),
    "surrogates as a key": (b'{"\\ud83d": "a"}\n', "no_text"),
    "a pair of surrogates": (b'{"text": "\\ud83d\\ude42"}\n', ["🙂"]),
    "invalid UTF-8": (b'{"text": "caf\xe9"}\n', "invalid_utf8"),
    "overlong UTF-8": (b'{"text": "\xc0\x80"}\n', "invalid_utf8"),
    "end of text, spelled out": (line("a<|endoftext|>b<|endoftext|>"), ["a<|endoftext|>b<|endoftext|>"]),
    "nothing": (line(""), "empty"),
    "null": (line(None), "empty"),
    "no text": (b'{"body": "a"}\n', "no_text"),
    "a list of numbers": (b'{"text": [1]}\n', "no_text"),
    "a nested list": (b'{"text": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n", "invalid_json"),
    "not a number": (b'{"text": NaN}\n', "no_text"),
    "two objects": (line("a").strip() + line("b"), "invalid_json"),
    "a separator that is no line end": ('{"text": "a\u2028b\u0085c"}\n'.encode(), ["a\u2028b\u0085c"]),
    "an old Mac's lines": (b"\r\r\r\n", []),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("case", LINES)
def test_hostile_line_preserves_neighbors(case: str, suffix: str, folder: Path, work: Work) -> None:
    content, outcome = LINES[case]
    content = line("before") + content + line("after")
    (folder / f"a{suffix}").write_bytes(gzip.compress(content, 1) if suffix.endswith("gz") else content)
    texts, counts, places = work(folder)
    assert texts == ["before", *(outcome if isinstance(outcome, list) else []), "after"]
    reason = outcome if isinstance(outcome, str) else KEPT.get(case)
    assert counts == ({reason: 1} if reason else {})
    # What a reader meets it names by line, what is seen in the text by document: here the two agree.
    assert [place.replace("document", "line") for place in places] == ([f"a{suffix}, line 2"] if reason else [])


def test_50_mb_line(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "The river ran on. " * (50_000_000 // 18)
    with (folder / "a.jsonl").open("wb") as file:
        file.writelines([line("before"), line(text), line("after")])
    source, documents = find_source(f"files:{folder}"), []
    for number, item in enumerate(make_work_items(source.files, False, 0)):  # the line reaches over several
        out = tokens_path(tmp_path, number)
        tokenize_item(item, {"a.jsonl": folder / "a.jsonl"}, source, DataConfig(), out, tmp_path / "stop")
        index = load_item_index(tmp_path, number)
        assert not index.skips.counts
        documents += np.split(np.fromfile(out, dtype="<u2"), np.cumsum(index.lengths))[:-1]
    assert len(documents) == 3
    assert [tokenizer.decode(documents[at][1:]) for at in (0, 2)] == ["before", "after"]
    # Decoding it all takes longer than all else: its size, and its beginning.
    assert tokenizer.token_bytes()[documents[1]].sum() == len(text)
    assert text.startswith(tokenizer.decode(documents[1][1:10_000]))


def test_only_overlong_line_skipped(folder: Path, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1_000)
    monkeypatch.setattr(work_items, "PART_BYTES", 5_000)  # the long line is in one part, or in several
    (folder / "a.jsonl").write_bytes(line("before") * 50 + line("x" * 20_000) + line("after") * 50)
    texts, counts, places = work(folder)
    assert texts == ["before"] * 50 + ["after"] * 50
    assert counts == {"line_too_long": 1}
    assert places[0].startswith("a.jsonl, line ")


FILES: dict[str, tuple[str, bytes, dict[str, int]]] = {
    "truncated gzip": ("b.jsonl.gz", gzip.compress(line("in b"))[:-4], {"file_cut_short": 1}),
    "not gzip": ("b.jsonl.gz", line("x"), {"unreadable_file": 1}),
    "not zstd": ("b.jsonl.zst", line("x"), {"unreadable_file": 1}),
    "not parquet": ("b.parquet", b"PAR1" + b"\0" * 100 + b"PAR1", {"unreadable_file": 1}),
    "not arrow": ("b.arrow", b"\xff" * 100, {"unreadable_file": 1}),
    "not text": ("b.txt", bytes(range(256)), {"invalid_text": 1}),
    "latin-1": ("b.md", "été".encode("latin-1"), {"invalid_text": 1}),
    "an array of objects": ("b.jsonl", json.dumps([{"text": "x"}] * 3).encode(), {"no_text": 1}),
    "one object over lines": ("b.jsonl", json.dumps({"text": "x"}, indent=1).encode(), {"invalid_json": 3}),
    "one string": ("b.jsonl", b'"x"', {"no_text": 1}),
    "empty text": ("b.txt", b"", {"empty": 1}),
    "empty lines": ("b.jsonl", b"", {}),
    "empty gzip": ("b.jsonl.gz", b"", {"file_cut_short": 1}),
    "white space": ("b.txt", b" \n" * 500_000, {"empty": 10}),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_hostile_file_preserves_neighbors(case: str, folder: Path, work: Work) -> None:
    name, content, expected = FILES[case]
    (folder / "a.txt").write_text("before")
    (folder / "c.txt").write_text("after")
    (folder / name).write_bytes(content)
    texts, counts, places = work(folder)
    assert texts == ["before", *(["in b"] if case == "truncated gzip" else []), "after"]
    assert counts == expected
    assert all(place.startswith(name) for place in places)
    assert len(places) == sum(expected.values())


def test_truncated_parquet_preserves_neighbors(folder: Path, work: Work) -> None:
    for name in "abc":
        pq.write_table(pa.table({"text": [f"{name} {i}" for i in range(100)]}), folder / f"{name}.parquet")
    whole = (folder / "b.parquet").read_bytes()
    (folder / "b.parquet").write_bytes(whole[: len(whole) // 2])
    texts, counts, places = work(folder)
    assert texts == [f"{name} {i}" for name in "ac" for i in range(100)]
    assert (counts, places) == ({"unreadable_file": 1}, ["b.parquet"])


def test_hostile_parquet_rows(folder: Path, work: Work) -> None:
    rows = ["before", None, "", " \n", "a\0b", "<|endoftext|>", " " * 10**6, "after"]
    pq.write_table(pa.table({"text": rows}), folder / "a.parquet")
    texts, counts, places = work(folder)
    assert texts == ["before", "a\0b", "<|endoftext|>", "after"]
    assert counts == {"empty": 4, "nul_characters_kept": 1, "end_of_text_spelled_out": 1}
    assert places == [f"a.parquet, document {number}" for number in (2, 3, 4, 5, 6, 7)]


def test_missing_text_column_skipped(folder: Path, work: Work) -> None:
    pq.write_table(pa.table({"content": ["yes"], "id": [1]}), folder / "a.parquet")
    (folder / "b.jsonl").write_text('{"content": "yes too"}\n')
    texts, counts, places = work(folder)
    assert (texts, counts) == ([], {"no_text_column": 1, "no_text": 1})
    assert places == ["a.parquet", "b.jsonl, line 1"]
    texts, counts, _ = work(folder, column="content")
    assert (texts, counts) == (["yes", "yes too"], {})


def test_non_utf8_file_name(folder: Path, work: Work) -> None:
    name = b"caf\xe9.jsonl".decode(errors="surrogateescape")
    (folder / name).write_bytes(b"broken\n" + line("good"))
    texts, counts, places = work(folder)
    assert (texts, counts, places) == (["good"], {"invalid_json": 1}, [f"{name}, line 1"])


def test_logged_skips_limited_but_counts_complete(folder: Path, work: Work) -> None:
    (folder / "a.jsonl").write_bytes(b"broken\n" * 5_000 + line("good"))
    texts, counts, places = work(folder)
    assert (texts, counts) == (["good"], {"invalid_json": 5_000})
    assert places == [f"a.jsonl, line {number}" for number in range(1, MAX_LOGGED_SKIPS + 1)]
