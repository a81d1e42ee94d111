"""A thread beside the loop: it writes the heartbeat, and ends all ranks when one of them hangs.

Ranks wait for each other in every collective. If one hangs, the others wait forever; a timeout of NCCL or gloo ends
them but cannot say which rank they waited for. So each rank's thread checks that its loop makes progress. The first to
see none for `train.collective_timeout_s` reports that in a store that all ranks share, without a collective. Each rank
then writes down where it is, with the stack of every thread, rank 0 names the ranks that did not arrive, and all exit.

The short limit holds only during training, after the first step. Compilation, evaluations, saves and waiting for data
may take up to COLLECTIVE_TIMEOUT_S.
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
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from myllm.data.dataloader import BatchLoader
from myllm.distributed import collectives as distributed
from myllm.distributed import launcher as ranks
from myllm.distributed.collectives import COLLECTIVE_TIMEOUT_S
from myllm.errors import TrainingDiverged, UserError
from myllm.runs.heartbeat import Heartbeat

from .setup import RunContext
from .stop_signals import StopRequest

POLL_S, LATE_S = 1.0, 2.0
"""How often to look, and from when on a look is late."""
REPLY_S = 5.0
"""How long each rank has to report where it is."""
EXIT_CODES = {UserError: 2, TrainingDiverged: TrainingDiverged.EXIT_CODE, KeyboardInterrupt: 130}
SLOWEST = 5
"""A pause of up to this many times the longest so far is not a hang."""


class Watchdog:
    """Watches this process's loop inside a `with` block. If an error ends the block, the heartbeat records it."""

    def __init__(self, ctx: RunContext, heartbeat: Heartbeat, loader: BatchLoader, stop: StopRequest) -> None:
        self._ctx, self._heartbeat, self._loader, self._stop = ctx, heartbeat, loader, stop
        self._timeout_s = ctx.config.train.collective_timeout_s
        self._launcher = os.getppid() if ranks.is_launched() else None
        self._store, self._main_thread = distributed.shared_store(), threading.main_thread().ident
        self._progress: tuple[int, ...] = ()
        self._progress_time = self._looked_at = time.monotonic()
        self._longest_s = 0.0
        self._ended, self._warned = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._heartbeat.write(now=True)
        self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error:
            code = next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)
            self._heartbeat.end(f"failed: {str(error) or type(error).__name__}", code)
        self._ended.set()
        self._thread.join()
        if not error and self._heartbeat.ending:
            self._ctx.log(f"ended: {self._heartbeat.ending[0]}")

    def _watch(self) -> None:
        rank = self._ctx.dist.rank
        while not self._ended.wait(POLL_S):
            self._heartbeat.write()
            if self._heartbeat.unwritable and not self._warned:
                self._warned = True
                _print(self._heartbeat.unwritable)
            if self._launcher not in (None, os.getppid()) and self._stop.signal is None:
                _print(f"rank {rank}: torchrun has exited; saving and stopping")
                self._stop.signal = signal.SIGTERM
            if self._store is None:
                continue
            try:
                idle_s = self._idle_s()
                if idle_s > self._limit_s():
                    self._store.set("hang", f"{idle_s:.0f}")
                if self._store.check(["hang"]) and not self._ended.is_set():
                    self._end_all_ranks()
            except RuntimeError:  # the process that held the store has exited
                self._store = None

    def _idle_s(self) -> float:
        """Seconds since the loop last made progress. Time in which this thread could not run either does not count: the
        process was suspended, or other programs had the cores."""
        progress, now = (self._heartbeat.step, self._loader.batches_taken, self._heartbeat.marks), time.monotonic()
        self._progress_time += max(now - self._looked_at - LATE_S, 0.0)
        self._looked_at = now
        if progress != self._progress:
            if self._progress and self._is_training():
                self._longest_s = max(self._longest_s, now - self._progress_time)
            self._progress, self._progress_time = progress, now
        return now - self._progress_time

    def _is_training(self) -> bool:
        return self._heartbeat.first_step_done and self._heartbeat.doing_now == "training"

    def _limit_s(self) -> float:
        if self._is_training():
            return max(self._timeout_s, SLOWEST * self._longest_s)
        return max(COLLECTIVE_TIMEOUT_S, self._timeout_s)

    def _end_all_ranks(self) -> None:
        """Report where this rank is, let one rank report which are late, and exit."""
        rank, store = self._ctx.dist.rank, self._store
        assert store is not None
        store.set(f"rank{rank}", json.dumps(self._report()))
        self._dump_stacks()
        # Another rank takes over from rank 0 if that one does not answer.
        if rank == 0 or (not _wait(REPLY_S + 3, lambda: store.check(["told"])) and store.add("teller", 1) == 1):
            keys = [f"rank{other}" for other in range(self._ctx.dist.world_size)]
            _wait(REPLY_S, lambda: store.check(keys))
            reports = [json.loads(store.get(key)) if store.check([key]) else None for key in keys]
            message = (
                f"{describe_hang(reports, float(store.get('hang')))}. Stacks of all ranks: {self._ctx.paths.stacks}. "
                "Run the same command to resume from the latest checkpoint"
            )
            _print(f"error: {message}")
            with suppress(OSError), self._ctx.paths.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message}\n")
            self._heartbeat.end(f"failed: {message}", 1)
            store.set("told", "")
        os._exit(1)

    def _report(self) -> dict[str, Any]:
        frame = sys._current_frames().get(self._main_thread or 0)
        stack = traceback.extract_stack(frame) if frame else []
        ours = [call for call in stack if f"{os.sep}myllm{os.sep}" in call.filename] or stack
        location = "unknown location"
        if ours:
            location = f"{os.path.basename(ours[-1].filename)}, line {ours[-1].lineno}, {ours[-1].name}"
        in_collective = any(
            f"torch{os.sep}distributed" in call.filename or (call.name == "backward" and "torch" in call.filename)
            for call in stack
        )
        heartbeat = self._heartbeat
        return {
            "progress": [heartbeat.step, self._loader.batches_taken, heartbeat.marks], "doing": heartbeat.doing_now,
            "location": location, "in_collective": in_collective, "host": socket.gethostname(), "pid": os.getpid(),
        }  # fmt: skip

    def _dump_stacks(self) -> None:
        """Write every thread's stack, and the newest collectives from torch's flight recorder."""
        rank, folder = self._ctx.dist.rank, self._ctx.paths.stacks
        try:
            folder.mkdir(exist_ok=True)
            with (folder / f"rank{rank}.txt").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            for name in ("_dump_nccl_trace", "_dump_fr_trace"):
                if dump := getattr(torch._C._distributed_c10d, name, None):
                    (folder / f"{name.strip('_')}_rank{rank}.pickle").write_bytes(dump())
        except (OSError, RuntimeError) as error:
            _print(f"rank {rank}: cannot write all of {folder}: {error}")


def describe_hang(reports: list[dict[str, Any] | None], idle_s: float) -> str:
    """Which ranks did not arrive, and what each was doing.

    Args:
        reports: by rank; None for a rank that did not answer.
    """
    known = {rank: report for rank, report in enumerate(reports) if report is not None}
    late = [rank for rank, report in enumerate(reports) if report is None]
    if not late and len({tuple(report["progress"]) for report in known.values()}) > 1:
        least = min(report["progress"] for report in known.values())
        late = [rank for rank, report in known.items() if report["progress"] == least]
    elif not late:
        late = [rank for rank, report in known.items() if not report["in_collective"]]
    parts = [f"no progress on any rank for {idle_s:.0f} s"]
    # On GPUs, ranks also wait for each other where they read a number from the device: then none is in a collective.
    if 0 < len(late) < len(reports):
        parts = [f"rank{'s' * (len(late) > 1)} {', '.join(map(str, late))} did not arrive in {idle_s:.0f} s"]
    others = [rank for rank in known if rank not in late]
    for rank in [*late[:8], *others[:1]]:
        if report := known.get(rank):
            verb = "is" if rank in late else "waits"
            parts.append(
                f"rank {rank} {verb} in step {report['progress'][0] + 1:,}, {report['doing']}: {report['location']} "
                f"(process {report['pid']} on {report['host']})"
            )
        else:
            parts.append(f"rank {rank} is not responding")
    return "; ".join(parts)


def _wait(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _print(line: str) -> None:
    # Not through the log: the hanging loop may hold its locks.
    with suppress(OSError):
        os.write(2, f"\n{line}\n".encode(errors="backslashreplace"))
