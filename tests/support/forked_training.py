"""The trainings that a command starts, in forks of the command's process, which has imported everything already.

Of what `trials.start_training` does, only the start of an interpreter is missing; tests/cli/test_trials.py has that.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.warm_start import become

from myllm.cli import trials

start_interpreter = trials.start_training


def start_training(
    words: Sequence[str], log: Path, ranks: int = 1, variables: Sequence[str] = (), launcher: str = ""
) -> Any:
    """As the function of trials.py. Several ranks, or variables that a library reads on import, need an interpreter."""
    changes = dict(variable.split("=", 1) for variable in variables)
    if ranks > 1 or changes.keys() - {"MYLLM_DATA"}:
        return start_interpreter(words, log, ranks, variables, launcher)
    log.touch()
    program = [str(trials.project_root() / "pretrain.py"), *words]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    request = {
        "words": program, "streams": [os.devnull, str(log), str(log)], "env": environment | changes,
        "cwd": os.getcwd(), "report": True,
    }  # fmt: skip
    return Fork(program, lambda: train(request))


def train(request: dict[str, Any]) -> int:
    """In a fork: leave behind what a new program would not have, and train."""
    os.setsid()
    os.closerange(3, 256)  # locks, too
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return become(request)


class Fork:
    """What a command uses of subprocess.Popen."""

    def __init__(self, args: list[str], program: Callable[[], int]) -> None:
        self.args, self.returncode = args, None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                code = program()
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
