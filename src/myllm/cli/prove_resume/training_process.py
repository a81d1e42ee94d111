"""Training runs as processes: started as a user would, watched from outside, and killed without warning."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myllm.cli.trials import last_lines, start_training
from myllm.paths import RunPaths
from myllm.runs.logs import JsonlFile

POLL_S = 0.02
TIMEOUT_S = 600
"""The longest time for a start or a step."""


class RunFailed(RuntimeError):
    """A run ended or hung when it should have continued."""


@dataclass
class TrainingProcess:
    """A process of pretrain.py, or of torchrun with several ranks. Its output goes to a file."""

    process: subprocess.Popen[bytes]
    run: RunPaths
    log: Path
    old_metrics: int | None = None
    """Inode of the metrics before the start. When a run resumes, it replaces the file."""

    @classmethod
    def start(cls, config: Path, name: str, data: Path, ranks: int = 1) -> "TrainingProcess":
        """Start a run whose temp_data/ is `data`."""
        run, log = RunPaths(data / "runs" / name), data / f"{name}.log"
        old_metrics = _inode(run.metrics)
        words = ["--config", str(config), "--name", name]
        process = start_training(words, log, ranks, [f"MYLLM_DATA={data}"], "torch.distributed.run")
        return cls(process, run, log, old_metrics)

    def step(self) -> int:
        """The last step in the metrics; 0 until this process has written them."""
        return 0 if _inode(self.run.metrics) in (None, self.old_metrics) else logged_step(self.run)

    def processes(self) -> list[int]:
        """The ranks and all other descendants, then the process itself."""
        return [*_descendants(self.process.pid), self.process.pid]

    def ranks(self) -> list[int]:
        """The processes that train: torchrun's children, or the process itself."""
        if "torch.distributed.run" not in str(self.process.args):
            return [self.process.pid]
        return [pid for pid, parent in _parents().items() if parent == self.process.pid]

    def kill(self) -> None:
        """Send SIGKILL to the process and its descendants, and wait until they are gone."""
        pids = self.processes()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        wait_until_gone(pids)

    def wait_for_step(self, step: int) -> bool:
        """Wait until a step is logged. Returns False if the run ended before.

        Raises:
            RunFailed: no progress for TIMEOUT_S.
        """
        last, since = -1, time.monotonic()
        while (now := self.step()) < step:
            if self.process.poll() is not None:
                return self.step() >= step
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > TIMEOUT_S:
                self.kill()
                raise RunFailed(f"no progress for {TIMEOUT_S} s after step {last}; see {self.log}")
            time.sleep(POLL_S)
        return True

    def finish(self, last_step: int) -> None:
        """Wait for the end of the run.

        Raises:
            RunFailed: it failed, or ended before its last step.
        """
        self.wait_for_step(last_step)
        try:
            code = self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RunFailed(f"the process did not exit after its last step; see {self.log}") from None
        if code or self.step() < last_step:
            raise RunFailed(
                f"the run ended with exit code {code} at step {self.step()} of {last_step}:{last_lines(self.log)}"
            )


def train_rows(run: RunPaths) -> dict[int, dict[str, Any]]:
    """The rows of a run's training steps, by step. The last one wins."""
    return {row["step"]: row for row in JsonlFile(run.metrics).rows() if row.get("kind") == "train"}


def logged_step(run: RunPaths) -> int:
    """The last step in metrics.jsonl; 0 if there is none."""
    return max(train_rows(run), default=0)


def wait_until_gone(pids: list[int], timeout_s: float = 60) -> None:
    """Raises RunFailed if some of the processes still run after a while."""
    deadline = time.monotonic() + timeout_s
    while alive := set(pids) & _parents().keys():
        if time.monotonic() > deadline:
            raise RunFailed(f"processes {sorted(alive)} still run")
        time.sleep(POLL_S)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _descendants(pid: int) -> list[int]:
    parents, found = _parents(), [pid]
    for ancestor in found:  # grows while it is read
        found += [child for child, parent in parents.items() if parent == ancestor]
    return found[1:][::-1]


def _parents() -> dict[int, int]:
    """The parent of each process on this machine, without zombies."""
    if Path("/proc/self/stat").exists():
        rows = [_read_stat(path) for path in Path("/proc").glob("[0-9]*/stat")]
    else:  # macOS
        command = ["ps", "-A", "-o", "pid=,stat=,ppid="]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows = [line.split() for line in output.splitlines()]
    return {int(pid): int(parent) for pid, state, parent in filter(None, rows) if state[0] not in "ZX"}


def _read_stat(path: Path) -> list[str] | None:
    """Process ID, state and parent. The command name between them may contain anything, parentheses too."""
    try:
        pid, _, rest = path.read_text(errors="replace").partition(" ")
    except OSError:
        return None
    state, parent, *_ = rest.rpartition(")")[2].split()
    return [pid, state, parent]
