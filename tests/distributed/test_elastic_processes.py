"""The launcher with two real processes restarts what crashed, and only that."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, losses, with_train, write_run_config
from support.paused_training import PROGRAM, Pause, variables
from support.processes import with_words

from myllm.config import RunConfig

pytestmark = pytest.mark.slow  # real processes, half a minute and more in all

TORCHRUN = [sys.executable, "-m", "myllm.distributed.elastic", "--standalone", "--nproc_per_node=2", str(PROGRAM)]


class Started:
    """A launcher with two ranks, with output to a file."""

    def __init__(self, log: Path, *words: str | Path, pause: Pause | None = None) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")} | (variables(pause) if pause else {})
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*TORCHRUN, *map(str, words)], stdout=file, stderr=subprocess.STDOUT, env=environment
            )

    def rank(self, number: int) -> psutil.Process:
        ranks = with_words(psutil.Process(self.process.pid).children(), str(PROGRAM))
        return next(child for child in ranks if child.environ().get("RANK") == str(number))

    def wait_for(self, there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 240
        while not there():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def ended(self) -> tuple[int, str]:
        return self.process.wait(timeout=240), self.log.read_text()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Starts launchers and stops them after the test."""
    all_started: list[Started] = []

    def start(*words: str | Path, pause: Pause | None = None) -> Started:
        all_started.append(Started(tmp_path / f"launcher{len(all_started)}.txt", *words, pause=pause))
        return all_started[-1]

    yield start
    for launcher in all_started:
        for child in (
            psutil.Process(launcher.process.pid).children(recursive=True) if launcher.process.poll() is None else []
        ):
            child.kill()
        launcher.process.kill()


def test_killed_rank_restarts(
    small: RunConfig, tmp_path: Path, temp_data: Path, started: Callable[..., Started]
) -> None:
    """SIGKILL of one rank, and another run whose launcher gets SIGTERM and that the same command takes up: the same
    losses to the last bit. What --train.fresh moves aside, it moves aside once."""
    evals = replace(small.eval, cloze_every_steps=0, sample_every_steps=0, validation_every_steps=0)
    config = replace(with_train(small, max_steps=30, save_every_steps=5, batch_tokens=256), eval=evals)
    path = write_run_config(config, tmp_path / "config.json")
    run = temp_data / "runs/tiny"
    run.mkdir(parents=True)
    (run / "older").touch()

    pause = Pause(8, tmp_path / "killed")
    first = started("--config", path, "--train.fresh", pause=pause)
    first.wait_for(lambda: pause.reached(ranks=2) and (run / "checkpoints/step_00000005").is_dir())
    first.rank(1).send_signal(signal.SIGKILL)
    pause.go_on()
    code, output = first.ended()
    assert code == 0, output
    assert (run / "log.txt").read_text().count("resuming from") == 1
    asides = list(run.parent.glob("tiny.before-*"))
    assert [(aside / "older").is_file() for aside in asides] == [True]
    assert not (asides[0] / "metrics.jsonl").exists()

    other = temp_data / "runs/other"
    again = write_run_config(replace(config, name="other"), tmp_path / "other.json")
    pause = Pause(12, tmp_path / "told")
    second = started("--config", again, pause=pause)
    second.wait_for(lambda: pause.reached(ranks=2))
    second.process.send_signal(signal.SIGTERM)
    pause.go_on()
    code, output = second.ended()
    assert code == 128 + signal.SIGTERM, output
    assert "saved; the same command resumes" in output
    code, output = started("--config", again, "--train.max-wall-s", "0.01").ended()  # over before the first step
    assert code == 75, output
    assert output.count("run other on 2 x") == 1  # not started again
    code, output = started("--config", again).ended()
    assert code == 0, output
    assert (other / "log.txt").read_text().count("resuming from") == 2
    assert losses(run) == losses(other)
    assert losses(run).keys() == set(range(1, 31))
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(path) in (p.info["cmdline"] or [])]


def test_user_error_preserves_exit_code(temp_data: Path, started: Callable[..., Started]) -> None:
    code, output = started("debug", "--train.batch-tokens", "1000").ended()
    assert code == 2, output
    assert output.count("error: the config has") == 1
    assert "Traceback" not in output


def test_failing_rank_restarts_up_to_limit(tmp_path: Path) -> None:
    """A traceback restarts the rank; a deliberate code at the third start ends it with that code."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, sys\n"
        "count = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "from myllm.distributed.launcher import is_restart\n"
        "assert is_restart() == (count > 0)\n"
        "print('start', count, flush=True)\n"
        "sys.exit(int(sys.argv[1]) if count == int(sys.argv[2]) else 1)\n"
    )
    for code, at, starts in (("75", "2", 3), ("1", "0", 2)):
        words = ["--standalone", "--max-restarts=2" if at == "2" else "--max-restarts=1", str(script), code, at]
        done = subprocess.run(
            [sys.executable, "-m", "myllm.distributed.elastic", *words],
            capture_output=True, text=True, timeout=240, check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        )  # fmt: skip
        assert done.returncode == int(code), done.stderr
        assert done.stdout.count("start") == starts
    assert "rank 0 failed; see its traceback above; --max-restarts 1 are used up" in done.stderr


NAMELESS = """
import socket, sys
socket.getfqdn = lambda *_: "nowhere.invalid"
from myllm.distributed.elastic import main
sys.exit(main(["--standalone", "--nproc_per_node=2", "--max-restarts=0", sys.argv[1]]))
"""
MEETING = """
from datetime import timedelta
import torch.distributed as dist
dist.init_process_group("gloo", timeout=timedelta(seconds=20))
dist.destroy_process_group()
"""


def test_ranks_meet_where_machine_name_resolves_nowhere(tmp_path: Path) -> None:
    program = tmp_path / "meet.py"
    program.write_text(MEETING)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    words = [sys.executable, "-c", NAMELESS, str(program)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr
