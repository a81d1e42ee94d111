"""`myllm runs`: runs of an earlier version, with their own checkpoints, and processes that hold them."""

import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from support.run_files import train_row, validation_row

from myllm.cli.main import main
from myllm.files import file_lock
from myllm.runs.catalog import newest_rows


@pytest.fixture
def runs(temp_data: Path) -> Path:
    """The runs `done` and `diverged`, and their data set."""
    shutil.copytree(ROOT / "tests/earlier/b351187", temp_data)
    return temp_data / "runs"


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    main(["runs", "--json"])
    return {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}


def write_heartbeat(run: Path, **changes: Any) -> None:
    now = time.time()
    values = {
        "step": 8, "doing": "training", "time": now, "progress_time": now, "pid": os.getpid(),
        "host": socket.gethostname(), "how": None, "exit_code": None,
    }  # fmt: skip
    (run / "heartbeat.json").write_text(json.dumps(values | changes))


# -- the list ---------------------------------------------------------------------------------------------------------


def test_numbers_of_a_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = listed(capsys)["done"]
    rows = [json.loads(line) for line in (runs / "done/metrics.jsonl").read_text().splitlines()]
    assert done["train_loss"] == [row["loss"] for row in rows if row["kind"] == "train"][-1]
    assert done["validation_loss"] == [row["loss"] for row in rows if row.get("name") == "validation"][-1]
    assert (done["step"], done["tokens"], done["state"]) == (8, 512, "complete")
    assert done["bytes"] == sum(path.stat().st_size for path in (runs / "done").rglob("*") if path.is_file())


def test_states(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beats: dict[str, dict[str, Any]] = {
        "runs": {},
        "elsewhere": {"host": "another", "pid": 1},
        "silent": {"host": "another", "progress_time": time.time() - 1_000},
        "killed": {"pid": 2**22 + 1},  # above the system's highest process id
        "stopped": {"doing": "ended", "how": "stopped by SIGTERM", "exit_code": 143},
        "crashed": {"doing": "ended", "how": "failed: no", "exit_code": 1},
    }
    for name, beat in beats.items():
        (runs / name).mkdir()
        write_heartbeat(runs / name, **beat)
    (runs / "from-gpt2").mkdir()
    (runs / "from-gpt2/imported.json").write_text("{}")
    (runs / "empty").mkdir()
    states = {name: row["state"] for name, row in listed(capsys).items()}
    assert states == {
        "done": "complete", "diverged": "failed", "runs": "running", "elsewhere": "running",
        "silent": "not responding", "killed": "died", "stopped": "stopped", "crashed": "failed",
        "from-gpt2": "imported", "empty": "not known",
    }  # fmt: skip
    with file_lock(runs / "done/.lock"):
        assert listed(capsys)["done"]["state"] == "running"


def test_the_table_fits_eighty_columns(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = {"command": ["python", "pretrain.py", "lf-llm-269m-modern"]}
    (runs / "done/environment.json").write_text(json.dumps(command))
    main(["runs"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert "lf-llm-269m-modern" in next(line for line in lines if line.startswith("done"))


def test_an_empty_machine_and_a_wrong_word(temp_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["runs"])
    assert "no runs under" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["runs", "lst"])
    assert ended.value.code == 2
    assert "unknown command 'runs lst'" in capsys.readouterr().err


def test_newest_rows_skip_what_a_crash_cut_off(tmp_path: Path) -> None:
    rows = [validation_row(10, 4.0), *map(train_row, range(10, 2_000, 10)), {"kind": "overhead", "step": 1990}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "train", "step": 2000, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    train, validation = newest_rows(tmp_path / "metrics.jsonl")
    assert (train["step"], validation["step"]) == (1990, 10)
