"""Sources `datasets:...`: folders, files and repositories that the real package opens, compared with what it reads."""

import csv
import glob
import io
import json
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.hub_server import HubServer

from myllm.config import DataConfig
from myllm.data.prepare.prepare import prepare
from myllm.data.sources import convert
from myllm.data.sources import source as sources
from myllm.data.sources.convert import fetch_file
from myllm.data.sources.hub_listing import UnreachableError
from myllm.data.sources.read_task import SkipLog
from myllm.data.sources.source import find_source, read_documents
from myllm.errors import UserError

CARD = """---
configs:
- config_name: plain
  default: true
  data_files:
  - split: train
    path: plain/*.csv
  - split: test
    path: test.csv
- config_name: tabs
  data_files: tabs/*.csv
  sep: "\\t"
---
"""


def rows(name: str, count: int) -> list[dict[str, Any]]:
    """Texts that pandas would take for numbers, for nothing, or for two lines are among them."""
    odd = ["007", "NA", "a,b", 'say "x"', "two\nlines"]
    return [
        {"title": f"{name} {i}", "text": odd[i] if i < len(odd) else f"text {i} of {name}, été", "n": i}
        for i in range(count)
    ]


def write_csv(path: Path, table: list[dict[str, Any]], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(table)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two configurations of CSV files, as its README says."""
    root = tmp_path / "own" / "data"
    for i in range(3):
        write_csv(root / "plain" / f"{i}.csv", rows(f"p{i}", 20))
    write_csv(root / "test.csv", rows("test", 20))
    write_csv(root / "tabs" / "0.csv", rows("tabs", 20), "\t")
    (root / "README.md").write_text(CARD)
    return root


def documents(source: str, column: str | None = None) -> list[str]:
    """All documents of a source, in the order of its files, with their downloads and conversions."""
    found, skips = find_source(source, column), SkipLog()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [
            text
            for file in found.files
            for text in read_documents(found, file, fetch_file(file, found.column, folder, folder), skips)
        ]
    assert not skips.counts
    return texts


def config(source: str, column: str | None = None, **values: Any) -> DataConfig:
    return DataConfig(source=source, text_column=column, workers=1, **values)


# -- local ------------------------------------------------------------------------------------------------------------


def test_folder_configurations_and_splits(folder: Path, temp_data: Path) -> None:
    plain = [row["text"] for i in range(3) for row in rows(f"p{i}", 20)]
    assert documents(f"datasets:{folder}") == plain
    assert find_source(f"datasets:{folder}:plain").files == find_source(f"datasets:{folder}").files
    test, tabs = find_source(f"datasets:{folder}:test"), find_source(f"datasets:{folder}:tabs:train")
    assert [file.name for file in test.files] == ["test.csv"]
    assert test.name != find_source(f"datasets:{folder}").name
    assert json.loads(tabs.files[0].builder)["options"] == {"sep": "\t"}
    expected = [f"{row['title']}: {row['text']}" for row in rows("tabs", 20)]
    assert documents(f"datasets:{folder}:tabs", "{title}: {text}") == expected


def json_array(path: Path) -> None:
    path.write_text(json.dumps([{"text": f"{i} été", "n": i} for i in range(40)]))


def web_dataset(path: Path) -> None:
    """Files of a sample beside one another: 0001.txt, 0001.json."""
    with tarfile.open(path, "w") as archive:
        for i in range(40):
            for suffix, content in (("txt", f"{i} été"), ("json", json.dumps({"url": f"https://{i}"}))):
                member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                member.size = len(content.encode())
                archive.addfile(member, io.BytesIO(content.encode()))


def zipped_csv(path: Path) -> None:
    write_csv(path.with_suffix(".csv"), [{"text": f"{i} été"} for i in range(40)])
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(path.with_suffix(".csv"), "inside/rows.csv")
    path.with_suffix(".csv").unlink()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.json", json_array),
        ("rows.tsv", lambda path: write_csv(path, [{"text": f"{i} été", "n": i} for i in range(40)], "\t")),
        ("rows.txt", lambda path: path.write_text("".join(f"{i} été\n" for i in range(40)))),
        ("rows.zip", zipped_csv),
    ],
)
def test_file_formats_match_datasets_package(
    name: str,
    write: Callable[[Path], None],
    tmp_path: Path,
    temp_data: Path,
) -> None:
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / name)
    expected = datasets.load_dataset(str(tmp_path / "files"), split="train", streaming=True)
    for path in ("files", f"files/{name}", "files/*"):
        assert documents(f"datasets:{tmp_path / path}") == [row["text"] for row in expected]


def test_webdataset_matches_datasets_package(tmp_path: Path, temp_data: Path) -> None:
    path = tmp_path / "rows [1].tar"  # a name that looks like a pattern
    web_dataset(path)
    rows = datasets.load_dataset("webdataset", data_files=glob.escape(str(path)), split="train", streaming=True)
    expected = [f"{row['json']['url']} {row['txt']}" for row in rows]
    assert documents(f"datasets:{path}", "{json.url} {txt}") == expected
    assert len(expected) == 40
    with pytest.raises(UserError, match=r"no column 'text'; it has .*'txt'.*--data.text-column chooses"):
        find_source(f"datasets:{path}")


def test_save_to_disk(tmp_path: Path, temp_data: Path) -> None:
    whole = datasets.Dataset.from_list(rows("saved", 40))
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    splits = datasets.DatasetDict({"train": whole, "dev": whole.select(range(20, 40))})
    splits.save_to_disk(tmp_path / "two")
    expected = [row["text"] for row in rows("saved", 40)]
    assert documents(f"datasets:{tmp_path / 'one'}") == expected
    assert documents(f"datasets:{tmp_path / 'two'}") == expected
    assert documents(f"datasets:{tmp_path / 'two'}:dev") == list(splits["dev"]["text"])
    with pytest.raises(UserError, match="no split 'test'; it has train, dev"):
        find_source(f"datasets:{tmp_path / 'two'}:test")
    with pytest.raises(UserError, match="column 'n' is int64, not text"):
        find_source(f"datasets:{tmp_path / 'one'}", "n")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="not a complete folder of save_to_disk"):
        find_source(f"datasets:{tmp_path / 'one'}")


def test_bad_rows_counted_and_logged(tmp_path: Path, temp_data: Path, in_process: None) -> None:
    write_csv(tmp_path / "csv" / "a.csv", rows("a", 20))
    with (tmp_path / "csv" / "a.csv").open("a") as file:
        file.write("one,two,3,four\ntitle,last,1\n")
    (tmp_path / "csv" / "b.csv").write_bytes(b"title,text,n\nx,\xe9,1\n")
    (tmp_path / "csv" / "c.csv").write_text("title,body\nx,y\n")
    dataset = prepare(config(f"datasets:{tmp_path / 'csv'}"), progress=False)
    logged = [json.loads(line) for line in (dataset.folder / "passed_over.jsonl").read_text().splitlines()]
    assert dataset.manifest["counts"]["passed_over"] == {
        "invalid_csv": 1, "unreadable_file": 1, "no_text_column": 1
    }  # fmt: skip
    assert {(row["reason"], row["place"]) for row in logged} == {
        ("invalid_csv", "a.csv, record 22"),
        ("unreadable_file", "b.csv"),
        ("no_text_column", "c.csv, from row 0 on"),
    }
    counts = dataset.manifest["counts"]
    assert counts["train_documents"] + counts["val_documents"] - counts["documents_split"] == 21


def test_interrupted_conversion_restarts_cleanly(
    tmp_path: Path, temp_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_csv(tmp_path / "a.csv", rows("a", 2_500))
    found = find_source(f"datasets:{tmp_path / 'a.csv'}")
    folder, log = tmp_path / "work", convert._log_bad_lines
    calls: list[str] = []

    def die_at_second_table(*args: Any) -> None:
        calls.append("table")
        if len(calls) == 2:
            raise KeyboardInterrupt
        log(*args)

    monkeypatch.setattr(convert, "_log_bad_lines", die_at_second_table)
    with pytest.raises(KeyboardInterrupt):
        convert.fetch_file(found.files[0], "text", folder, folder)
    assert not list(folder.glob("*.arrow"))
    path = convert.fetch_file(found.files[0], "text", folder, folder)
    assert len(calls) == 2 + 4  # three tables and the end
    assert convert.fetch_file(found.files[0], "text", folder, folder) == path
    assert len(calls) == 2 + 4
    texts = [text for part in range(3) for text in read_documents(found, found.files[0], path, SkipLog(), part, 3)]
    assert texts == [row["text"] for row in rows("a", 2_500)]


@pytest.mark.slow
def test_large_file_deterministic_across_worker_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashes: Callable[[Path], dict[str, str]]
) -> None:
    write_csv(tmp_path / "big.csv", [{"text": f"{i} " + "river été " * 1_100} for i in range(400)])
    found = []
    for workers in (1, 3):
        monkeypatch.setenv("MYLLM_DATA", str(tmp_path / f"data-{workers}"))
        dataset = prepare(DataConfig(source=f"datasets:{tmp_path / 'big.csv'}", workers=workers), progress=False)
        found.append(Counter(hashes(dataset.folder)))
    assert found[0] == found[1]
    assert len(np.unique(np.load(dataset.folder / "spans.npy")[:, 1])) == 2  # 5 MB in parts of about 3


def test_fingerprint_depends_on_files_and_settings(folder: Path, temp_data: Path) -> None:
    from myllm.data.prepare.spec import make_spec

    def fingerprint() -> str:
        return make_spec(config(f"datasets:{folder}:tabs")).fingerprint

    first = fingerprint()
    (folder / "README.md").write_text(CARD.replace('sep: "\\t"', 'sep: "\\t"\n  quotechar: "|"'))
    second = fingerprint()
    write_csv(folder / "tabs" / "1.csv", rows("more", 20), "\t")
    assert len({first, second, fingerprint()}) == 3


def test_cached_listing_avoids_datasets_import(folder: Path, temp_data: Path) -> None:
    source = f"datasets:{folder}"
    find_source(source)
    code = f"import sys; from myllm.data.sources.source import find_source; find_source({source!r}); "
    subprocess.run([sys.executable, "-c", code + "assert 'datasets' not in sys.modules"], check=True)


@pytest.mark.parametrize(
    ("words", "column", "message"),
    [
        (":nope", None, "no split 'nope'; it has train, test, and the configurations plain, tabs"),
        (":plian:train", None, "no configuration 'plian', did you mean 'plain'"),
        (":tabs:test", None, "(configuration tabs) has no split 'test'; it has train"),
        (":a:b:c", None, "too many parts"),
        ("", "n", "column 'n' is int64, not text"),
        ("", "body", "no column 'body'; it has ['title', 'text', 'n']"),
        ("", "{title} {bdy}", "no column 'bdy'; it has ['title', 'text', 'n']"),
        ("", "{title", "invalid template '{title'"),
    ],
)
def test_invalid_split_or_column_raises(
    folder: Path, temp_data: Path, words: str, column: str | None, message: str
) -> None:
    with pytest.raises(UserError) as raised:
        find_source(f"datasets:{folder}{words}", column)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_or_non_text_source_raises(tmp_path: Path, temp_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    (tmp_path / "rows.xml").write_text("<rows><text>one</text></rows>")
    sqlite3.connect(tmp_path / "rows.db").executescript("create table rows (text); insert into rows values ('one')")
    monkeypatch.chdir(tmp_path)
    for source, message in (
        ("datasets:./missing", "there is nothing at"),
        ("datasets:empty", "did you mean datasets:./empty?"),
        ("datasets:./empty", "doesn't contain any data files"),
        (
            "datasets:./images",
            "module 'imagefolder', expected one of arrow, conll, csv, json, parquet, text, webdataset; ",
        ),
        (
            "datasets:./rows.xml",
            "module 'xml', expected one of .*; `files:PATH --suffix .xml .html` reads other kinds of",
        ),
        ("datasets:./rows.db", "cannot open .*: it knows none of the suffixes there; `files:PATH --suffix"),
    ):
        with pytest.raises(UserError, match=message.replace("?", r"\?")) as raised:
            find_source(source)
        assert len(str(raised.value)) < 300
    monkeypatch.setitem(sys.modules, "datasets.exceptions", None)
    with pytest.raises(UserError, match="needs the package `datasets`, which cannot be imported"):
        find_source(f"datasets:{tmp_path / 'images' / 'a.png'}")


# -- the Hub ----------------------------------------------------------------------------------------------------------


def parquet(table: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(table), out, row_group_size=4)
    return out.getvalue()


@pytest.fixture
def package_on_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The package reads HF_ENDPOINT at import."""
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    return hub


def test_hub_repository_pinned_by_first_listing(package_on_hub: HubServer, folder: Path, temp_data: Path) -> None:
    hub = package_on_hub
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    commit = hub.add_dataset("own/data", files)
    expected = [row["text"] for i in range(3) for row in rows(f"p{i}", 20)]
    assert documents("datasets:own/data") == expected
    found = find_source("datasets:own/data").files
    assert [file.location for file in found] == [f"hf://datasets/own/data@{commit}/plain/{i}.csv" for i in range(3)]
    # A newer commit changes nothing, nor does a Hub that is gone: the first listing pins the data set.
    hub.add_dataset("own/data", files | {"plain/3.csv": files["test.csv"]})
    hub.down()
    assert find_source("datasets:own/data").files == found
    hub.up()
    assert len(find_source("datasets:own/data@main").files) == 4


def test_hub_parquet_uses_native_reader(package_on_hub: HubServer, temp_data: Path) -> None:
    table = [{"chat": [{"role": "user", "content": f"q{i}"}, {"role": "model", "content": f"a{i}"}]} for i in range(20)]
    package_on_hub.add_dataset("own/chats", {"data/train-00000-of-00001.parquet": parquet(table)})
    found = find_source("datasets:own/chats", "chat.content")
    assert [(file.reader, file.builder) for file in found.files] == [("parquet", "")]
    assert documents("datasets:own/chats", "chat.content") == [f"q{i}\na{i}" for i in range(20)]
    with pytest.raises(UserError, match=r"column 'chat' is nested; choose one of chat.role, chat.content"):
        find_source("datasets:own/chats", "chat")


def test_gated_missing_or_unreachable_repository_raises(
    package_on_hub: HubServer, temp_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = package_on_hub
    hub.add_dataset("own/gated", {"README.md": b"# Gated", "a.csv": b"text\nx\n"})
    hub.gate("own/gated")
    with pytest.raises(UserError, match=r"accept the dataset's terms at .*/own/gated .* `hf auth login`"):
        find_source("datasets:own/gated")
    with pytest.raises(UserError, match="no dataset 'own/none' that this account may read"):
        find_source("datasets:own/none")
    with pytest.raises(UserError, match="no revision 'v9'"):
        find_source("datasets:own/gated@v9")
    assert not list((temp_data / "listings").glob("*.json"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.down()
    with pytest.raises(UnreachableError, match="does not answer"):
        find_source("datasets:own/gated")
    assert sources.check_source("datasets:own/gated") is None
