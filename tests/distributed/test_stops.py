"""Two ranks under torchrun that are stopped, by signals to one, to all and to torchrun, or by a rank that hangs."""

import json
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
from support.processes import with_words

from myllm.checkpoint.format import load_checkpoint
from myllm.checkpoint.layout import list_checkpoints
from myllm.config import RunConfig
from myllm.runs.heartbeat import status

pytestmark = pytest.mark.slow  # real processes, half a minute and more in all

# pretrain.py without its report; the second rank of the run "asleep" sleeps before step 6.
DRIVER = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import pretrain
pretrain.draw_report = lambda run: None
from myllm.training import loop as train
step = train.train_step
def sleepy(trainer, number, *phase):
    if number == 5 and trainer.ctx.config.name == "asleep" and os.environ["RANK"] == "1":
        time.sleep(600)
    return step(trainer, number, *phase)
train.train_step = sleepy
if __name__ == "__main__":
    pretrain.main()
"""
ALL_SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


class Launched:
    """A torchrun and its two ranks."""

    def __init__(self, folder: Path, config: RunConfig, *options: str) -> None:
        (folder / "driver.py").write_text(DRIVER)
        path = write_run_config(config, folder / "run.json")
        self.run = folder / "temp_data/runs" / config.name
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
        words = [*torchrun, str(folder / "driver.py"), "--config", str(path)]
        self.said = (folder / "said.txt").open("w+")
        self.process = subprocess.Popen(words, stdout=self.said, stderr=subprocess.STDOUT, start_new_session=True)

    def wait_until(self, happened: Callable[[], object]) -> None:
        deadline = time.monotonic() + 240
        while not happened():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, "waited in vain: " + self.output()
            time.sleep(0.05)

    def beat(self) -> dict[str, object]:
        path = self.run / "heartbeat.json"
        return json.loads(path.read_text()) if path.is_file() else {"doing": None, "step": -1}

    def ranks(self) -> list[psutil.Process]:
        """By rank."""
        found = with_words(psutil.Process(self.process.pid).children(), "driver.py")
        return sorted(found, key=lambda process: int(process.environ()["RANK"]))

    def end(self) -> int:
        code = self.process.wait(timeout=240)
        assert not left(), self.output()
        return code

    def output(self) -> str:
        self.said.seek(0)
        return self.said.read()


def left(patience_s: float = 120) -> list[psutil.Process]:
    """Ranks that outlive their torchrun. They may need a moment to be gone."""
    deadline, me = time.monotonic() + patience_s, str(os.environ["MYLLM_DATA"])
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    process.pid != os.getpid()
                    and process.environ().get("MYLLM_DATA") == me
                    and process.status() != "zombie"
                ):
                    found.append(process)
            except psutil.Error:
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


@pytest.fixture
def config(small: RunConfig) -> Iterator[RunConfig]:
    evals = replace(small.eval, cloze_every_steps=0, sample_every_steps=0, validation_every_steps=0)
    yield replace(with_train(small, max_steps=20_000, save_every_steps=1_000), eval=evals)
    for process in left(0):
        process.kill()


def test_stopped_run_not_restarted(config: RunConfig, tmp_path: Path) -> None:
    """--max-restarts is for faults. In an evaluation on rank 0 alone one rank hears a signal; later torchrun does."""
    # Many prompts: so small a vocabulary soon comes to the end of a text.
    prompts = ("the river",) * 10_000
    endless = replace(config.eval, sample_every_steps=10_000, sample_new_tokens=10**8, sample_prompts=prompts)
    options = ("--max-restarts=2", ALL_SIGNALS)
    first = Launched(tmp_path, replace(config, eval=endless), *options)
    first.wait_until(lambda: first.beat()["doing"] == "evaluating")
    first.ranks()[1].send_signal(signal.SIGUSR1)
    assert first.end() == 0, first.output()
    assert status("tiny", 600) == ("step 0: stopped by SIGUSR1 after step 0", 75)

    second = Launched(tmp_path, config, *options)
    second.wait_until(lambda: second.beat()["step"] > 5)
    second.process.send_signal(signal.SIGUSR1)
    assert second.end() == 1  # torchrun's own, whatever its ranks say
    assert status("tiny", 600)[1] == 75, second.output()
    assert second.output().count("run tiny on 2 x") == 1
    saved = load_checkpoint(list_checkpoints(second.run / "checkpoints")[0]).state.step
    assert saved == max(losses(second.run)) > 5

    third = Launched(tmp_path, config)
    third.wait_until(lambda: third.beat()["step"] > saved)
    third.process.kill()  # nobody is left to forward a signal
    third.process.wait(timeout=240)
    assert not left(), third.output()
    assert status("tiny", 600)[1] == 143
    assert load_checkpoint(list_checkpoints(third.run / "checkpoints")[0]).state.step == max(losses(third.run)) > saved
    assert len(losses(third.run)) == max(losses(third.run))  # none twice, none missing


def test_hanging_rank_ends_all_ranks(config: RunConfig, tmp_path: Path) -> None:
    started = Launched(tmp_path, replace(with_train(config, collective_timeout_s=10.0), name="asleep"))
    assert started.end() == 1
    output = started.output()
    assert output.count("error: rank 1 did not arrive") == 1, output
    assert "rank 1 is in step 6, training: " in output
    assert "sleepy" in (started.run / "stacks/rank1.txt").read_text()
    assert "train_step" in (started.run / "stacks/rank0.txt").read_text()
    assert "rank 1 did not arrive" in (started.run / "log.txt").read_text()
    line, code = status("asleep", 600)
    assert code == 1
    assert "rank 1 did not arrive" in line


def test_unresponsive_rank_reported(config: RunConfig, tmp_path: Path) -> None:
    """Stopped as a whole, threads included: the other one says so."""
    unsaved = with_train(config, collective_timeout_s=10.0, save_every_steps=0)  # a save is given half an hour
    started = Launched(tmp_path, unsaved, "--shutdown-timeout=3")
    started.wait_until(lambda: started.beat()["step"] > 5)
    started.ranks()[0].suspend()
    assert started.end() == 1
    assert "error: rank 0 did not arrive" in started.output()
    assert "rank 0 is not responding; rank 1 waits in step" in started.output()
