"""Rows, lines and clocks."""

import json
import math
from pathlib import Path

import pytest
import torch

from myllm import metrics
from myllm.metrics import JsonLines, Log, Stopwatch, environment, perplexity


def test_rows_are_appended_and_read_back(tmp_path: Path) -> None:
    rows = JsonLines(tmp_path / "m.jsonl")
    assert list(rows.rows()) == []
    rows.append({"step": 1, "text": "é\n"})
    rows.append({"step": 2})
    assert list(rows.rows()) == [{"step": 1, "text": "é\n"}, {"step": 2}]
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 2


def test_a_line_cut_by_a_crash_is_left_out_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    rows = JsonLines(path)
    assert list(rows.rows()) == [{"step": 1}]
    rows.keep(lambda row: True)
    rows.append({"step": 2})
    assert list(rows.rows()) == [{"step": 1}, {"step": 2}]


def test_keep_drops_the_rest_in_one_step(tmp_path: Path) -> None:
    rows = JsonLines(tmp_path / "m.jsonl")
    for step in range(5):
        rows.append({"step": step})
    rows.keep(lambda row: row["step"] < 2)
    assert [row["step"] for row in rows.rows()] == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_log_of_another_rank_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Log(tmp_path / "log.txt", active=False)("nothing")
    assert not (tmp_path / "log.txt").exists()
    Log(tmp_path / "log.txt", active=True)("something")
    assert (tmp_path / "log.txt").read_text().endswith("  something\n")
    assert capsys.readouterr().out == "something\n"


def test_the_stopwatch_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    watch = Stopwatch(torch.device("cpu"))
    watch.start()
    now[0] += 3
    watch.stop()
    now[0] += 50  # an evaluation
    watch.start()
    now[0] += 4
    assert watch.lap() == 7
    now[0] += 2
    assert watch.lap() == 2


def test_perplexity() -> None:
    assert perplexity(0.0) == 1
    assert perplexity(math.log(50_257)) == pytest.approx(50_257)
    assert perplexity(1e4) == math.inf


def test_environment_can_be_written_as_json() -> None:
    values = json.loads(json.dumps(environment(torch.device("cpu"), 2)))
    assert values["world_size"] == 2
    assert values["versions"]["torch"] == torch.__version__
    assert values["device_name"]


def test_a_text_may_hold_what_ends_a_line_elsewhere(tmp_path: Path) -> None:
    rows = JsonLines(tmp_path / "m.jsonl")
    wanted = [{"step": step, "text": "a\u2028b\u2029c\u0085d\x0ce"} for step in range(2)]
    for row in wanted:
        rows.append(row)
    rows.keep(lambda row: True)
    assert list(rows.rows()) == wanted
