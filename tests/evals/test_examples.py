"""The rows of each task from a file or from the Hub, and what is said where they cannot be had."""

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
from myllm.errors import UserError
from myllm.evals.examples import CONVERTED, load_questions
from myllm.evals.tasks import TASKS, Task, nanogpt_hellaswag_question

OWN = Path(__file__).with_name("hellaswag_own.jsonl")
ROWS = [json.loads(line) for line in OWN.read_text(encoding="utf-8").splitlines()]


def write_parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    return path


def load_examples(file: str | Path | None = None, count: int | None = None, task: Task | None = None) -> list:
    return load_questions("hellaswag", file, count, task)


def test_our_own_examples():
    task = replace(TASKS["hellaswag"], question=nanogpt_hellaswag_question)
    questions = load_examples(OWN, task=task)
    assert len(questions) == len(ROWS) >= 24
    for question, row in zip(questions, ROWS, strict=True):
        assert question.contexts == (row["ctx"],)
        assert list(question.endings) == row["endings"]
        assert question.answer == int(row["label"])
    assert {question.answer for question in questions} == {0, 1, 2, 3}
    assert load_examples(OWN, 5, task) == questions[:5]


@pytest.mark.parametrize("name", TASKS)
def test_samples_are_rows(name: str, tmp_path: Path):
    """The sample of each task, which error messages show, is a row that its reader takes, in both formats."""
    row = TASKS[name].sample
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    (question,) = load_questions(name, tmp_path / "x.jsonl")
    assert load_questions(name, tmp_path / "x.parquet") == [question]
    assert 0 <= question.answer < len(question.endings)
    for field in row:  # without any of its fields it is none
        wrong = {key: value for key, value in row.items() if key != field}
        (tmp_path / "x.jsonl").write_text(json.dumps(wrong) + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"x\.jsonl, row 1: expected the fields .*, as in \{.*; found \{"):
            load_questions(name, tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("arc-easy", {"answerKey": "E"}, "answerKey is 'E', expected one of A, B, C, D"),
        ("arc-easy", {"choices": {"text": [], "label": []}}, "expected the fields question, choices, answerKey"),
        ("piqa", {"label": -1}, "label is '-1', expected one of 0, 1; test splits may have no labels"),
        ("winogrande", {"answer": ""}, "answer is '', expected one of 1, 2"),
        ("winogrande", {"sentence": "No gap."}, "the sentence 'No gap.' has no gap _"),
        ("lambada", {"text": ["a", "b"]}, "expected the fields text"),
    ],
)
def test_impossible_values(name: str, changes: dict, message: str, tmp_path: Path):
    (tmp_path / "x.jsonl").write_text(json.dumps(TASKS[name].sample | changes), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_questions(name, tmp_path / "x.jsonl")
    assert message in str(caught.value)


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
        (without("ctx_a"), "row 2: expected the fields activity_label, ctx_a, ctx_b, ctx, label, endings, as in {"),
        (without("endings"), "row 2: expected the fields activity_label"),
        (ROWS[0] | {"endings": ["a", 2, "c", "d"]}, "row 2: expected the fields activity_label"),
        (ROWS[0] | {"endings": ["a", "b", "c"], "label": 3}, "label is '3', expected one of 0, 1, 2"),
        (ROWS[0] | {"label": ""}, "label is '', expected one of 0, 1, 2, 3; test splits may have no labels"),
        (ROWS[0] | {"label": 4}, "label is '4', expected one of 0, 1, 2, 3"),
        ([1], "row 2: expected the fields activity_label"),
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
        ("x.jsonl", None, "no hellaswag file at"),
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


def published(hub: HubServer, tmp_path: Path) -> Task:
    """Our rows in the Hub's place, pinned as the real ones are."""
    content, task = write_parquet(tmp_path / "made.parquet").read_bytes(), TASKS["hellaswag"]
    assert task.pinned
    commit = hub.add_dataset("Rowan/hellaswag", {"data/validation-00000-of-00001.parquet": content})
    where = f"hf://datasets/Rowan/hellaswag@{commit}/data/validation-00000-of-00001.parquet"
    digest = hashlib.sha256(content).hexdigest()
    return replace(task, pinned=replace(task.pinned, location=where, size_bytes=len(content), digest=digest))


def test_downloads_once_and_verifies(hub: HubServer, tmp_path: Path, temp_data: Path):
    task = published(hub, tmp_path)
    assert load_examples(task=task) == load_examples(OWN)
    assert (temp_data / "downloads/hellaswag/validation-00000-of-00001.parquet").is_file()
    requests = len(hub.seen("/"))
    hub.down()
    assert load_examples(None, 3, task) == load_examples(OWN, 3)
    assert len(hub.seen("/")) == requests


def test_wrong_hash_is_rejected(hub: HubServer, tmp_path: Path, temp_data: Path):
    task = published(hub, tmp_path)
    assert task.pinned
    task = replace(task, pinned=replace(task.pinned, digest="0" * 64))
    with pytest.raises(
        UserError, match=r"could not download Rowan/hellaswag: .*sha256 .* expected 0000.*hellaswag:FILE"
    ):
        load_examples(task=task)
    assert not list(temp_data.rglob("*.parquet"))


def test_unreachable_hub(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task, waits = published(hub, tmp_path), []
    hub.down()
    monkeypatch.setattr(fetching.time, "sleep", waits.append)
    with pytest.raises(UserError, match=r"could not download Rowan/hellaswag: cannot download .*--eval.hellaswag-file"):
        load_examples(task=task)
    assert sum(waits) < 10  # a run waits for it


def test_pinned_file():
    pinned = TASKS["hellaswag"].pinned
    assert pinned
    assert pinned.location == (
        "hf://datasets/Rowan/hellaswag@218ec52e09a7e7462a5400043bb9a69a41d06b76/data/validation-00000-of-00001.parquet"
    )
    assert pinned.digest == "899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd"


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if not task.pinned])
def test_the_hubs_parquet_branch(name: str, hub: HubServer, tmp_path: Path, temp_data: Path):
    """Only the split's file of the right config is downloaded, once."""
    task = TASKS[name]
    pq.write_table(pa.Table.from_pylist([task.sample] * 3), tmp_path / "rows.parquet")
    path = task.files.replace("*/", "plain_text/").replace("*.parquet", "0000.parquet")
    others = ("other/test/0000.parquet", path.replace("validation", "train").replace("test", "train"))
    hub.add_dataset(
        task.repo, {path: (tmp_path / "rows.parquet").read_bytes()} | dict.fromkeys(others, b"no"), ref=CONVERTED
    )
    assert len(load_questions(name)) == 3
    hub.down()
    assert len(load_questions(name, count=2)) == 2
    assert [file.relative_to(temp_data / "downloads" / name).as_posix() for file in temp_data.rglob("*.parquet")] == [
        path
    ]


def test_no_network(hub: HubServer, temp_data: Path):
    hub.down()
    with pytest.raises(UserError, match=r"could not download baber/piqa: .*Give its rows as a .*file: piqa:FILE in"):
        load_questions("piqa")
