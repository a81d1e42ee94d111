"""A process beside training that is sent the steps of checkpoints: it may fail, wait or be killed, and training never
notices."""

import os
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from queue import Empty

from myllm.data.prepare.workers import init_worker

STATUS_EVERY_S = 30
FINISH_TIMEOUT_S = 1_800
"""How long the end of training waits for the last checkpoint."""


class StepProcess:
    """Starts with the first step that it is sent, and ends with the `with` block."""

    def __init__(
        self, verb: str, place: str | None, work: Callable[[Queue], bool], advice: str, last_only: bool = False
    ) -> None:
        """
        Args:
            verb: what the process does, for messages, such as "publish".
            place: where to. None: there is nothing to do.
            work: called in the process with the queue of steps. It returns after None; False if its last attempt
                failed.
            advice: what a user can do about work that was not finished.
            last_only: only `finish` sends a step.
        """
        self._verb, self._place, self._work, self._advice, self._last_only = verb, place, work, advice, last_only
        self._process: BaseProcess | None = None
        self._steps: Queue | None = None

    def __enter__(self) -> "StepProcess":
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, whatever it is doing."""
        if self._steps is not None:
            self._steps.cancel_join_thread()
        if self._process is not None and self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def submit(self, step: int) -> None:
        """Send the step of a complete checkpoint. Returns at once and never raises."""
        if self._place is not None and not self._last_only:
            self._send(step)

    def _send(self, step: int) -> bool:
        """False if there can be no process."""
        try:
            if self._process is None or self._steps is None or not self._process.is_alive():
                context = get_context("spawn")
                self._steps = context.Queue()
                self._process = context.Process(target=_run, args=(self._work, self._steps), name=f"{self._verb}er")
                self._process.start()
            self._steps.put(step)
        except Exception as error:  # for example no memory for another process: the run matters more than its copy
            print(f"cannot {self._verb} step {step:,}: {error}. {self._advice}", flush=True)
            return False
        return True

    def finish(self, step: int, limit_s: float = FINISH_TIMEOUT_S) -> None:
        """Send the last step and wait until the process has ended, up to a limit."""
        if self._place is None:
            return
        print(f"\n=== {self._verb.capitalize()}ing: {self._place}", flush=True)
        deadline = time.monotonic() + limit_s
        for _ in range(2):  # retry once if the process was killed, now or before
            if not self._send(step):
                return
            assert self._process is not None
            assert self._steps is not None
            self._steps.put(None)
            self._wait(self._process, deadline)
            if (self._process.exitcode or 0) >= 0:
                break
        assert self._process is not None
        if self._process.is_alive():
            limit = f"{limit_s / 60:.0f} minutes" if limit_s >= 120 else f"{limit_s:.0f} s"
            print(f"not {self._verb}ed within {limit}. {self._advice}", flush=True)
        elif self._process.exitcode:
            print(f"not {self._verb}ed: see above. {self._advice}", flush=True)

    def _wait(self, process: BaseProcess, deadline: float) -> None:
        start = last_status = time.monotonic()
        while process.is_alive() and (now := time.monotonic()) < deadline:
            process.join(0.5)
            if now - last_status > STATUS_EVERY_S:
                last_status = now
                minutes = (now - start) / 60
                print(f"still {self._verb}ing after {minutes:.1f} minutes; press Ctrl-C to do it later", flush=True)


def _run(work: Callable[[Queue], bool], steps: Queue) -> None:
    """The process. Ends after None, or with the process that started it."""
    init_worker()
    os.nice(10)  # training has priority
    sys.exit(0 if work(steps) else 1)


def take_steps(steps: Queue, timeout: float | None = None) -> list[int | None]:
    """All steps that were sent, and None after the last; waits for the first, up to a timeout in seconds."""
    try:
        taken = [steps.get(timeout=timeout)]
    except Empty:
        return []
    while not steps.empty():
        taken.append(steps.get())
    return taken
