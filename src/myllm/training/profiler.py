"""`--profile`: where the time of a training step goes, kernel by kernel. pretrain.py goes on training afterwards.

A few steps are recorded, once the first ones have compiled and warmed up: into a trace for a viewer (Perfetto, or
chrome://tracing), and a table of the ten costliest kernels, by the phase of the step that started them.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch

from myllm.config import RunConfig
from myllm.distributed.collectives import DistContext
from myllm.files import write_text
from myllm.paths import RunPaths
from myllm.runs.logs import Log

from .kernel_costs import STEP, table
from .throughput import ThroughputMeter

WARMUP_STEPS = 10
"""Of this process, before those that are recorded."""
STEPS = 5
LOOKED_AT = 10_000
"""Places for the window, at most."""
TRACE, TABLE = "trace.json", "kernels.txt"


def no_phase(phase: str) -> AbstractContextManager[None]:
    """Where nothing is recorded, phases are nothing."""
    return nullcontext()


class Profiler:
    """Records the steps of one window, on rank 0, and costs nothing outside it.

    Args:
        meter: counts apart what is no training: starting, and writing what was recorded.
    """

    def __init__(
        self, run: RunPaths, config: RunConfig, step: int, process: DistContext, log: Log, meter: ThroughputMeter
    ) -> None:
        self._run, self._process, self._log, self._meter = run, process, log, meter
        self.window = choose_window(config, step) if process.is_rank_zero else range(0)
        self._recording: torch.profiler.profile | None = None
        self._seconds = 0.0

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """One training step, number `step` counted from 0."""
        if step not in self.window:
            yield
            return
        if self._recording is None:
            with self._meter.timed("profiling"):
                self._recording = self._started()
        started = time.perf_counter()
        with _marked(STEP, self._process.device):
            yield
            _synchronize(self._process.device)  # at each, so that what comes between two steps is not the next one's
        self._seconds += time.perf_counter() - started
        if step == self.window[-1]:
            with self._meter.timed("profiling"):
                self._write()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Marks a part of the step, for the trace and for NVIDIA's tools; while recording only."""
        return _marked(name, self._process.device) if self._recording else nullcontext()

    def _started(self) -> torch.profiler.profile:
        _synchronize(self._process.device)  # what went before is not this step's
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._process.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        recording = torch.profiler.profile(activities=activities)
        recording.start()
        return recording

    def _write(self) -> None:
        recording, self._recording = self._recording, None
        recording.stop()
        folder = self._run.profile
        try:
            folder.mkdir(exist_ok=True)
            recording.export_chrome_trace(str(folder / TRACE))
            text = table(folder / TRACE, self.window, self._seconds)
            write_text(folder / TABLE, text)
        except OSError as error:  # a full disk: the run goes on, and says so at its next save
            self._log(f"no profile: cannot write {folder}: {error}")
            return
        self._log(f"{text}\nprofile: {folder / TABLE}, and {folder / TRACE} for https://ui.perfetto.dev")


class NoProfiler:
    """What stands in for a Profiler where none was asked for."""

    phase = staticmethod(no_phase)

    def around(self, step: int) -> AbstractContextManager[None]:
        return nullcontext()


def choose_window(config: RunConfig, step: int) -> range:
    """The steps to record, counted from 0: the first few behind the warm-up with nothing in between that is no
    training, as far as there are such.

    Args:
        step: at which this process begins.
    """
    steps = config.train.max_steps
    first = max(min(step + WARMUP_STEPS, steps - STEPS), step)
    length = min(STEPS, steps - first)
    cadences = [getattr(config.eval, name) for name in vars(config.eval) if name.endswith("_every_steps")]
    cadences += [getattr(config.train, name) for name in vars(config.train) if name.endswith("_every_steps")]

    def disturbances(start: int) -> int:
        between = range(start + 1, start + length)
        return sum(boundary % cadence == 0 for boundary in between for cadence in cadences if cadence)

    far = min(steps - length, first + max(cadences, default=0), first + LOOKED_AT)
    start = min(range(first, far + 1), key=disturbances, default=first)
    return range(start, start + length)


@contextmanager
def _marked(name: str, device: torch.device) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.profiler.record_function(name))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.nvtx.range(name))
        yield


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
