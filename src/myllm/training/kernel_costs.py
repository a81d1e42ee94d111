"""What the kernels of a profile cost, read from its Chrome trace.

A GPU's kernels run long after the host has started them, so each is counted to the phase in which it was started. On a
CPU there are no kernels apart: operations stand for them, each with the time that is its own and not that of others
inside it.

Source: the fields are those of PyTorch's profiler (Kineto): complete events (`ph` "X") with `ts` and `dur` in
microseconds, categories, and a `correlation` that a kernel shares with the call that started it.
"""

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = ("data", "forward", "backward", "clip", "optimizer")
"""Of a training step, in order."""
STEP = "step"
"""Around all of them; what is outside is no training and not counted."""
OTHER = "other"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
STARTERS = ("cuda_runtime", "cuda_driver")
SHOWN = 10
NAME_CHARS = 90

Event = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """One kernel, over all of its calls in one phase."""

    name: str
    phase: str
    calls: int
    us: float


@dataclass(frozen=True)
class Costs:
    """What a trace says."""

    costs: list[Cost]
    """The costliest first."""
    on_device: bool
    """Whether they are a GPU's kernels, or a CPU's operations."""
    busy_us: float
    """Time in which at least one of them ran."""


def read(trace: dict[str, Any]) -> Costs:
    """The costs of a Chrome trace's kernels."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    step_of, phase_of = _marked(events, (STEP,)), _marked(events, PHASES)
    kernels = [event for event in events if event.get("cat") in ON_DEVICE]
    if kernels:
        started = {_correlation(event): event["ts"] for event in events if event.get("cat") in STARTERS}
        timed = [(event, event["dur"], started.get(_correlation(event), event["ts"])) for event in kernels]
    else:
        timed = [(event, own, event["ts"]) for event, own in _own_times(events) if event["cat"] == "cpu_op"]
    timed = [each for each in timed if step_of(each[-1])]
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for event, us, moment in timed:
        entry = sums[event["name"], phase_of(moment) or OTHER]
        entry[0] += 1
        entry[1] += us
    costs = [Cost(name, phase, int(calls), us) for (name, phase), (calls, us) in sums.items()]
    costs.sort(key=lambda cost: cost.us, reverse=True)
    return Costs(costs, bool(kernels), _covered((event["ts"], event["ts"] + event["dur"]) for event, *_ in timed))


def table(trace: Path, steps: range, seconds: float) -> str:
    """The ten costliest kernels and the phases, for people.

    Args:
        trace: a Chrome trace of these steps.
        seconds: that they took together.
    """
    found = read(json.loads(trace.read_text(encoding="utf-8")))
    total = sum(cost.us for cost in found.costs) or 1.0
    what = "kernels" if found.on_device else "operations"
    lines = [
        f"steps {steps[0] + 1:,} to {steps[-1] + 1:,}: {seconds / len(steps) * 1e3:,.1f} ms a step while recorded, of "
        f"which {what} ran {min(found.busy_us / 1e6 / seconds, 1):.1%}",
        "",
        f"phase      share   ms a step   {what} a step",
    ]
    for phase in (*PHASES, OTHER):
        mine = [cost for cost in found.costs if cost.phase == phase]
        if mine or phase != OTHER:
            us, calls = sum(cost.us for cost in mine), sum(cost.calls for cost in mine)
            lines.append(f"{phase:<9} {us / total:>6.1%} {us / 1e3 / len(steps):>11,.2f} {calls / len(steps):>11,.0f}")
    lines += ["", f"the {SHOWN} costliest {what}", "phase      share   ms a step   calls a step   name"]
    for cost in found.costs[:SHOWN]:
        ms, calls = cost.us / 1e3 / len(steps), cost.calls / len(steps)
        name = cost.name if len(cost.name) <= NAME_CHARS else f"{cost.name[:NAME_CHARS]}..."
        lines.append(f"{cost.phase:<9} {cost.us / total:>6.1%} {ms:>11,.2f} {calls:>14,.1f}   {name}")
    return "\n".join(lines) + "\n"


def _marked(events: list[Event], names: tuple[str, ...]) -> Callable[[float], str | None]:
    """Which of these marks, of which no two overlap, a moment is in."""
    marks = [event for event in events if event.get("cat") == "user_annotation" and event["name"] in names]
    marks.sort(key=lambda event: event["ts"])
    starts = [event["ts"] for event in marks]

    def mark_of(moment: float) -> str | None:
        place = bisect_right(starts, moment) - 1
        inside = place >= 0 and moment <= marks[place]["ts"] + marks[place]["dur"]
        return marks[place]["name"] if inside else None

    return mark_of


def _own_times(events: list[Event]) -> list[tuple[Event, float]]:
    """Operations and marks, each with its time less that of those directly inside it."""
    nested = [event for event in events if event.get("cat") in ("cpu_op", "user_annotation")]
    nested.sort(key=lambda event: (event["pid"], event["tid"], event["ts"], -event["dur"]))
    own = [event["dur"] for event in nested]
    open_places: list[int] = []
    for place, event in enumerate(nested):
        while open_places and not _inside(event, nested[open_places[-1]]):
            open_places.pop()
        if open_places:
            own[open_places[-1]] -= event["dur"]
        open_places.append(place)
    return list(zip(nested, own, strict=True))


def _inside(event: Event, other: Event) -> bool:
    same = (event["pid"], event["tid"]) == (other["pid"], other["tid"])
    return same and event["ts"] < other["ts"] + other["dur"]


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of what spans cover together."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(end - max(start, until), 0.0)
        until = max(until, end)
    return covered


def _correlation(event: Event) -> Any:
    return event.get("args", {}).get("correlation")
