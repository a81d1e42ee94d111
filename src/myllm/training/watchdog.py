"""A thread beside the loop: it writes the heartbeat, and ends ranks that wait for one that does not come.

Ranks wait for one another in every collective. If one sleeps, the others wait for ever; a timeout of NCCL or gloo ends
them, but cannot say for whom they waited. So each rank's thread looks whether its loop gets on. The first that finds it
does not, for `train.collective_timeout_s`, says so on a board that all ranks share (the store by which they found one
another, which needs no collective). Each rank then writes down where it is, with the stack of every thread; rank 0
names those that did not arrive; and all end.

The short limit holds for training alone, after the first step: compiling, evaluations, saves and waiting for data take
as long as they take, up to COLLECTIVE_TIMEOUT_S.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from myllm.data.dataloader import BatchLoader
from myllm.distributed import collectives as distributed
from myllm.distributed import launcher as ranks
from myllm.distributed.collectives import COLLECTIVE_TIMEOUT_S, DistContext
from myllm.errors import TrainingDiverged, UserError
from myllm.paths import RunPaths
from myllm.runs.heartbeat import Heartbeat
from myllm.runs.logs import Log

from .stop_signals import StopRequest

LOOK_EVERY_S = 1.0
ANSWER_S = 5.0
"""How long each rank has to say where it is."""
EXIT_CODES = {UserError: 2, TrainingDiverged: TrainingDiverged.EXIT_CODE, KeyboardInterrupt: 130}
SLOWEST = 5
"""A loop that has been slow before may be: this many times its longest pause so far is no hang."""


class Watchdog:
    """Watches this process's loop. Use it in a `with` block, `watched`, which ends the thread."""

    def __init__(
        self,
        heartbeat: Heartbeat,
        loader: BatchLoader,
        stop: StopRequest,
        run: RunPaths,
        process: DistContext,
        timeout_s: float,
    ) -> None:
        self._heartbeat, self._loader, self._stop, self._run, self._process = heartbeat, loader, stop, run, process
        self._timeout_s, self._parent = timeout_s, os.getppid() if ranks.is_launched() else None
        self._board, self._main = distributed.shared_store(), threading.main_thread().ident
        self._seen, self._since, self._longest = (), time.monotonic(), 0.0
        self._ended, self._told = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            self._heartbeat.write()
            if self._heartbeat.unwritable and not self._told:
                self._told = True
                _say(self._heartbeat.unwritable)
            if self._parent is not None and os.getppid() != self._parent and self._stop.signal is None:
                _say(f"rank {self._process.rank}: torchrun is gone; saving and stopping")
                self._stop.signal = signal.SIGTERM
            if self._board is None:
                continue
            try:
                waited = self._idle_s()
                if waited > self._limit_s():
                    self._board.set("hang", f"{waited:.0f}")
                if self._board.check(["hang"]) and not self._ended.is_set():
                    self._end_all()
            except RuntimeError:  # the store went with the process that held it: there is nobody to talk to
                self._board = None

    def _idle_s(self) -> float:
        """How long the loop has not got on."""
        progress, now = (self._heartbeat.step, self._loader.batches_taken, self._heartbeat.marks), time.monotonic()
        if progress != self._seen:
            if self._seen and self._short():
                self._longest = max(self._longest, now - self._since)
            self._seen, self._since = progress, now
        return now - self._since

    def _short(self) -> bool:
        return self._heartbeat.first_step_done and self._heartbeat.doing_now == "training"

    def _limit_s(self) -> float:
        return (
            max(self._timeout_s, SLOWEST * self._longest)
            if self._short()
            else max(COLLECTIVE_TIMEOUT_S, self._timeout_s)
        )

    def _end_all(self) -> None:
        """Say where this rank is, have one rank say who is late, and end."""
        rank, board = self._process.rank, self._board
        assert board is not None
        board.set(f"rank{rank}", json.dumps(self._report()))
        self._dump()
        if rank == 0 or (not _within(ANSWER_S + 3, lambda: board.check(["told"])) and board.add("teller", 1) == 1):
            names = [f"rank{other}" for other in range(self._process.world_size)]
            _within(ANSWER_S, lambda: board.check(names))
            reports = [json.loads(board.get(name)) if board.check([name]) else None for name in names]
            message = describe_hang(reports, float(board.get("hang")))
            message += f". Where each stood: {self._run.stacks}. The same command goes on from the newest checkpoint"
            _say(f"error: {message}")
            with suppress(OSError), self._run.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message}\n")
            self._heartbeat.end(f"failed: {message}", 1)
            board.set("told", "")
        os._exit(1)

    def _report(self) -> dict[str, Any]:
        frame = sys._current_frames().get(self._main or 0)
        stack = traceback.extract_stack(frame) if frame else []
        ours = [each for each in stack if f"{os.sep}myllm{os.sep}" in each.filename] or stack
        place = f"{os.path.basename(ours[-1].filename)}, line {ours[-1].lineno}, {ours[-1].name}" if ours else "nowhere"
        waits = any(
            f"torch{os.sep}distributed" in each.filename or (each.name == "backward" and "torch" in each.filename)
            for each in stack
        )
        beat = self._heartbeat
        return {
            "arrived": [beat.step, self._loader.batches_taken, beat.marks], "doing": beat.doing_now, "place": place,
            "waits": waits, "host": socket.gethostname(), "pid": os.getpid(),
        }  # fmt: skip

    def _dump(self) -> None:
        """Every thread's stack, and the newest collectives as torch's flight recorder has them."""
        rank = self._process.rank
        try:
            self._run.stacks.mkdir(exist_ok=True)
            with (self._run.stacks / f"rank{rank}.txt").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            recorder = torch._C._distributed_c10d
            for name in ("_dump_nccl_trace", "_dump_fr_trace"):
                if hasattr(recorder, name):
                    trace = getattr(recorder, name)()
                    (self._run.stacks / f"{name.strip('_')}_rank{rank}.pickle").write_bytes(trace)
        except (OSError, RuntimeError) as error:
            _say(f"rank {rank}: cannot write all of {self._run.stacks}: {error}")


@contextmanager
def watched(
    heartbeat: Heartbeat,
    loader: BatchLoader,
    stop: StopRequest,
    run: RunPaths,
    process: DistContext,
    timeout_s: float,
    log: Log,
) -> Iterator[None]:
    """Watch the loop inside a `with` block. If it ends by an error, the heartbeat has that as its last word."""
    watchdog = Watchdog(heartbeat, loader, stop, run, process, timeout_s)
    heartbeat.write(now=True)
    watchdog.start()
    try:
        yield
    except BaseException as error:
        code = next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)
        heartbeat.end(f"failed: {str(error) or type(error).__name__}", code)
        raise
    finally:
        watchdog.end()
    if heartbeat.ending:
        log(f"ended: {heartbeat.ending[0]}")


def describe_hang(reports: list[dict[str, Any] | None], waited_s: float) -> str:
    """Who did not arrive, and what each was doing; by rank, None for one that says nothing."""
    said = {rank: report for rank, report in enumerate(reports) if report is not None}
    late = [rank for rank, report in enumerate(reports) if report is None]
    if not late and len({tuple(report["arrived"]) for report in said.values()}) > 1:
        first = min(report["arrived"] for report in said.values())
        late = [rank for rank, report in said.items() if report["arrived"] == first]
    elif not late and not all(report["waits"] for report in said.values()):
        late = [rank for rank, report in said.items() if not report["waits"]]  # the others stand in a collective
    lines = [f"no rank got on for {waited_s:.0f} s; "]
    if late:
        lines = [f"rank{'s' * (len(late) > 1)} {', '.join(map(str, late))} did not arrive in {waited_s:.0f} s; "]
    elsewhere = [rank for rank in said if rank not in late]
    for rank in [*late[:8], *elsewhere[:1]]:
        report = said.get(rank)
        where = "gives no sign of life"
        if report:
            step = f"in step {report['arrived'][0] + 1:,}, {report['doing']}"
            where = f"{step}: {report['place']} (process {report['pid']} on {report['host']})"
        lines.append(f"rank {rank} {'waits ' if rank not in late else 'is ' if report else ''}{where}; ")
    return "".join(lines).removesuffix("; ")


def _within(seconds: float, happened: Any) -> bool:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _say(line: str) -> None:
    # Not through the log: the loop may hold its locks, and does not get on.
    with suppress(OSError):
        os.write(2, f"\n{line}\n".encode(errors="backslashreplace"))
