"""A run that is stopped from outside, with real processes and real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT, command, launch, losses, with_train, write_run_config
from support.paused_training import PROGRAM, Pause, variables

from myllm.checkpoint.format import load_checkpoint
from myllm.checkpoint.layout import list_checkpoints
from myllm.config import RunConfig
from myllm.data.prepare.prepare import prepare
from myllm.distributed.collectives import DistContext, process_group
from myllm.errors import TIME_LIMIT, UserError, exit_code
from myllm.paths import RunPaths
from myllm.planning.config_checks import config_errors
from myllm.runs.heartbeat import Heartbeat, report_starting, status
from myllm.runs.run_dir import claim_run
from myllm.training import watchdog
from myllm.training.loop import train
from myllm.training.setup import RunContext
from myllm.training.stop_signals import StopRequest, handle_stop_signals
from myllm.training.watchdog import Watchdog, describe_hang

pytestmark = pytest.mark.usefixtures("prepared_data")

LIMIT_S = 3_600
# pretrain.py whose clock on the wall jumps back at the second step, and then, if it has one, its time limit is reached;
# or whose third step never comes back from C.
STUCK = f"""
import ctypes, sys, time
from types import SimpleNamespace
sys.path.insert(0, {str(ROOT)!r})
import pretrain
from myllm.training import loop as train, stop_signals
step, now, monotonic = train.train_step, time.time, time.monotonic
def stuck(trainer, number, *phase):
    if number == 1:
        time.time = lambda: now() - 1e6
        stop_signals.time = SimpleNamespace(monotonic=lambda: monotonic() + {LIMIT_S})
    if number == 2 and "--stuck" in words:
        lock = ctypes.create_string_buffer(64)
        ctypes.CDLL(None).pthread_mutex_lock(lock)
        print("stuck", flush=True)
        ctypes.CDLL(None).pthread_mutex_lock(lock)  # no signal interrupts this, as none does a collective
    return step(trainer, number, *phase)
words = list(sys.argv)
sys.argv = [word for word in words if word != "--stuck"]
train.train_step = stuck
if __name__ == "__main__":
    pretrain.main()
"""
DEADLINE_S = 240
"""For what a process does when it ends: a save, and a report, whose imports alone take long on a busy machine."""


def start(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(command("--config", path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_and_pause(path: Path, pause: Pause) -> subprocess.Popen[str]:
    """A run that has logged the step of the pause, and waits there."""
    process = subprocess.Popen(
        [sys.executable, PROGRAM, "--config", path], env=os.environ | variables(pause),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_until(pause.reached, process)
    return process


@pytest.fixture
def long(small: RunConfig, tmp_path: Path) -> RunConfig:
    """Long enough to be hit in the middle."""
    evals = replace(small.eval, cloze_every_steps=0, sample_every_steps=0, validation_every_steps=0)
    config = replace(with_train(small, max_steps=60, save_every_steps=10), eval=evals)
    write_run_config(config, tmp_path / "long.json")
    write_run_config(replace(config, name="whole"), tmp_path / "whole.json")
    return config


@pytest.mark.slow
def test_interrupted_three_times_equals_uninterrupted(long: RunConfig, tmp_path: Path, temp_data: Path) -> None:
    """Ctrl-C, kill -9, and a scheduler's SIGTERM: the same command each time, and losses as if nothing had happened."""
    run = temp_data / "runs" / "tiny"
    for number, step in ((signal.SIGINT, 7), (signal.SIGKILL, 24), (signal.SIGTERM, 43)):
        pause = Pause(step, tmp_path / f"pause{step}")
        process = start_and_pause(tmp_path / "long.json", pause)
        process.send_signal(number)
        pause.go_on()
        output, _ = process.communicate(timeout=DEADLINE_S)
        if number == signal.SIGKILL:
            assert process.returncode == -9
            continue
        # Polite signals save where they are.
        assert process.returncode == 128 + number, output
        newest = load_checkpoint(list_checkpoints(run / "checkpoints")[0])
        assert newest.state.step == max(losses(run)) >= step
        assert f"stopped after step {newest.state.step}, saved" in output
        assert "Traceback" not in output
    assert launch("--config", tmp_path / "long.json", report=True).returncode == 0
    assert launch("--config", tmp_path / "whole.json").returncode == 0
    assert losses(run) == losses(temp_data / "runs" / "whole")
    assert (run / "log.txt").read_text().count("resuming from") == 3
    assert (run / "report.html").is_file()
    assert not [path for path in run.rglob("*") if path.name.startswith(".partial") or path.suffix == ".tmp"]
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path / "long.json") in (p.info["cmdline"] or [])]


def wait_until(happened: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def doing(run: Path) -> str | None:
    path = run / "heartbeat.json"
    return json.loads(path.read_text())["doing"] if path.is_file() else None


@pytest.mark.slow
def test_signal_interrupts_long_evaluation(long: RunConfig, tiny: RunConfig, tmp_path: Path, temp_data: Path) -> None:
    """SIGUSR1 says "start me again". The interrupted evaluation has no row, and is done after the resume."""
    run = temp_data / "runs" / "tiny"
    endless = replace(long.eval, sample_every_steps=5, sample_new_tokens=10**8)
    # In so large a vocabulary the end of the text is rare.
    config = with_train(replace(long, eval=endless, model=tiny.model, data=tiny.data), max_steps=5)
    process = start(write_run_config(config, tmp_path / "endless.json"))
    wait_until(lambda: doing(run) == "evaluating", process)
    assert status("tiny", 600)[1] == 3
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 75, output
    assert "ended: stopped by SIGUSR1 after step 0\n" in output
    assert status("tiny", 600) == ("step 0: stopped by SIGUSR1 after step 0", 75)
    assert not (run / "samples.jsonl").exists()
    short = replace(config, eval=replace(endless, sample_new_tokens=4))
    done = launch("--config", write_run_config(short, tmp_path / "short.json"))
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["step"] for line in (run / "samples.jsonl").read_text().splitlines()] == [0, 5]
    assert "ended: complete, after step 5" in done.stdout + done.stderr
    assert status("tiny", 600)[1] == 0


@pytest.mark.slow
def test_time_limit_and_second_interrupt(long: RunConfig, tmp_path: Path, temp_data: Path) -> None:
    """With a clock that jumps back. The limit saves in time; the second Ctrl-C is heard although the main thread never
    comes back from C."""
    (tmp_path / "stuck.py").write_text(STUCK)
    words = [sys.executable, tmp_path / "stuck.py", "--config", tmp_path / "long.json"]
    limited = [*words, "--train.max-wall-s", str(LIMIT_S), "--train.save-every-steps", "0"]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 75, done.stderr
    assert "ended: stopped by the time limit, train.max_wall_s 1:00:00 after step 2" in done.stdout
    run = temp_data / "runs" / "tiny"
    assert load_checkpoint(list_checkpoints(run / "checkpoints")[0]).state.step == max(losses(run))
    again = [*words, "--name", "stuck", "--stuck"]
    process = subprocess.Popen(again, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if "stuck" in line and "run " not in line:
            break
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    deadline = time.monotonic() + DEADLINE_S
    while process.poll() is None and time.monotonic() < deadline:  # the system makes one of two that come too fast
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert "Exiting without saving" in output


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGQUIT", 131), ("SIGUSR1", 75), ("SIGUSR2", 75),
        ("SIGXCPU", 75),
    ],
)  # fmt: skip
def test_stop_signal_exit_codes(name: str, code: int) -> None:
    number = signal.Signals[name]
    before = signal.signal(number, signal.SIG_DFL)  # a shell that runs the tests under nohup ignores SIGHUP
    try:
        with handle_stop_signals() as stop:
            os.kill(os.getpid(), number)
            assert stop.requested()
            assert stop.signal == number
        assert exit_code(stop.signal) == code
    finally:
        signal.signal(number, before)


def test_time_limit_reserves_time_for_save() -> None:
    now = time.monotonic()
    assert not StopRequest(deadline=now + 100, save_s=40).requested()
    request = StopRequest(deadline=now + 100, save_s=80)
    assert request.requested()
    assert request.signal == TIME_LIMIT
    assert exit_code(TIME_LIMIT) == exit_code(signal.SIGUSR1) == 75
    assert exit_code(signal.SIGTERM) == 143
    with handle_stop_signals(max_wall_s=10, started=now - 10) as stop:
        assert stop.requested()
    assert len(config_errors(with_train(RunConfig(), max_wall_s=0.0, collective_timeout_s=-1.0), 1)) == 2


def test_unwritable_heartbeat_does_not_raise(tmp_path: Path, temp_data: Path) -> None:
    (tmp_path / "file").touch()
    beat = Heartbeat(tmp_path / "file" / "heartbeat.json")
    beat.write(now=True)
    assert "cannot write" in beat.unwritable
    beat.end("complete", 0)
    with pytest.raises(UserError, match="no heartbeat of run 'unknown'"):
        status("unknown", 600)


def test_status_detects_stalled_and_dead_runs(temp_data: Path) -> None:
    run = temp_data / "runs" / "seen"
    run.mkdir(parents=True)
    beat = Heartbeat(run / "heartbeat.json")
    beat.reached(7)
    beat.write(now=True)
    assert status("seen", 600)[1] == 3
    assert status(str(run), -1)[1] == 1  # has not got on for too long
    gone = subprocess.Popen(["true"])
    gone.wait()
    values = json.loads((run / "heartbeat.json").read_text()) | {"pid": gone.pid}
    (run / "heartbeat.json").write_text(json.dumps(values))
    line, code = status("seen", 600)
    assert code == 1
    assert line.startswith("step 7: training; but process")
    assert [path.name for path in run.iterdir()] == ["heartbeat.json"]


def test_status_ignores_unrelated_folder(temp_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seen").mkdir()
    run = RunPaths(temp_data / "runs" / "seen")
    run.root.mkdir(parents=True)
    with pytest.raises(UserError, match=f"expected {run.heartbeat}"):
        status("seen", 600)
    Heartbeat(run.heartbeat, 4).end("complete, after step 4", 0)
    assert status("seen", 600) == ("step 4: complete, after step 4", 0)


def test_failed_start_preserves_complete_status(temp_data: Path) -> None:
    run = RunPaths(temp_data / "runs" / "seen")
    run.root.mkdir(parents=True)
    (run.checkpoints / "step_00000004").mkdir(parents=True)
    for how, code, after in (
        ("complete, after step 4", 0, ("step 4: complete, after step 4", 0)),
        ("stopped, after step 4", 75, ("step 4: failed: no such data: ...", 2)),
    ):
        Heartbeat(run.heartbeat, 4).end(how, code)
        with suppress(UserError), report_starting(run, active=True):
            wait_for(lambda: status("seen", 600)[1] == 3)
            assert status("seen", 600)[0].startswith("step 4: starting, ")
            raise UserError("no such data:\n  - this one\n  - that one")
        assert status("seen", 600) == after
    with suppress(UserError), report_starting(run, active=True) as taken_over:
        taken_over()
        Heartbeat(run.heartbeat, 5).end("failed: in the loop", 65)
        raise UserError("said already")
    assert status("seen", 600) == ("step 5: failed: in the loop", 65)
    held = pytest.raises(UserError, match="another process is training")
    with claim_run(run), held, report_starting(run, active=True):
        pass
    assert status("seen", 600)[1] == 65
    with report_starting(run, active=False), report_starting(RunPaths(temp_data / "new"), active=True):
        assert status("seen", 600)[1] == 65
    assert not (temp_data / "new").exists()


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_heartbeat_precedes_model_creation(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = RunPaths.of("tiny"), []
    run.root.mkdir(parents=True)
    Heartbeat(run.heartbeat, 9).end("complete, after step 9", 0)

    def build(*_: object) -> None:
        seen.append(status("tiny", 600))
        raise UserError("enough")

    monkeypatch.setattr("myllm.training.setup.Transformer", build)
    with process_group("cpu") as process, pytest.raises(UserError, match="enough"):
        train(tiny, prepare(tiny.data, progress=False), process)
    assert (seen[0][0][:17], seen[0][1]) == ("step 0: starting,", 3)


def test_suspension_is_no_hang(tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Suspended for hours, and resumed: the watchdog may look before the loop has made a step."""
    looks = iter((0.0, 1.0, 2.0, 3.0, 10_000.0, 10_001.0))
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=looks.__next__))
    ctx = RunContext.create(tiny, DistContext(0, 0, 1, torch.device("cpu")))
    heartbeat, loader = Heartbeat(tmp_path / "heartbeat.json"), SimpleNamespace(batches_taken=0)
    watching = Watchdog(ctx, heartbeat, loader, StopRequest())
    assert [watching._idle_s() for _ in range(5)] == [0.0, 1.0, 2.0, 4.0, 5.0]


def test_describe_hang_names_late_ranks() -> None:
    def report(step: int, taken: int, waits: bool) -> dict[str, object]:
        where = {"doing": "training", "location": "loader.py, line 1, next", "host": "node", "pid": 9}
        return {"progress": [step, taken, step], "in_collective": waits, **where}

    waiting, late = report(7, 14, True), report(7, 13, False)
    assert describe_hang([waiting, late, waiting], 60).startswith(
        "rank 1 did not arrive in 60 s; rank 1 is in step 8, training"
    )
    assert describe_hang([waiting, None], 60).startswith(
        "rank 1 did not arrive in 60 s; rank 1 is not responding; rank 0"
    )
    assert describe_hang([report(7, 14, False), waiting, waiting], 60).startswith(
        "rank 0 did not arrive"
    )  # by its stack
    assert describe_hang([late, waiting, late], 60).startswith("ranks 0, 2 did not arrive")
    assert describe_hang([waiting, waiting], 60).startswith("no progress on any rank for 60 s")
    reading = report(7, 14, False)  # a number from a GPU, whose all-reduce hangs
    assert describe_hang([reading, reading], 60).startswith(
        "no progress on any rank for 60 s; rank 0 is in step 8, training: loader.py, line 1, next (process 9 on node); "
        "rank 1 is in step 8"
    )
