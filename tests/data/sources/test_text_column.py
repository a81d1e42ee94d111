"""Columns, nested columns and templates, in each kind of file that holds rows."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from myllm.data.sources.read_task import ReadTask, SkipLog
from myllm.data.sources.readers import READER_BY_SUFFIX, read_file, suffix_of
from myllm.data.sources.text_column import parse_text_column
from myllm.errors import UserError

ROWS: list[dict[str, Any]] = [
    {
        "title": "One", "text": "été", "n": 1, "meta": {"lang": {"name": "fr"}}, "a.b": "dotted",
        "lines": ["x", "y"], "chat": [{"role": "user", "content": "hi"}, {"role": "model", "content": "ho"}],
    },
    {"title": None, "text": "two", "n": 2, "meta": None, "a.b": "", "lines": [], "chat": None},
    {"title": None, "text": None, "n": 3, "meta": {"lang": None}, "a.b": None, "lines": None, "chat": []},
]  # fmt: skip


def read(path: Path, column: str, skips: SkipLog | None = None) -> list[str]:
    task = ReadTask(path, path.name, column)
    return list(read_file(READER_BY_SUFFIX[suffix_of(path)], task, skips or SkipLog()))


@pytest.fixture(params=[".jsonl", ".parquet", ".arrow"])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"rows{request.param}"
    if request.param == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif request.param == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
    else:
        pyarrow.feather.write_feather(pa.Table.from_pylist(ROWS), path, compression="uncompressed")
    return path


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("text", ["été", "two", ""]),
        ("meta.lang.name", ["fr", "", ""]),
        ("a.b", ["dotted", "", ""]),
        ("lines", ["x\ny", "", ""]),
        ("chat.content", ["hi\nho", "", ""]),
        ("{title}\n{text}", ["One\nété", "\ntwo", ""]),
        (r"# {title}\n\t{text}{{{meta.lang.name}}}", ["# One\n\tété{fr}", "# \n\ttwo{}", ""]),
    ],
)
def test_column_expressions_across_readers(rows: Path, column: str, expected: list[str]) -> None:
    skips = SkipLog()
    assert read(rows, column, skips) == expected
    assert not skips.counts


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ("{title} {body}", "'body'"),
        ("meta.size", "'meta.size'"),
        ("n", "int64, not text"),
        ("chat", "chat.role, chat.content"),
    ],
)
def test_missing_or_non_text_column_logged(rows: Path, column: str, reason: str) -> None:
    skips = SkipLog()
    found = read(rows, column, skips)
    detail = skips.places[0]["detail"]
    if rows.suffix == ".jsonl":  # a row at a time: null is an empty text in any column
        assert skips.counts["no_text"] + found.count("") == len(ROWS)
        reason = {"meta.size": "'size'", "n": "expected a text in 'n', found 1 (int)"}.get(column, reason)
    else:
        assert found == []
        assert dict(skips.counts) == {"no_text_column": 1}
    assert reason in detail


@pytest.mark.parametrize("template", ["{text", "text}", "{}", "{text!r}", "{text:>10}", "{{text}}"])
def test_malformed_template_raises(template: str) -> None:
    with pytest.raises(UserError, match="template"):
        parse_text_column(template)


def test_skips_only_invalid_utf8_row(tmp_path: Path) -> None:
    texts = pa.array([b"one", b"\xff\xfe", b"three"]).cast(pa.binary()).view(pa.string())
    pyarrow.parquet.write_table(pa.table({"title": ["a", "b", "c"], "text": texts}), tmp_path / "a.parquet")
    skips = SkipLog()
    assert read(tmp_path / "a.parquet", "{title}: {text}", skips) == ["a: one", "c: three"]
    assert skips.counts == {"invalid_utf8": 1}
    assert skips.places[0]["place"].endswith("row 1")


def test_skips_nested_lists(tmp_path: Path) -> None:
    table = pa.table({"text": [[["a"], ["b"]], None], "turn": [[{"said": ["a"]}], None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for column, texts, reason in (("text", [], "no_text_column"), ("turn.said", [""], "no_text")):
        skips = SkipLog()
        assert read(tmp_path / "a.parquet", column, skips) == texts
        assert dict(skips.counts) == {reason: 1}
