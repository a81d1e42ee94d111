"""The rows of each task from a file or from the Hub, and what is said where they cannot be had."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.hub_server import HubServer
from support.public_tasks import publish_task

from myllm.data.sources import download as fetching
from myllm.errors import UserError
from myllm.evals.examples import load_questions
from myllm.evals.tasks import TASKS, Task, nanogpt_hellaswag_question

OWN = Path(__file__).with_name("hellaswag_own.jsonl")
ROWS = [json.loads(line) for line in OWN.read_text(encoding="utf-8").splitlines()]


def write_parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    return path


def load_examples(file: str | Path | None = None, count: int | None = None, task: Task | None = None) -> list:
    return load_questions("hellaswag", file, count, task)


def test_local_hellaswag_examples():
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
def test_task_samples_load_as_rows(name: str, tmp_path: Path):
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
        shown = (
            r"row 1: expected the fields .*, as in \{.*; found \{"
            if wrong
            else "has no examples; expected rows such as"
        )
        with pytest.raises(UserError, match=rf"x\.jsonl,? {shown}"):
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
def test_invalid_values_raise(name: str, changes: dict, message: str, tmp_path: Path):
    (tmp_path / "x.jsonl").write_text(json.dumps(TASKS[name].sample | changes), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_questions(name, tmp_path / "x.jsonl")
    assert message in str(caught.value)


def test_file_formats_match(tmp_path: Path):
    full = load_examples(OWN)
    assert load_examples(write_parquet(tmp_path / "own [1].parquet")) == full
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
        ([1], "as json: JSON parse error: Column() changed from object to string"),
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
        ("x.jsonl", b"{\n", "x.jsonl as json: JSON parse error: Missing a name for object member. in row 0"),
        ("x.jsonl", b"", "has no examples"),
        ("x.jsonl", b"\xff\xfe", "cannot read .*x.jsonl as json: JSON parse error"),
        ("x.parquet", b"PAR1", "cannot read .*x.parquet as parquet: Parquet file size is 4 bytes"),
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
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.endpoint)  # read at import
        yield server


@pytest.mark.parametrize("name", TASKS)
def test_hub_rows_match_datasets(name: str, hub: HubServer, tmp_path: Path, temp_data: Path):
    """Those that `datasets` loads for lm-eval's configuration and split. Nothing else is downloaded, and that once."""
    rows = [TASKS[name].sample] * 3 if name != "hellaswag" else ROWS
    content = publish_task(hub, name, rows)
    repo, *config, split = TASKS[name].source.split(":")
    repo, _, revision = repo.partition("@")
    expected = datasets.load_dataset(repo, *config, split=split, revision=revision or None, streaming=True)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in expected))
    questions = load_questions(name)
    assert questions == load_questions(name, tmp_path / "rows.jsonl")
    assert len(questions) == len(rows)
    (file,) = (temp_data / "downloads" / name).rglob("*.parquet")
    assert file.read_bytes() == content
    requests = len(hub.seen("/"))
    hub.down()
    assert load_questions(name, count=2) == questions[:2]
    assert len(hub.seen("/")) == requests


def test_hellaswag_revision_pinned(hub: HubServer):
    """A newer commit changes nothing."""
    publish_task(hub, "hellaswag", ROWS)
    hub.add_dataset("Rowan/hellaswag", {"data/validation-0.parquet": b"newer"})
    assert TASKS["hellaswag"].source == "Rowan/hellaswag@218ec52e09a7e7462a5400043bb9a69a41d06b76:validation"
    assert load_examples() == load_examples(OWN)


def test_damaged_download_raises(hub: HubServer, temp_data: Path):
    """What arrives is not what the Hub listed."""
    content = publish_task(hub, "hellaswag", ROWS)
    blob = next(blob for blob in hub._blobs.values() if blob.content == content)
    hub._blobs[blob.sha256] = replace(blob, content=content[:-5] + b"wrong")
    with pytest.raises(UserError, match=r"could not download Rowan/hellaswag: .*sha256 .* expected .*hellaswag:FILE"):
        load_examples()
    assert not list(temp_data.rglob("*.parquet"))


@pytest.mark.parametrize("status", [503, None])
def test_unreachable_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch, status: int | None):
    waits: list[float] = []
    warns: list[bool] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        warns.append(logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING))

    hub.down(status)
    monkeypatch.setattr(fetching.time, "sleep", sleep)
    for name, message in (
        ("hellaswag", r"could not download Rowan/hellaswag: .*hellaswag:FILE in .*--eval.hellaswag-file"),
        ("piqa", r"could not download baber/piqa: .*Give its rows as a .*file: piqa:FILE in .*--eval.tasks"),
    ):
        with pytest.raises(UserError, match=message):
            load_questions(name)
        assert sum(waits) < 10  # a run waits for it
        assert not any(warns), "one message is enough"
        waits.clear()
