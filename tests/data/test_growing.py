"""Training that starts before its data are complete: the same losses, and a clear error if the data do not come."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, losses, write_corpus, write_run_config
from support import warm_start
from support.processes import with_words

from myllm.checkpoint.format import load_checkpoint
from myllm.checkpoint.layout import list_checkpoints
from myllm.config import DataConfig, EvalConfig, RunConfig
from myllm.data.dataset import Dataset
from myllm.data.preparation_lock import BACKGROUND, is_being_prepared, preparation_lock
from myllm.data.prepare import background
from myllm.data.prepare.background import prepare_in_background
from myllm.data.prepare.prepare import prepare
from myllm.data.prepare.spec import make_spec
from myllm.errors import PrintedError, UserError

# pretrain.py without its report, with windows of 8 sequences and items of two files. A worker takes up an item only
# once the number in the file `gate` is larger than the item's, if there is such a file. All but the end runs in spawned
# processes too.
DRIVER = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import pretrain
pretrain.draw_report = lambda run: None
from myllm.data import sampler
from myllm.data.prepare import scheduler, work_items
sampler.WINDOW_TOKENS, work_items.SMALL_BYTES = 8 * 64, 3_000
gate, tokenize = Path(__file__).with_name("gate"), work_items.tokenize_item
def tokenize_item(item, paths, source, config, out, stop):
    while gate.exists() and int(gate.read_text() or 0) <= int(out.stem):
        time.sleep(0.02)
    tokenize(item, paths, source, config, out, stop)
tokenize_item.__module__ = work_items.__name__  # the name by which it is handed to a worker
work_items.tokenize_item = scheduler.tokenize_item = tokenize_item
if __name__ == "__mp_main__":
    time.sleep(float(os.environ.pop("START_DELAY_S", 0)))
if __name__ == "__main__":
    pretrain.main()
"""
STEPS = 45


class Runs:
    """Runs of one config in one temp_data/, whose preparation the test can hold."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config, self.run = folder, config, folder / "temp_data/runs" / config.name
        self.driver, self.config_file, self._gate = folder / "driver.py", folder / "run.json", folder / "gate"
        self.driver.write_text(DRIVER)
        write_run_config(config, self.config_file)
        self._started: list[subprocess.Popen[str]] = []

    def start(self, ranks: int = 1, *words: str, delay_s: float = 0) -> subprocess.Popen[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        process = subprocess.Popen(
            [sys.executable, *torchrun, str(self.driver), "--config", str(self.config_file), *words],
            env=os.environ | {"START_DELAY_S": str(delay_s)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        self._started.append(process)
        return process

    def open_gate(self, items: int | None = None) -> None:
        """Let the preparation take this many items; None: all."""
        if items is None:
            self._gate.unlink(missing_ok=True)
        else:
            (self.folder / "gate.new").write_text(str(items))
            (self.folder / "gate.new").replace(self._gate)

    def wait(self, process: subprocess.Popen[str], condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert process.poll() is None, process.communicate(timeout=240)[0]
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.02)

    def waits(self, times: int = 1) -> bool:
        log = self.run / "log.txt"
        return log.exists() and log.read_text().count("waiting for data") >= times

    def preparation(self) -> psutil.Process:
        """The preparation's process: the spawned one that is not a child of another spawned one."""
        running = [psutil.Process(process.pid) for process in self._started if process.poll() is None]
        children = [child for process in running for child in process.children(recursive=True)]
        spawned = with_words(children, "--multiprocessing-fork")
        [beside] = [child for child in spawned if child.parent() not in spawned]
        return beside

    def saved(self) -> int:
        return load_checkpoint(list_checkpoints(self.run / "checkpoints")[0]).state.step

    def end(self) -> None:
        for process in self._started:
            if process.poll() is None:  # torchrun puts each rank into a session of its own
                for member in [*psutil.Process(process.pid).children(recursive=True), process]:
                    with contextlib.suppress(psutil.NoSuchProcess):  # it ended with its parent
                        member.kill()
            process.communicate(timeout=240)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=240)
    assert "Traceback" not in output or process.returncode not in (0, 2), output
    return process.returncode, output


@pytest.fixture
def runs(tiny: RunConfig, tmp_path: Path) -> Iterator[Runs]:
    """About 80 sequences an epoch, two a step: the run continues into the second epoch. Validation is chosen
    when six items (twelve documents) are tokenized."""
    source = write_corpus(tmp_path / "growing", documents=30, words=120)
    data = DataConfig(source=f"files:{source}", val_tokens=190, shard_tokens=700, workers=1)
    found = Runs(tmp_path, replace(
        tiny, data=data, train=replace(tiny.train, max_steps=STEPS, save_every_steps=0),
        eval=EvalConfig(
            validation_every_steps=30, validation_tokens=256, cloze_every_steps=0, hellaswag_every_steps=0,
            sample_every_steps=0,
        ),
    ))  # fmt: skip
    yield found
    found.end()


def expect_losses_of_finished_data(runs: Runs, ranks: int) -> None:
    """The same run once more, from its first step, on the data set that is whole by now."""
    words = ("--config", runs.config_file, "--name", "whole")
    done = warm_start.run(runs.driver, *words, ranks=ranks if ranks > 1 else None)
    assert done.returncode == 0, done.stderr
    assert "preparation continues" not in done.stdout
    assert losses(runs.run) == losses(runs.run.with_name("whole"))
    assert len(losses(runs.run)) == STEPS
    [folder] = [path for path in (runs.folder / "temp_data/datasets").iterdir() if path.is_dir()]
    assert not (folder / "work").exists()
    assert not (folder / "progress.json").exists()


@pytest.mark.slow
def test_training_during_preparation_matches_complete_data(runs: Runs) -> None:
    runs.open_gate(7)
    process = runs.start()
    runs.wait(process, runs.waits)
    done = losses(runs.run)
    assert 0 < len(done) < STEPS, "it started before the data were complete"
    runs.open_gate()
    code, output = finish(process)
    assert code == 0, output
    assert "preparation continues during training" in output
    assert output.count("training tokens so far, from") >= 2
    expect_losses_of_finished_data(runs, 1)


@pytest.mark.slow
def test_resume_after_interrupt_and_killed_preparation(runs: Runs) -> None:
    """Ctrl-C; a preparation that is killed; then one that takes long to begin again."""
    runs.open_gate(7)
    process = runs.start()
    runs.wait(process, runs.waits)
    os.killpg(process.pid, signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    first = runs.saved()
    assert f"stopped after step {first}, saved" in output
    assert first == max(losses(runs.run)) > 0

    runs.open_gate(10)
    process = runs.start()
    runs.wait(process, lambda: f'"step": {first + 1}, "tokens"' in (runs.run / "metrics.jsonl").read_text())
    runs.preparation().kill()
    code, output = finish(process)
    assert code == 2, output
    assert "error: the preparation of" in output
    assert "run the same command again: finished work is kept" in output
    assert runs.saved() == max(losses(runs.run)) > first

    runs.open_gate()
    code, output = finish(runs.start(delay_s=6))
    assert code == 0, output
    assert f"resuming from {list_checkpoints(runs.run / 'checkpoints')[-1].parent}" in output
    expect_losses_of_finished_data(runs, 1)


@pytest.mark.slow
def test_two_ranks_resume_after_killed_preparation(runs: Runs) -> None:
    runs.open_gate(7)
    process = runs.start(2)
    runs.wait(process, runs.waits)
    runs.preparation().kill()
    output, _ = process.communicate(timeout=240)  # torchrun's own traceback is among it
    assert process.returncode != 0
    assert output.count("error: the preparation of") == 1, output
    assert runs.saved() == max(losses(runs.run)) > 0
    runs.open_gate()
    code, output = finish(runs.start(2))
    assert code == 0, output
    expect_losses_of_finished_data(runs, 2)


def test_killed_training_stops_preparation(runs: Runs) -> None:
    runs.open_gate(7)
    process = runs.start()
    runs.wait(process, runs.waits)
    preparation = runs.preparation()
    family = [preparation, *preparation.children(recursive=True)]
    process.kill()
    process.wait(timeout=240)
    assert len(family) >= 2, "the preparation and its worker"
    deadline = time.monotonic() + 240
    while not all(map(has_ended, family)):
        assert time.monotonic() < deadline, family
        time.sleep(0.02)


def has_ended(process: psutil.Process) -> bool:
    try:  # where nobody reaps orphans, as in some containers, they stay as zombies
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.slow
def test_too_few_sequences_raises_same_error(runs: Runs) -> None:
    words = ("--train.batch-tokens", "65536", "--train.micro-batch-size", "1")
    for _ in range(2):  # growing, then whole
        code, output = finish(runs.start(1, *words))
        assert code == 2, output
        assert "fewer than the 1,024 of one step; add text, or lower train.batch_tokens" in output


def test_too_little_text_reports_preparation_error(runs: Runs) -> None:
    for path in sorted((runs.folder / "growing").iterdir())[1:]:
        path.unlink()
    (runs.folder / "growing" / "000.txt").write_text("one word")
    code, output = finish(runs.start())
    assert code == 2
    assert "at most a tenth and needs two tokens; add text" in output
    assert output.count("error: ") == 1, "running it again would not help"


def test_preparation_error_reported_once(tiny: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["words"] * 9, "score": range(9)}), tmp_path / "rows.parquet")
    data = DataConfig(source=f"files:{tmp_path}/rows.parquet", text_column="score", workers=1)
    with pytest.raises(PrintedError, match="column 'score' is int64"), prepare_in_background(data, starts=True):
        pytest.fail("it began")
    assert capfd.readouterr().err.count("column 'score' is int64") == 1


def test_preparation_error_awaited() -> None:
    """Training sees the locks released first, and the error comes when the preparation's process gets to it."""
    training, preparation = multiprocessing.Pipe()
    threading.Timer(1.2, preparation.send, ["no text"]).start()
    with pytest.raises(PrintedError, match="no text"):
        background._raise_printed_error(training)


# -- looking at one another, in process -------------------------------------------------------------------------------


@pytest.fixture
def growing(tiny: RunConfig) -> Dataset:
    """A data set that was interrupted, and nobody is at work on."""
    folder = prepare(tiny.data, progress=False).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"] = manifest["shards"][:3]
    (folder / "progress.json").write_text(json.dumps(manifest | {"progress": {"done_bytes": 1, "source_bytes": 4}}))
    (folder / "manifest.json").unlink()
    (folder / "work").mkdir()
    return Dataset.open(folder, allow_incomplete=True)


def test_preparation_lock_marks_active_preparation(growing: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert not is_being_prepared(growing.folder)
    with pytest.raises(UserError, match=r"ended before the data set was complete.*run the same command again"):
        growing.raise_if_abandoned()
    for role in ("", BACKGROUND):
        with preparation_lock(growing.folder, role):
            assert is_being_prepared(growing.folder)
            growing.raise_if_abandoned()
        assert not is_being_prepared(growing.folder)
    assert not is_being_prepared(growing.folder.with_name("never")), "asking makes no file"
    assert not list(growing.folder.parent.glob(".never*"))


def test_incomplete_dataset_requires_running_preparation(
    growing: Dataset, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process of this machine starts the preparation; until it does, nothing is there to rely on."""
    monkeypatch.setattr(background, "PATIENCE_S", 0.5)
    with (
        pytest.raises(UserError, match="ended before the data set was complete"),
        prepare_in_background(tiny.data, starts=False),
    ):
        pytest.fail("it began")
    with preparation_lock(growing.folder), prepare_in_background(tiny.data, starts=False) as dataset:
        assert not dataset.complete
        assert dataset.describe_progress() == f"{dataset.train.tokens:,} training tokens so far, from 25% of 0.0 MB"


def test_complete_dataset_starts_no_preparation(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "get_context", None)
    folder = prepare(tiny.data, progress=False).folder
    assert folder == make_spec(tiny.data).folder
    (folder / "work").mkdir()
    with prepare_in_background(tiny.data, starts=True) as dataset:
        assert dataset.complete
    assert not (folder / "work").exists()


def test_background_preparation_lowers_priority(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers, one a core, would else be as many as all ranks' threads together."""
    done: list[str] = []
    monkeypatch.setattr(os, "nice", lambda by: done.append(f"nice {by}"))
    monkeypatch.setattr(background, "init_worker", lambda: done.append("started"))
    monkeypatch.setattr(background, "prepare", lambda *_: done.append("prepared"))
    background._prepare(tiny.data, tmp_path / "made", False, None)
    assert done == ["nice 10", "started", "prepared"]
