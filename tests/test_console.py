"""Output for people never ends a run: terminals that go away, readers that leave, full disks, no output at all.

Real processes with real pipes and terminals; those of the first tests do without torch, and take a moment.
"""

import fcntl
import json
import os
import pty
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, command, losses, with_train, write_run_config

from myllm.checkpoint.format import load_checkpoint
from myllm.checkpoint.layout import list_checkpoints
from myllm.config import RunConfig
from myllm.data.prepare.prepare import prepare
from myllm.distributed.standard_streams import protect_output
from myllm.runs.heartbeat import status
from myllm.runs.logs import JsonlFile, LineFile, Log

TALKS = """
import sys
from pathlib import Path
from tqdm import tqdm
from myllm.distributed.standard_streams import output_failures, protect_output
protect_output(keep_going=True)
kept = open(sys.argv[1], "w")
bar = tqdm(total=3, mininterval=0)
for step in range(3):
    bar.update()
    tqdm.write("a line " * 100)
    print("a warning", file=sys.stderr, flush=True)
    sys.stdout.flush()
kept.write(str(sorted(output_failures())))
"""


def talk(folder: Path, stdout: int | None, stderr: int | None, close: str = "") -> tuple[int, str]:
    """The exit code of a program that talks, and what it wrote to a file."""
    words = ["sh", "-c", f'exec "$@" {close}', "sh", sys.executable, "-c", TALKS, str(folder / "kept")]
    process = subprocess.run(words, stdout=stdout, stderr=stderr, timeout=240, check=False)
    return process.returncode, (folder / "kept").read_text()


def broken_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_pipe() -> int:
    """Non-blocking, and nobody reads."""
    _, writer = os.pipe()
    os.set_blocking(writer, False)
    while True:
        try:
            os.write(writer, b" " * 4096)
        except BlockingIOError:
            return writer


def lost_terminal() -> int:
    ours, theirs = pty.openpty()
    os.close(ours)
    return theirs


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (broken_pipe, "Broken pipe"),
        (lost_terminal, "Input/output error"),
        (lambda: os.open("/dev/full", os.O_WRONLY), "No space left on device"),
        (full_pipe, "it does not accept more"),
    ],
    ids=["pipe", "terminal", "disk", "full pipe"],
)
def test_program_survives_broken_output(output: Callable[[], int], reason: str, tmp_path: Path) -> None:
    if reason.startswith("No space") and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    code, kept = talk(tmp_path, output(), output())
    assert code == 0
    assert kept == str([("stderr", reason), ("stdout", reason)])


def test_closed_descriptors_do_not_corrupt_files(tmp_path: Path) -> None:
    """A closed descriptor's number is given to the next file that is opened."""
    code, kept = talk(tmp_path, None, None, "<&- >&- 2>&-")
    assert (code, kept) == (0, "[]")


def test_lines_are_buffered_until_disk_has_space(tmp_path: Path) -> None:
    """Half of a line is taken back, and all come in order once there is room. It is said once."""
    messages: list[str] = []
    lines = LineFile(tmp_path / "log", messages.append)
    lines.append("first")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limit[1]))
    try:
        for number in range(3):
            lines.append(f"line {number}")
        assert (tmp_path / "log").read_text() == "first\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    lines.append("last")
    assert (tmp_path / "log").read_text().splitlines() == ["first", "line 0", "line 1", "line 2", "last"]
    assert len(messages) == 2
    assert messages[0].startswith(f"cannot write {tmp_path / 'log'}: File too large; training continues")


def test_failed_log_writes_do_not_raise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    protect_output()
    log = Log(tmp_path / "gone" / "log.txt", active=True)
    rows = JsonlFile(tmp_path / "gone" / "metrics.jsonl", log)
    for step in range(3):
        rows.append({"step": step})
        log(f"step {step}")
    stdout = capsys.readouterr().out
    assert stdout.count("cannot write") == 2
    (tmp_path / "gone").mkdir()
    rows.append({"step": 3})
    log("\udcff")
    assert [row["step"] for row in rows.rows()] == [0, 1, 2, 3]
    assert (tmp_path / "gone" / "log.txt").read_text().count("  step ") == 3
    with pytest.raises(FileNotFoundError):
        JsonlFile(tmp_path / "nowhere" / "rows.jsonl").append({})


# ---- runs


@pytest.fixture
def endless(tiny: RunConfig, tmp_path: Path) -> Path:
    """A config that never ends by itself, and saves nothing before it is stopped. Its data are there."""
    evals = replace(tiny.eval, cloze_every_steps=0, sample_every_steps=0, validation_every_steps=0)
    config = replace(with_train(tiny, max_steps=10**6, save_every_steps=10**6, log_every_steps=1), eval=evals)
    prepare(config.data, progress=False)
    return write_run_config(config, tmp_path / "endless.json")


class Watched:
    """A run whose stdout is a pipe and whose stderr is a terminal, until both go away."""

    def __init__(self, words: list[str], **options: object) -> None:
        self.reader, writer = os.pipe()
        self.terminal, theirs = pty.openpty()
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        self.process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=writer, stderr=theirs, env=environment, **options
        )
        os.close(writer)
        os.close(theirs)

    def leave(self) -> None:
        os.close(self.reader)
        os.close(self.terminal)

    def reach(self, run: Path, more: int) -> int:
        """Wait for this many more rows. Returns the last step."""
        rows, deadline = JsonlFile(run / "metrics.jsonl"), time.monotonic() + 180
        start = goal = None
        while True:
            steps = [row["step"] for row in rows.rows() if row.get("kind") == "train"]
            if steps and start is None:
                start, goal = steps[-1], steps[-1] + more
            if goal is not None and steps[-1] >= goal:
                return steps[-1]
            assert self.process.poll() is None, f"ended with {self.process.returncode}"
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_run_survives_terminal_and_saves_on_sighup(endless: Path, temp_data: Path) -> None:
    """SIGHUP stops training; without it (`disown`, `| head`), training continues."""
    run = temp_data / "runs/tiny"
    watched = Watched(command("--config", endless))
    try:
        watched.reach(run, 1)
        watched.leave()
        watched.reach(run, 5)
        for _ in range(2):  # from the shell, and from the system
            watched.process.send_signal(signal.SIGHUP)
        assert watched.process.wait(240) == 128 + signal.SIGHUP
    finally:
        watched.process.kill()
    assert load_checkpoint(list_checkpoints(run / "checkpoints")[0]).state.step == max(losses(run))
    log = (run / "log.txt").read_text()
    assert log.count("stdout cannot be written: Broken pipe; training continues") == 1
    assert "ended: stopped by SIGHUP after step" in log
    assert status("tiny", 600)[1] == 129


def test_ctrl_c_clears_progress_bar(endless: Path, temp_data: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    words = [*command("--config", endless), "--train.log-every-steps", "1"]
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    shown, stopped = b"", False
    with suppress(OSError):  # the end of a terminal
        while part := os.read(ours, 1 << 16):
            shown += part
            if not stopped and b"eta" in shown:
                process.send_signal(signal.SIGINT)
                stopped = True
    assert process.wait(240) == 130
    assert b"%|" in shown, "a bar was shown"
    # What stands on each line in the end: a carriage return goes back to its start, and what follows lies over it.
    lines = shown.decode(errors="replace").replace("\r\n", "\n").split("\n")
    standing = [line.rstrip("\r").rpartition("\r")[2] for line in lines]
    assert not [line for line in standing if "%|" in line], shown[-1500:]
    assert "stopped after step" in standing[-2]


@pytest.mark.slow
@pytest.mark.parametrize("launched", [False, True], ids=["alone", "launched"])
def test_nohup_ignores_sighup_and_stops_on_sigquit(endless: Path, temp_data: Path, launched: bool) -> None:
    """SIGHUP to every process of it does nothing; SIGQUIT, and any other end, is a stop."""
    run, words = temp_data / "runs/tiny", command("--config", endless)
    if launched:
        words[1:1] = ["-m", "myllm.distributed.elastic", "--standalone", "--nproc_per_node=2"]
    watched = Watched(["nohup", *words])
    started = psutil.Process(watched.process.pid)
    try:
        watched.reach(run, 1)
        watched.leave()
        for process in [started, *started.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):  # such as a program that was asked for a version
                process.send_signal(signal.SIGHUP)
        watched.reach(run, 5)
        watched.process.send_signal(signal.SIGQUIT)
        assert watched.process.wait(240) == 128 + signal.SIGQUIT
    finally:
        for process in started.children(recursive=True) if watched.process.poll() is None else []:
            process.kill()
        watched.process.kill()
    assert load_checkpoint(list_checkpoints(run / "checkpoints")[0]).state.step == max(losses(run))
    assert status("tiny", 600)[1] == 131


@pytest.mark.slow
def test_launcher_forwards_sighup_to_workers(endless: Path, temp_data: Path) -> None:
    run, words = temp_data / "runs/tiny", command("--config", endless)
    words[1:1] = ["-m", "myllm.distributed.elastic", "--standalone", "--nproc_per_node=2"]
    watched = Watched(words)
    try:
        watched.reach(run, 3)
        watched.leave()
        watched.process.send_signal(signal.SIGHUP)
        assert watched.process.wait(240) == 128 + signal.SIGHUP
    finally:
        watched.process.kill()
    assert load_checkpoint(list_checkpoints(run / "checkpoints")[0]).state.step == max(losses(run))


@pytest.mark.slow
def test_full_log_disk_does_not_stop_training(endless: Path, tmp_path: Path, temp_data: Path) -> None:
    """metrics.jsonl and log.txt are full from the start; no output; and there is a save and a code all the same."""
    run = temp_data / "runs/tiny"
    run.mkdir(parents=True)
    for name in ("metrics.jsonl", "log.txt"):
        (run / name).symlink_to("/dev/full")
    words = [*command("--config", endless), "--train.max-steps", "6", "--train.save-every-steps", "3"]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *words], stderr=subprocess.PIPE, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(list_checkpoints(run / "checkpoints")[0]).state.step == 6
    assert json.loads((run / "heartbeat.json").read_text())["how"] == "complete, after step 6"


# ---- letters


def test_unencodable_characters_are_escaped(tmp_path: Path) -> None:
    """In an ASCII and in an ISO-8859 locale: every command's help, names that are no text, and a conversation."""
    odd = os.fsencode(tmp_path) + b"/datasets/caf\xe9-1234"
    os.makedirs(odd)
    for name in (b"/settings.json", b"/manifest.json"):
        Path(os.fsdecode(odd + name)).write_text("{}")
    code = """
import sys
from myllm.cli import main as cli
helps = [[*name.split(), "--help"] for name in cli.COMMANDS] if sys.argv[1] == "ascii" else []
for words in [["data", "list"], *helps]:
    try:
        cli.main(words)
    except SystemExit as end:
        assert not end.code, words
print("日 é ∞ \\udcff", file=sys.stderr)
print("日 é ∞ \\udcff")
if sys.argv[1] == "utf-8":
    from myllm.inference import chat
    print(chat._read_line())
"""
    for encoding in ("ascii", "iso-8859-1", "utf-8"):
        environment = os.environ | {"PYTHONIOENCODING": encoding, "MYLLM_DATA": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code, encoding],
            input=b"caf\xe9\n", capture_output=True, timeout=240, check=False, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()
        assert b"caf\\udce9-1234" in done.stdout
        assert b"\\udcff" in done.stdout
    assert b"caf\\udce9\n" in done.stdout
