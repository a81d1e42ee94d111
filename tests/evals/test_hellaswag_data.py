"""HellaSwag's rows from a file or from the Hub, and what is said where they cannot be had."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.hub_server import HubServer

from myllm.data.sources import download as fetching
from myllm.data.sources.source import SourceFile
from myllm.errors import UserError
from myllm.evals.hellaswag_data import PINNED, load_examples

OWN = Path(__file__).with_name("hellaswag_own.jsonl")
ROWS = [json.loads(line) for line in OWN.read_text(encoding="utf-8").splitlines()]


def write_parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    return path


def test_our_own_examples():
    examples = load_examples(OWN)
    assert len(examples) == len(ROWS) >= 24
    for example, row in zip(examples, ROWS, strict=True):
        assert [example.activity_label, example.ctx_a, example.ctx_b, example.ctx] == [
            row["activity_label"], row["ctx_a"], row["ctx_b"], row["ctx"]
        ]  # fmt: skip
        assert list(example.endings) == row["endings"]
        assert example.label == int(row["label"])
    assert {example.label for example in examples} == {0, 1, 2, 3}
    assert load_examples(OWN, 5) == examples[:5]


def test_all_file_formats_agree(tmp_path: Path):
    full = load_examples(OWN)
    assert load_examples(write_parquet(tmp_path / "own.parquet")) == full
    # As the authors published it: labels are numbers.
    lines = [json.dumps(row | {"label": int(row["label"])}) for row in ROWS]
    (tmp_path / "own.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    assert load_examples(str(tmp_path / "own.jsonl")) == full


def without(name: str) -> dict:
    return {key: value for key, value in ROWS[0].items() if key != name}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (without("ctx_a"), "row 2: ctx_a must be strings; found the fields"),
        (without("endings"), "row 2: endings must be 4 strings, found None"),
        (ROWS[0] | {"endings": ["a", "b", "c"]}, "endings must be 4 strings"),
        (ROWS[0] | {"label": ""}, "label must be 0 to 3, found ''; the test split has no labels"),
        (ROWS[0] | {"label": 4}, "label must be 0 to 3, found '4'"),
        ([1], "expected an object with HellaSwag's fields"),
    ],
)
def test_invalid_rows(row: object, message: str, tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_examples(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"{\n", "line 1 is not valid JSON"),
        ("x.jsonl", b"", "has no examples"),
        ("x.jsonl", b"\xff\xfe", "cannot read"),
        ("x.parquet", b"PAR1", "not a readable parquet file"),
        ("x.csv", b"", "must end in .jsonl or .parquet"),
        ("x.jsonl", None, "no HellaSwag file at"),
    ],
)
def test_unreadable_files(name: str, content: bytes | None, message: str, tmp_path: Path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_examples(tmp_path / name)


# -- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, temp_data: Path) -> Iterator[HubServer]:
    monkeypatch.setattr(fetching.time, "sleep", lambda seconds: None)
    with HubServer() as server, server.reached(monkeypatch, tmp_path / "home"):
        yield server


def published(hub: HubServer, tmp_path: Path) -> SourceFile:
    """Our rows in the Hub's place, pinned as the real ones are."""
    content = write_parquet(tmp_path / "made.parquet").read_bytes()
    commit = hub.add_dataset("Rowan/hellaswag", {"data/validation-00000-of-00001.parquet": content})
    where = f"hf://datasets/Rowan/hellaswag@{commit}/data/validation-00000-of-00001.parquet"
    return replace(PINNED, location=where, size_bytes=len(content), digest=hashlib.sha256(content).hexdigest())


def test_downloads_once_and_verifies(hub: HubServer, tmp_path: Path, temp_data: Path):
    pinned = published(hub, tmp_path)
    assert load_examples(pinned=pinned) == load_examples(OWN)
    assert (temp_data / "downloads/hellaswag/validation-00000-of-00001.parquet").is_file()
    requests = len(hub.seen("/"))
    hub.down()
    assert load_examples(None, 3, pinned) == load_examples(OWN, 3)
    assert len(hub.seen("/")) == requests


def test_wrong_hash_is_rejected(hub: HubServer, tmp_path: Path, temp_data: Path):
    pinned = replace(published(hub, tmp_path), digest="0" * 64)
    with pytest.raises(UserError, match=r"could not download HellaSwag: .*sha256 .* expected 0000.*--hellaswag-file"):
        load_examples(pinned=pinned)
    assert not list(temp_data.rglob("*.parquet"))


def test_unreachable_hub(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pinned, waits = published(hub, tmp_path), []
    hub.down()
    monkeypatch.setattr(fetching.time, "sleep", waits.append)
    with pytest.raises(UserError, match=r"could not download HellaSwag: cannot download .*--eval.hellaswag-file"):
        load_examples(pinned=pinned)
    assert sum(waits) < 10  # a run waits for it


def test_pinned_file():
    assert PINNED.location == (
        "hf://datasets/Rowan/hellaswag@218ec52e09a7e7462a5400043bb9a69a41d06b76/data/validation-00000-of-00001.parquet"
    )
    assert PINNED.digest == "899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd"
