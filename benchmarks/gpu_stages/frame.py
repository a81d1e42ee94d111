"""Stages, their verdicts, and what all of them come to: table, summary, exit code, JSON. Knows no torch."""

import importlib
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["passed", "wrong", "out of bounds", "noted", "skipped", "missing"]
EXIT_CODES: dict[str, int] = {"wrong": 1, "out of bounds": 3, "missing": 2, "skipped": 75, "passed": 0, "noted": 0}
"""By verdict, the worst first: the first of them that a run has is its own."""


@dataclass(frozen=True)
class Check:
    """One thing that a stage looked at, for people and, in `values`, for programs."""

    name: str
    verdict: Verdict
    measured: str
    expected: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def correct(name: str, right: bool, measured: str, expected: str, **values: Any) -> Check:
    """Something that must be so on any machine."""
    return Check(name, "passed" if right else "wrong", measured, expected, values)


def close(name: str, error: float, limit: float, **values: Any) -> Check:
    """An error that must not be larger than a limit; NaN is."""
    return correct(name, error <= limit, f"{error:.1e}", f"up to {limit:.0e}", error=error, **values)


def bounded(
    name: str, value: float, low: float | None, high: float | None, unit: str, digits: int = 1, **values: Any
) -> Check:
    """Speed or memory with what is expected of this machine; with no bounds it is only noted."""
    number = f"{{:,.{digits}f}}".format
    measured = f"{number(value)} {unit}"
    if low is None and high is None:
        return Check(name, "noted", measured, "", {"value": value, **values})
    within = (low is None or value >= low) and (high is None or value <= high)
    parts = [f"{word} {number(limit)}" for word, limit in (("from", low), ("up to", high)) if limit is not None]
    return Check(name, "passed" if within else "out of bounds", measured, " ".join(parts), {"value": value, **values})


def noted(name: str, measured: str, **values: Any) -> Check:
    """A figure with nothing to compare it with."""
    return Check(name, "noted", measured, "", values)


def skipped(name: str, why: str) -> Check:
    """Skipped because the time was over."""
    return Check(name, "skipped", why)


@dataclass(frozen=True)
class Stage:
    """One group of checks."""

    name: str
    module: str
    """In gpu_stages, with a function `run`. Imported when it is its turn: a package that is missing then stops this
    stage alone."""
    seconds: float
    """That it takes on an H100, at most: it is not begun with less left."""


class Budget:
    """Seconds that the whole check may take, counted from its process's start."""

    def __init__(self, seconds: float, began: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.seconds, self._began = seconds, clock() if began is None else began

    @property
    def used_s(self) -> float:
        return self._clock() - self._began

    @property
    def left_s(self) -> float:
        return self.seconds - self.used_s


@dataclass
class Outcome:
    """What became of one stage."""

    name: str
    seconds: float = 0.0
    checks: list[Check] = field(default_factory=list)
    traceback: str | None = None

    @property
    def verdict(self) -> Verdict:
        return worst(check.verdict for check in self.checks)


def worst(verdicts: Any) -> Verdict:
    there = set(verdicts)
    return next((verdict for verdict in EXIT_CODES if verdict in there), "noted")


def run_stages(
    stages: list[Stage],
    context: Any,
    budget: Budget,
    scale: float = 1.0,
    on_change: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Each stage in turn; one that crashes is wrong, one that there is no time for is skipped, and the rest go on.

    Args:
        context: what each stage's `run` is given.
        scale: of the seconds that stages are said to take.
        on_change: called with all outcomes so far before each stage and after each of its checks.
    """
    outcomes: list[Outcome] = []
    for stage in stages:
        outcome = Outcome(stage.name)
        outcomes.append(outcome)
        need_s = stage.seconds * scale
        if budget.left_s < need_s:
            outcome.checks.append(skipped("budget", f"needs {need_s:.0f} s, {max(budget.left_s, 0):.0f} s are left"))
            on_change(outcomes)
            continue
        on_change(outcomes)
        for _ in _checks_of(stage, context, outcome):
            on_change(outcomes)
    return outcomes


def _checks_of(stage: Stage, context: Any, outcome: Outcome) -> Iterator[None]:
    """Run a stage into its outcome, stopping after each check."""
    started = time.monotonic()
    try:
        run = importlib.import_module(f"{__package__}.{stage.module}").run
        for check in run(context):
            outcome.checks.append(check)
            outcome.seconds = time.monotonic() - started
            yield
    except ModuleNotFoundError as error:
        outcome.traceback = traceback.format_exc()
        outcome.checks.append(_missing(error))
    except Exception as error:
        outcome.traceback = traceback.format_exc()
        lines = str(error).strip().splitlines()
        measured = f"{type(error).__name__}: {lines[0] if lines else ''}"
        outcome.checks.append(Check("crashed", "wrong", measured[:300], "no error"))
    outcome.seconds = time.monotonic() - started
    yield


def _missing(error: ModuleNotFoundError) -> Check:
    name = (error.name or "").split(".")[0]
    how = (
        f"python -m pip install --no-deps --target DIR {name} (for another machine: pip download --only-binary=:all: "
        "with its --python-version and --platform), and DIR on its PYTHONPATH"
    )
    return Check(f"package {name}", "missing", "not installed", how, {"package": name})


# -- for people and programs ------------------------------------------------------------------------------------------


def table(outcomes: list[Outcome]) -> str:
    """A row for each check, Markdown: a stage's first row has its name and seconds."""
    rows = [("stage", "verdict", "s", "measured", "expected"), ("---",) * 5]
    for outcome in outcomes:
        for number, check in enumerate(outcome.checks):
            first = number == 0
            name, seconds = (outcome.name, f"{outcome.seconds:.1f}") if first else ("", "")
            rows.append((name, check.verdict, seconds, f"{check.name}: {check.measured}", check.expected))
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def exit_code(outcomes: list[Outcome]) -> int:
    return EXIT_CODES[worst(outcome.verdict for outcome in outcomes)]


def summary(outcomes: list[Outcome], seconds: float, where: str) -> str:
    """One line: the verdict of all, how often each verdict came, time and machine."""
    words = {
        0: "all passed",
        1: "WRONG RESULTS",
        2: "a package is missing",
        3: "correct, but out of bounds",
        75: "passed so far, the budget ended first",
    }[exit_code(outcomes)]
    bad = [outcome.name for outcome in outcomes if EXIT_CODES[outcome.verdict]]
    of = f" ({', '.join(bad)})" if bad else ""
    return f"gpu_check: {words}{of}; {len(outcomes)} stages in {seconds:.0f} s on {where}"


def report(outcomes: list[Outcome], about: dict[str, Any]) -> dict[str, Any]:
    """All of it, for JSON."""
    stages = [asdict(outcome) | {"verdict": outcome.verdict} for outcome in outcomes]
    return about | {"exit_code": exit_code(outcomes), "stages": stages}
