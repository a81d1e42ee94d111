"""Training runs as processes of their own: started as a user would, killed without warning, and looked at from outside.

For `myllm prove-resume`, for benchmarks/soak.py and for the tests.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myllm.checkpoint.layout import list_checkpoints, step_of
from myllm.paths import RunPaths, project_root
from myllm.runs.logs import JsonlFile

POLL_S = 0.02
PATIENCE_S = 600
"""How long a step may take, or a start."""


class RunFailed(RuntimeError):
    """A run ended, or stood still, where it should have gone on."""


@dataclass
class TrainingProcess:
    """One start of pretrain.py, alone or under torchrun, with its output in a file."""

    process: subprocess.Popen[bytes]
    run: RunPaths
    log: Path
    stale: int | None = None
    """The metrics of an earlier start, by inode: on its start a run writes anew what it keeps of them."""

    @classmethod
    def start(cls, config: Path, name: str, data: Path, ranks: int = 1) -> "TrainingProcess":
        """
        Args:
            data: the temp_data/ of the run.
        """
        run, log = RunPaths(data / "runs" / name), data / f"{name}.log"
        stale = _inode(run.metrics)
        # A launcher around this process is not theirs.
        clean = [word for each in ("RANK", "LOCAL_RANK", "WORLD_SIZE") for word in ("-u", each)]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        words = [sys.executable, *torchrun, str(project_root() / "pretrain.py"), "--config", str(config)]
        with log.open("ab") as out:
            process = subprocess.Popen(
                ["env", *clean, f"MYLLM_DATA={data}", *words, "--name", name],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        return cls(process, run, log, stale)

    def step(self) -> int:
        """The last step that this start has logged, or kept; 0 until it writes its first row."""
        return 0 if _inode(self.run.metrics) in (None, self.stale) else logged_step(self.run)

    def processes(self) -> list[int]:
        """The ranks and whatever else it has started, its own process last."""
        return [*_descendants(self.process.pid), self.process.pid]

    def ranks(self) -> list[int]:
        """The processes that train: torchrun's children, or the only one there is."""
        children = _parents()
        below = [pid for pid, parent in children.items() if parent == self.process.pid]
        return below if "torch.distributed.run" in self.process.args else [self.process.pid]

    def kill(self) -> None:
        """SIGKILL to every process of it, and wait until none is left."""
        everybody = self.processes()
        for pid in everybody:
            _send(pid, signal.SIGKILL)
        self.process.wait()
        wait_until_gone(everybody)

    def wait_for_step(self, step: int) -> bool:
        """Wait until a step is logged; false if the run ended first.

        Raises:
            Broken: nothing new for PATIENCE_S.
        """
        seen, since = -1, time.monotonic()
        while (now := self.step()) < step:
            if self.process.poll() is not None:
                return self.step() >= step
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > PATIENCE_S:
                self.kill()
                raise RunFailed(f"nothing happened for {PATIENCE_S} s after step {seen}; see {self.log}")
            time.sleep(POLL_S)
        return True

    def finish(self, last_step: int) -> None:
        """Wait for its end.

        Raises:
            Broken: it failed, or ended before its last step.
        """
        self.wait_for_step(last_step)
        try:
            code = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RunFailed(f"it did not end after its last step; see {self.log}") from None
        if code or self.step() < last_step:
            tail = "".join(f"\n    {line}" for line in self.log.read_text(errors="replace").splitlines()[-12:])
            raise RunFailed(f"it ended with code {code} at step {self.step()} of {last_step}:{tail}")


def train_rows(run: RunPaths) -> dict[int, dict[str, Any]]:
    """The rows of a run's training steps, by step; the later one where there are two."""
    return {row["step"]: row for row in JsonlFile(run.metrics).rows() if row.get("kind") == "train"}


def logged_step(run: RunPaths) -> int:
    """The last step in metrics.jsonl; 0 if there is none."""
    return max(train_rows(run), default=0)


def saved_step(run: RunPaths) -> int:
    """The newest step whose checkpoint has its final name; 0 if none has."""
    return max(map(step_of, list_checkpoints(run.checkpoints)), default=0)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def wait_until_gone(pids: list[int], patience_s: float = 60) -> None:
    """
    Raises:
        Broken: some live on.
    """
    deadline = time.monotonic() + patience_s
    while alive := set(pids) & _parents().keys():
        if time.monotonic() > deadline:
            raise RunFailed(f"processes {sorted(alive)} are still there")
        time.sleep(POLL_S)


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it was faster


def _descendants(pid: int) -> list[int]:
    parents, found = _parents(), [pid]
    for each in found:  # grows meanwhile
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:][::-1]


def _parents() -> dict[int, int]:
    """The parent of every process of this machine that has not ended (a zombie has)."""
    if Path("/proc/self/stat").exists():
        rows = [_stat(path) for path in Path("/proc").glob("[0-9]*/stat")]
    else:  # macOS
        said = subprocess.run(["ps", "-A", "-o", "pid=,stat=,ppid="], capture_output=True, text=True, check=True).stdout
        rows = [line.split() for line in said.splitlines()]
    return {int(pid): int(parent) for pid, state, parent in filter(None, rows) if state[0] not in "ZX"}


def _stat(path: Path) -> list[str] | None:
    """Process, state and parent. The name in between may hold anything, parentheses too."""
    try:
        pid, _, rest = path.read_text(errors="replace").partition(" ")
    except OSError:
        return None
    state, parent, *_ = rest.rpartition(")")[2].split()
    return [pid, state, parent]
