"""Two ranks under torchrun, as on a cluster: one killed, all killed, told to stop; and a second run in their folder."""

import json
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import launch, with_train, write_run_config
from support.fault_runs import assert_tidy, record, run_of
from support.paused_training import PROGRAM, Pause, variables

from myllm.checkpoint.layout import newest_step
from myllm.cli import trials
from myllm.cli.prove_resume.training_process import TrainingProcess, wait_until_gone
from myllm.config import RunConfig

pytestmark = pytest.mark.slow  # real processes, half a minute and more in all

STEPS = 60
SAVE_EVERY = 5
SEED = 5


@pytest.fixture(scope="module")
def two(config: RunConfig, place: Path, dataset: object) -> Path:
    return write_run_config(with_train(config, max_steps=STEPS, save_every_steps=SAVE_EVERY), place / "two.json")


@pytest.fixture
def start(two: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainingProcess]:
    """Starts a run. One that is to be hit pauses some steps later, so that it is not over before a slow machine is
    there."""
    checkout = place / "checkout"
    checkout.mkdir()
    (checkout / "pretrain.py").symlink_to(PROGRAM)
    monkeypatch.setattr(trials, "project_root", lambda: checkout)

    def start(name: str, *pauses: Pause) -> TrainingProcess:
        for variable, value in variables(*pauses).items():
            monkeypatch.setenv(variable, value)
        return TrainingProcess.start(two, name, place / "temp_data", ranks=2)

    return start


def end(training: TrainingProcess, everybody: list[int]) -> tuple[int, int]:
    """Wait for an end that was begun; nothing may live on. The exit code, and the step that was saved last."""
    code = training.process.wait(120)
    wait_until_gone(everybody)
    saved = newest_step(training.run.checkpoints)
    assert max(record(training.run), default=0) - saved <= 2 * SAVE_EVERY
    return code, saved


def test_two_ranks_resume_after_repeated_kills(two: Path, place: Path, start: Callable[..., TrainingProcess]) -> None:
    whole = launch("--config", two, "--name", "two-whole", ranks=2)
    assert whole.returncode == 0, whole.stderr
    chance, training = random.Random(SEED), start("two-hit", Pause(10, place / "first"))

    # One rank dies: torchrun ends the other.
    assert training.wait_for_step(chance.randrange(2, 9))
    everybody, ranks = training.processes(), training.ranks()
    assert len(ranks) == 2
    psutil.Process(ranks[chance.randrange(2)]).kill()
    code, saved = end(training, everybody)
    assert code != 0
    resumed_from = [saved]

    # A second start of a suspended run is refused, and the run continues. Then all die at once.
    pause = Pause(chance.randrange(11, 18), place / "second")
    training = start("two-hit", pause, Pause(40, place / "third"))
    assert training.wait_for_step(pause.step)
    psutil.Process(training.ranks()[0]).suspend()
    pause.go_on()
    second = launch("--config", two, "--name", "two-hit")
    psutil.Process(training.ranks()[0]).resume()
    assert second.returncode == 2
    assert "error: another process is training in" in second.stderr
    assert training.wait_for_step(max(record(training.run), default=0) + 1)
    everybody = training.processes()
    training.kill()
    code, saved = end(training, everybody)
    assert code == -9
    resumed_from.append(saved)

    # A scheduler's SIGTERM: saved where it is.
    pause = Pause(STEPS - 1, place / "fourth")
    training = start("two-hit", pause)
    assert training.wait_for_step(max(record(training.run), default=0) + 3)
    everybody = training.processes()
    training.process.send_signal(signal.SIGTERM)
    pause.go_on()
    _, saved = end(training, everybody)
    assert saved == max(record(training.run))
    resumed_from.append(saved)
    assert "saved; the same command resumes" in training.log.read_text()

    training = start("two-hit")
    training.finish(STEPS)
    assert record(training.run) == record(run_of(place, "two-whole"))
    assert_tidy(training.run.root)
    resume_steps = re.findall(r"resuming from .* at step (\d+)", training.run.log.read_text())
    assert [int(step) for step in resume_steps] == [step for step in resumed_from if step]  # from 0 nothing is resumed
    assert json.loads(training.run.environment.read_text())["world_size"] == 2
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(two) in (process.info["cmdline"] or [])]
    assert run_of(place, "two-hit") == training.run
