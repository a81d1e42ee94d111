"""Rows, lines and clocks."""

import json
import math
import sys
import threading
from pathlib import Path

import pytest
import torch

from myllm.distributed.terminal import ERASE
from myllm.runs import logs as metrics
from myllm.runs.eval_results import Result, add, read
from myllm.runs.history import column, read_metrics
from myllm.runs.logs import JsonlFile, Log, Stopwatch, environment, perplexity


def test_jsonl_round_trip(tmp_path: Path) -> None:
    rows = JsonlFile(tmp_path / "m.jsonl")
    assert list(rows.rows()) == []
    rows.append({"step": 1, "text": "é\n"})
    rows.append({"step": 2})
    assert list(rows.rows()) == [{"step": 1, "text": "é\n"}, {"step": 2}]
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 2


def test_truncated_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    rows = JsonlFile(path)
    assert list(rows.rows()) == [{"step": 1}]
    rows.keep(lambda row: True)
    rows.append({"step": 2})
    assert list(rows.rows()) == [{"step": 1}, {"step": 2}]


def test_keep_drops_other_rows(tmp_path: Path) -> None:
    rows = JsonlFile(tmp_path / "m.jsonl")
    for step in range(5):
        rows.append({"step": step})
    rows.keep(lambda row: row["step"] < 2)
    assert [row["step"] for row in rows.rows()] == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]


def test_inactive_log_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Log(tmp_path / "log.txt", active=False)("nothing")
    assert not (tmp_path / "log.txt").exists()
    Log(tmp_path / "log.txt", active=True)("something")
    assert (tmp_path / "log.txt").read_text().endswith("  something\n")
    assert capsys.readouterr().out == "something\n"


class Device:
    """A device that takes its time over queued work; the host does not wait unless it synchronises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.done = 100.0, 100.0
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.mps, "synchronize", self.synchronize)

    def queue(self, seconds: float) -> None:
        self.done = max(self.now, self.done) + seconds

    def synchronize(self, *_: object) -> None:
        self.now = max(self.now, self.done)


def test_stopwatch_separates_phases_from_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Device(monkeypatch)
    watch = Stopwatch(torch.device("cpu"))
    clock.now += 3
    with watch.timed("validation"):
        clock.now += 50
        with watch.timed("saving"):
            clock.now += 5
        clock.now += 1
    clock.now += 4
    assert watch.lap() == 7
    clock.now += 2

    def fail() -> None:
        with watch.timed("validation"):
            clock.now += 10
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now += 1
    assert watch.lap() == 3, "an error does not stop the clock"
    assert watch.seconds == {"training": 10, "validation": 61, "saving": 5}


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_stopwatch_synchronizes_device(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Work is charged to what queued it, however long after the host went on."""
    device = Device(monkeypatch)
    device.queue(20)  # before the clock begins
    watch = Stopwatch(torch.device(kind))
    device.queue(3)  # a step
    device.now += 0.01
    with watch.timed("validation"):
        device.queue(50)
        device.now += 0.01
    device.queue(4)
    assert watch.lap() == 7
    assert watch.seconds["validation"] == 50


def test_perplexity() -> None:
    assert perplexity(0.0) == 1
    assert perplexity(math.log(50_257)) == pytest.approx(50_257)
    assert perplexity(1e4) == math.inf


def test_environment_is_json_serializable() -> None:
    values = json.loads(json.dumps(environment(torch.device("cpu"), 2)))
    assert values["world_size"] == 2
    assert values["versions"]["torch"] == torch.__version__
    assert values["device_name"]


def test_unicode_line_separators_round_trip(tmp_path: Path) -> None:
    rows = JsonlFile(tmp_path / "m.jsonl")
    expected = [{"step": step, "text": "a\u2028b\u2029c\u0085d\x0ce"} for step in range(2)]
    for row in expected:
        rows.append(row)
    rows.keep(lambda row: True)
    assert list(rows.rows()) == expected


def test_log_lines_wrap_only_in_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    line = "validation at step 20: " + ", ".join(f"figure_{number} {number / 7:.4f}" for number in range(12))
    Log(tmp_path / "piped.txt", True)(line)
    assert capsys.readouterr().out == f"{line}\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Log(tmp_path / "watched.txt", True)(line)
    shown = capsys.readouterr().out.replace(ERASE, "").splitlines()
    assert len(shown) > 1
    assert max(map(len, shown)) <= 80
    assert [text[:4] for text in shown[1:]] == ["    "] * (len(shown) - 1)
    assert " ".join(" ".join(shown).split()) == line
    assert (tmp_path / "watched.txt").read_text().endswith(f"  {line}\n")


def test_non_finite_numbers_are_valid_json(tmp_path: Path) -> None:
    """Any reader of JSON takes the file; what is read back is what was written, as from files that hold bare NaN."""
    rows = JsonlFile(tmp_path / "metrics.jsonl")
    rows.append({"kind": "train", "step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})
    rows.append({"step": 1, "prompt": "nan", "text": "inf"})  # a sample
    old = '{"kind": "eval", "name": "validation", "step": 1, "loss": NaN, "perplexity": Infinity}\n'
    with rows.path.open("a") as file:
        file.write(old)

    def strict(name: str) -> None:
        raise AssertionError(name)

    for line in rows.path.read_text().splitlines()[:2]:
        json.loads(line, parse_constant=strict)
    for _ in range(2):
        train, sample, validation = rows.rows()
        assert math.isnan(train["loss"])
        assert (train["grad_norm"], train["lr"]) == (math.inf, -math.inf)
        assert (sample["prompt"], sample["text"]) == ("nan", "inf")
        assert math.isnan(validation["loss"])
        assert validation["perplexity"] == math.inf
        rows.keep(lambda row: True)
    for line in rows.path.read_text().splitlines():  # of a resume, the old line too
        json.loads(line, parse_constant=strict)
    read = read_metrics(rows.path)
    assert math.isnan(column(read.train, "loss")[0])
    assert column(read.train, "grad_norm")[0] == math.inf


def test_non_finite_eval_results_are_valid_json(tmp_path: Path) -> None:
    add(tmp_path / "eval.json", Result("a", "b", 1, "float32", {}, {"loss": math.nan}, "cpu", 1.0))
    assert '"loss": "nan"' in (tmp_path / "eval.json").read_text()
    assert [result.metrics for result in read(tmp_path / "eval.json")] == [{"loss": "nan"}]


def test_threads_append_every_line_once(tmp_path: Path) -> None:
    rows = JsonlFile(tmp_path / "rows.jsonl")
    start = threading.Barrier(8)

    def append(thread: int) -> None:
        start.wait()
        for index in range(100):
            rows.append({"step": index, "thread": thread})

    threads = [threading.Thread(target=append, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    appended = sorted((row["thread"], row["step"]) for row in rows.rows())
    assert appended == [(thread, index) for thread in range(8) for index in range(100)]
