"""A process beside training that is sent the steps of checkpoints: it may fail, wait or be killed, and training never
notices."""

import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from typing import Any, Protocol

STATUS_EVERY_S = 30


class Steps(Protocol):
    """A queue of steps; None: there will be no more."""

    def get(self, block: bool = True, timeout: float | None = None) -> int | None: ...

    def empty(self) -> bool: ...


class StepProcess:
    """Starts with the first step that it is sent."""

    def __init__(self, verb: str, advice: str, target: Callable[..., None], args: tuple[Any, ...]) -> None:
        """
        Args:
            verb: the work, for messages, such as "publish".
            advice: what a user can do about work that was not finished.
            target: the work, called with `args` and the queue of steps. It ends, with `sys.exit`, after None.
        """
        self._verb, self._advice, self._target, self._args = verb, advice, target, args
        self._process: BaseProcess | None = None
        self._steps: Queue | None = None

    def send(self, step: int) -> bool:
        """Returns at once and never raises; False if there can be no process."""
        try:
            if self._process is None or not self._process.is_alive():
                context = get_context("spawn")
                self._steps = context.Queue()
                self._process = context.Process(
                    target=self._target, args=(*self._args, self._steps), name=f"{self._verb}er"
                )
                self._process.start()
            if self._steps is not None:
                self._steps.put(step)
        except Exception as error:  # for example no memory for another process: the run matters more than its copy
            print(f"cannot {self._verb} step {step:,}: {error}. {self._advice}", flush=True)
            return False
        return True

    def finish(self, step: int, limit_s: float) -> None:
        """Send the last step and wait until the process has ended, up to a limit."""
        deadline = time.monotonic() + limit_s
        for _ in range(2):  # retry once if the process was killed, now or before
            if not self.send(step):
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

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self._steps is not None:
            self._steps.cancel_join_thread()
        if self._process is not None and self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _wait(self, process: BaseProcess, deadline: float) -> None:
        start = last_status = time.monotonic()
        while process.is_alive() and (now := time.monotonic()) < deadline:
            process.join(0.5)
            if now - last_status > STATUS_EVERY_S:
                last_status = now
                minutes = (now - start) / 60
                print(f"still {self._verb}ing after {minutes:.1f} minutes; press Ctrl-C to do it later", flush=True)
