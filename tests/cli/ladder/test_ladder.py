"""A real ladder of 20-step runs: its budget, a kill in the middle, a second start, and more seeds."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
from conftest import write_corpora
from support import warm_start

from myllm.config import DataConfig, RunConfig
from myllm.data.prepare.prepare import prepare

RECIPES = ["lf-llm-269m", "lf-llm-269m-adamw"]
SIZE = (
    "--data.dataset files --widths 8 16 --head-dim 8 --layers 1 --seq-len 32 --batch-tokens 128 --validation-tokens 256"
)
WORDS = ["ladder", *RECIPES, *SIZE.split(), "--tokens", "1280", "--name", "t", "--jobs", "2"]


def run(*words: str) -> str:
    done = warm_start.run("-m", "myllm", *WORDS, *words)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def endings(temp_data: Path) -> dict[str, float]:
    """When each complete run ended."""
    beats = {path.parent.name: json.loads(path.read_text()) for path in temp_data.glob("runs/*/heartbeat.json")}
    beats = {name: beat for name, beat in beats.items() if not name.endswith("-speed")}
    return {name: beat["time"] for name, beat in beats.items() if beat["exit_code"] == 0}


@pytest.mark.slow
def test_killed_ladder_resumes_and_grows(small: RunConfig, temp_data: Path) -> None:
    plan = run("--seeds", "1", "--budget", "--rates", "own")
    assert "2 recipes x 2 widths x 1 lengths x 1 paired seed(s) = 4 runs" in plan
    assert "4 of 4 runs are left" in plan
    assert not list(temp_data.glob("runs/*"))  # the measurement left nothing

    words = [sys.executable, "-m", "myllm", *WORDS, "--seeds", "1", "--rates", "own"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 200
    while len(endings(temp_data)) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = endings(temp_data)

    assert "4/4" not in run("--seeds", "1")  # only what was left
    after = endings(temp_data)
    assert len(after) == 4
    assert before.items() <= after.items()
    found = json.loads((temp_data / "ladder/t/ladder.json").read_text())
    assert found["version"] == 1
    assert {cell["run"] for cell in found["cells"]} == set(after)
    assert {(cell["recipe"], cell["width"]) for cell in found["cells"]} == set(product(RECIPES, (8, 16)))
    assert "all 4 runs are there" in run("--seeds", "1")

    assert "needs 3 lengths" in run("--seeds", "2", "--finished")
    assert endings(temp_data) == after

    printed = run("--seeds", "2")
    assert "4 of 8 runs are left" in printed
    assert endings(temp_data).items() >= after.items()
    assert "needs 3 lengths" in printed


@pytest.mark.slow
def test_ladder_on_mixture(temp_data: Path, tmp_path: Path) -> None:
    """And one that would read a component too often is refused before its first run."""
    a, b = write_corpora(tmp_path / "corpora", a=4, b=24)
    data = prepare(DataConfig(source=f"{a}:0.1 {b}:0.9", val_tokens=300, workers=1), progress=False)
    words = ["--data.dataset", data.name, "--widths", "8", "--tokens", "1280", "--seeds", "1", "--rates", "own"]
    assert "2/2" in run(*words)
    for config in temp_data.glob("runs/ladder-t-*/config.json"):
        assert json.loads(config.read_text())["data"]["dataset"] == data.name
    words[1] = data.name.replace(":0.9", ":0.05").replace(":0.1", ":0.95")
    words[words.index("1280")] = str(data.known_train_tokens // 128 * 128)
    done = warm_start.run("-m", "myllm", *WORDS, *words)
    assert (done.returncode, "steps of this mixture read files-a" in done.stderr) == (2, True), done.stderr
