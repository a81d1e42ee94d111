"""`--profile`: where the time of a training step goes, kernel by kernel. Training continues afterwards.

A few steps are recorded after the first ones have compiled and warmed up: into a trace for a viewer (Perfetto, or
chrome://tracing), and a table of the ten costliest kernels by the phase of the step that started them.
"""

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from myllm.config import RunConfig
from myllm.distributed.device_info import synchronize
from myllm.files import write_text

from .setup import RunContext
from .throughput import ThroughputMeter

WARMUP_STEPS = 10
"""Steps of this process before those that are recorded."""
STEPS = 5
LONGEST_SEARCH = 10_000
"""Steps to look for a quiet window in."""
TRACE, TABLE = "trace.json", "kernels.txt"
PHASES = ("data", "forward", "backward", "clip", "optimizer")
"""Of a training step, in order."""
STEP, OTHER = "step", "other"
SHOWN = 10
NAME_CHARS = 90


class Profiler:
    """Records the steps of one window on rank 0. It costs nothing outside of them.

    Args:
        step: the first step of this process.
        meter: counts the profiler's own time as overhead.
        enabled: false without --profile: nothing is recorded.
    """

    def __init__(self, ctx: RunContext, step: int, meter: ThroughputMeter, enabled: bool) -> None:
        self._folder, self._device, self._log, self._meter = ctx.paths.profile, ctx.dist.device, ctx.log, meter
        self._seconds, self._recording = 0.0, False
        self.window = choose_window(ctx.config, step) if enabled and ctx.dist.is_rank_zero else range(0)
        self.costs: list[Cost] = []
        """Once the window is over."""
        if self.window:
            before = self.window.start - step
            warmup = min(1, before)  # the profiler's own first step is slow
            schedule = torch.profiler.schedule(
                skip_first=before - warmup, wait=0, warmup=warmup, active=len(self.window), repeat=1
            )
            # None: CPU, and the GPU where there is one
            self._profile = torch.profiler.profile(schedule=schedule, on_trace_ready=self._write)
            self._profile.start()

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """One training step, number `step` counted from 0."""
        if not self.window or step >= self.window.stop:
            yield
            return
        self._recording = step in self.window
        started = time.perf_counter()
        with self.phase(STEP):
            yield
            if step >= self.window.start - 1:
                synchronize(self._device)  # so that unfinished work does not count as the next step's
        if self._recording:
            self._seconds += time.perf_counter() - started
        self._recording = False
        starts_or_ends = self.window.start - 2 <= step < self.window.start or step == self.window[-1]
        with self._meter.timed("profiling") if starts_or_ends else nullcontext():
            self._profile.step()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Marks a part of the step for the trace and for NVIDIA's tools, while recording only."""
        return _mark(name, self._device) if self._recording else nullcontext()

    def _write(self, profile: torch.profiler.profile) -> None:
        events = profile.events()
        self.costs = kernel_costs(events)
        text = format_costs(self.costs, gpu_busy_us(events), self.window, self._seconds)
        try:
            self._folder.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(self._folder / TRACE))
            write_text(self._folder / TABLE, text)
        except OSError as error:  # a full disk: the run's next save reports it
            self._log(f"no profile: cannot write {self._folder}: {error}")
            return
        self._log(f"{text}\nprofile: {self._folder / TABLE}, and {self._folder / TRACE} for https://ui.perfetto.dev")


def choose_window(config: RunConfig, step: int) -> range:
    """The steps to record, counted from 0: the first few after the warm-up with no evaluation, save or log line between
    them, if there are such.

    Args:
        step: the first step of this process.
    """
    steps = config.train.max_steps
    first = max(min(step + WARMUP_STEPS, steps - STEPS), step)
    length = min(STEPS, steps - first)
    settings = vars(config.eval) | vars(config.train)
    cadences = [every for name, every in settings.items() if name.endswith("_every_steps") and every]

    def disturbances(start: int) -> int:
        return sum(step % every == 0 for step in range(start + 1, start + length) for every in cadences)

    last = min(steps - length, first + max(cadences, default=0), first + LONGEST_SEARCH)
    start = min(range(first, last + 1), key=disturbances, default=first)
    return range(start, start + length)


@contextmanager
def _mark(name: str, device: torch.device) -> Iterator[None]:
    nvtx = torch.cuda.nvtx.range(name) if device.type == "cuda" else nullcontext()
    with torch.profiler.record_function(name), nvtx:
        yield


# -- kernels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """One kernel on a GPU, or one operator on a CPU, over all of its calls in one phase."""

    name: str
    phase: str
    calls: int
    us: float


def kernel_costs(events: Sequence[FunctionEvent]) -> list[Cost]:
    """Costs in the recorded steps, costliest first.

    `key_averages` has no phases. A kernel counts to the phase in which the host started it, though it runs later. A
    kernel that no operator started, for example one of a CUDA graph, is unknown to torch.profiler's events: only the
    trace has it. The time of an operator on a CPU is without the operators inside it.
    """
    host = [event for event in events if event.device_type == DeviceType.CPU]
    step_at, phase_at = _marks(host, (STEP,)), _marks(host, PHASES)
    kernels = [(event, kernel.name, kernel.duration) for event in host for kernel in event.kernels]
    if not kernels:
        kernels = [(event, event.name, event.self_cpu_time_total) for event in host if not event.is_user_annotation]
    sums: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event, name, us in kernels:
        started = event.time_range.start
        if step_at(started):
            sums[name, phase_at(started) or OTHER].append(us)
    costs = [Cost(name, phase, len(durations), sum(durations)) for (name, phase), durations in sums.items()]
    return sorted(costs, key=lambda cost: cost.us, reverse=True)


def _marks(host: Iterable[FunctionEvent], names: tuple[str, ...]) -> Callable[[float], str | None]:
    """Finds which of these annotations, of which no two overlap, a time is in."""
    marks = [event for event in host if event.is_user_annotation and event.name in names]
    marks.sort(key=lambda event: event.time_range.start)
    starts = [event.time_range.start for event in marks]

    def name_at(time_us: float) -> str | None:
        index = bisect_right(starts, time_us) - 1
        return marks[index].name if index >= 0 and time_us <= marks[index].time_range.end else None

    return name_at


def gpu_busy_us(events: Iterable[FunctionEvent]) -> float:
    """Time in which at least one kernel ran on the GPU. 0: no GPU."""
    on_gpu = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    busy, end = 0.0, float("-inf")
    for start, stop in sorted((event.time_range.start, event.time_range.end) for event in on_gpu):
        busy += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return busy


def format_costs(costs: list[Cost], busy_us: float, steps: range, seconds: float) -> str:
    """A table of the phases and of the ten costliest kernels.

    Args:
        seconds: of the steps together.
    """
    n_steps, total = len(steps), sum(cost.us for cost in costs) or 1.0
    kind = "kernels" if busy_us else "operators"
    title = f"steps {steps[0] + 1:,} to {steps[-1] + 1:,}: {seconds / n_steps * 1e3:,.1f} ms per step while recording"
    if busy_us:
        title += f", kernels ran {min(busy_us / 1e6 / seconds, 1):.1%} of the time"
    lines = [title, "", f"phase      share   ms per step   {kind} per step"]
    for phase in (*PHASES, OTHER):
        of_phase = [cost for cost in costs if cost.phase == phase]
        us, n_calls = sum(cost.us for cost in of_phase), sum(cost.calls for cost in of_phase)
        if of_phase or phase != OTHER:
            ms = us / 1e3 / n_steps
            lines.append(f"{phase:<9} {us / total:>6.1%} {ms:>13,.2f} {n_calls / n_steps:>13,.0f}")
    lines += ["", f"the {SHOWN} costliest {kind}", "phase      share   ms per step   calls per step   name"]
    for cost in costs[:SHOWN]:
        ms, calls = cost.us / 1e3 / n_steps, cost.calls / n_steps
        name = cost.name if len(cost.name) <= NAME_CHARS else f"{cost.name[:NAME_CHARS]}..."
        lines.append(f"{cost.phase:<9} {cost.us / total:>6.1%} {ms:>13,.2f} {calls:>16,.1f}   {name}")
    return "\n".join(lines) + "\n"
