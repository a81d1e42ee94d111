"""benchmarks/gpu_check.py: every stage at toy size; verdicts, budget and exit codes with made-up stages."""

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


@pytest.fixture
def frame(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_stages.frame")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, frame: ModuleType) -> ModuleType:
    return importlib.import_module("gpu_check")


class Clock:
    """Moves only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def run(frame: ModuleType, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stages by name, each a generator function and its estimate, on a budget of 100 s."""

    def run(stages: dict[str, tuple[Any, float]], scale: float = 1.0, on_change: Any = lambda outcomes: None) -> Any:
        for name, (function, _) in stages.items():
            monkeypatch.setitem(sys.modules, f"gpu_stages.{name}", SimpleNamespace(run=function))
        listed = [frame.Stage(name, name, seconds) for name, (_, seconds) in stages.items()]
        return frame.run_stages(listed, clock, frame.Budget(100.0, clock=clock), scale, on_change)

    return run


@pytest.mark.slow
def test_tiny_runs_every_stage(tmp_path: Path, script: ModuleType) -> None:
    """As `make gpu-check` runs it on a card, but at toy size: nothing is wrong, skipped, or left behind."""
    command = [sys.executable, str(SCRIPT), "--tiny", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "gpu_check.json").read_text(encoding="utf-8"))
    assert [stage["name"] for stage in report["stages"]] == [stage.name for stage in script.STAGES]
    verdicts = {check["verdict"] for stage in report["stages"] for check in stage["checks"]}
    assert verdicts <= {"passed", "noted"}
    assert all(stage["seconds"] > 0 and stage["checks"] for stage in report["stages"])
    assert "| stage | verdict | s | measured | expected |" in done.stdout
    assert "gpu_check: all passed; " in done.stdout
    assert (tmp_path / "out" / "gpu_check_trace.json.gz").stat().st_size > 0


def test_stages_import_without_optional_packages(script: ModuleType) -> None:
    """A machine that is lent for minutes has torch and little else."""
    absent = {"datasets", "matplotlib", "pyarrow", "safetensors", "transformers", "tyro", "zstandard"}
    program = f"""
import importlib, sys
from importlib.machinery import PathFinder

class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in {absent!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
sys.path[:0] = [{str(ROOT / "src")!r}, {str(ROOT / "benchmarks")!r}]
import gpu_check
for stage in gpu_check.STAGES:
    importlib.import_module(f"gpu_stages.{{stage.module}}")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


def test_missing_cuda_exits_with_code_2(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")]
    env = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=env)
    assert done.returncode == 2
    assert "cuda" in done.stderr
    assert "--tiny" in done.stderr


def test_unknown_stage_rejected(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.parse(["--only", "real", "ceilings"]).only == ["real", "ceilings"]
    with pytest.raises(SystemExit) as ended:
        script.parse(["--only", "reel"])
    assert ended.value.code == 2
    assert "real" in capsys.readouterr().err


def test_bounded_check_verdicts(frame: ModuleType) -> None:
    verdicts = [
        frame.bounded("a", 45.0, 39.0, None, "%").verdict,
        frame.bounded("a", 38.9, 39.0, None, "%").verdict,
        frame.bounded("a", 1.1, None, 1.05, "GiB").verdict,
        frame.bounded("a", 1.0, 0.9, 1.05, "GiB").verdict,
        frame.bounded("a", 1.0, None, None, "GiB").verdict,
        frame.bounded("a", math.nan, 0.0, None, "GiB").verdict,
    ]
    assert verdicts == ["passed", "out of bounds", "out of bounds", "passed", "noted", "out of bounds"]
    assert frame.bounded("a", 1.0, 0.9, 1.05, "GiB", 2).expected == "from 0.90 up to 1.05"


def test_close_rejects_nan_error(frame: ModuleType) -> None:
    assert frame.close("a", 1e-3, 1e-2).verdict == "passed"
    assert frame.close("a", 2e-2, 1e-2).verdict == "wrong"
    assert frame.close("a", math.nan, 1e-2).verdict == "wrong"


def test_crashed_stage_does_not_stop_others(frame: ModuleType, run: Any) -> None:
    """What the stage had found stays; the traceback is in the JSON."""

    def crashing(_: Any) -> Iterator[Any]:
        yield frame.noted("first", "1")
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")

    outcomes = run({"one": (crashing, 1), "two": (lambda _: [frame.noted("fine", "1")], 1)})
    assert [outcome.verdict for outcome in outcomes] == ["wrong", "noted"]
    assert [check.name for check in outcomes[0].checks] == ["first", "crashed"]
    assert "illegal memory access was encountered" in outcomes[0].checks[1].measured
    assert frame.exit_code(outcomes) == 1
    report = json.loads(json.dumps(frame.report(outcomes, {"budget_s": 100})))
    assert "in crashing" in report["stages"][0]["traceback"]
    assert (report["exit_code"], report["stages"][0]["verdict"]) == (1, "wrong")


def test_missing_package_stops_only_its_stage(frame: ModuleType, run: Any) -> None:
    def needing(_: Any) -> Iterator[Any]:
        importlib.import_module("tiktoken_of_nobody.core")
        yield frame.noted("never", "1")

    outcomes = run({"one": (needing, 1), "two": (lambda _: [frame.correct("fine", True, "1", "1")], 1)})
    assert [outcome.verdict for outcome in outcomes] == ["missing", "passed"]
    (check,) = outcomes[0].checks
    assert check.name == "package tiktoken_of_nobody"
    assert "--target DIR tiktoken_of_nobody" in check.expected
    assert frame.exit_code(outcomes) == 2


def test_stage_exceeding_budget_skipped(frame: ModuleType, run: Any, clock: Clock) -> None:
    """A shorter stage behind it still runs."""

    def lasting(_: Any) -> Iterator[Any]:
        clock.now += 70
        yield frame.correct("done", True, "1", "1")

    outcomes = run({"long": (lasting, 60), "longer": (lasting, 40), "short": (lambda _: [frame.noted("a", "1")], 20)})
    assert [outcome.verdict for outcome in outcomes] == ["passed", "skipped", "noted"]
    assert outcomes[1].checks[0].measured == "needs 40 s, 30 s are left"
    assert frame.exit_code(outcomes) == 75
    assert "the budget ended first (longer); 3 stages" in frame.summary(outcomes, 70, "a card")


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        (["passed", "noted"], 0),
        (["noted"], 0),
        (["passed", "skipped"], 75),
        (["skipped", "missing"], 2),
        (["out of bounds", "skipped", "missing"], 3),
        (["out of bounds", "wrong", "skipped"], 1),
    ],
)
def test_exit_code_reflects_worst_verdict(frame: ModuleType, verdicts: list[str], code: int) -> None:
    outcomes = [frame.Outcome("one", 1.0, [frame.Check("a", verdict, "1") for verdict in verdicts])]
    assert frame.exit_code(outcomes) == code
    assert frame.exit_code([*outcomes, frame.Outcome("two", 1.0, [frame.Check("b", "passed", "1")])]) == code


def test_table_has_row_per_check(frame: ModuleType) -> None:
    checks = [frame.correct("a|b", True, "1", "1"), frame.bounded("c", 2.0, 3.0, None, "%")]
    lines = frame.table([frame.Outcome("one", 1.25, checks)]).splitlines()
    assert lines[0] == "| stage | verdict | s | measured | expected |"
    assert lines[2:] == ["| one | passed | 1.2 | a/b: 1 | 1 |", "|  | out of bounds |  | c: 2.0 % | from 3.0 |"]


def test_json_report_updated_during_stages(
    frame: ModuleType, script: ModuleType, run: Any, clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is killed leaves what it had found."""
    seen = []

    def looking(_: Any) -> Iterator[Any]:
        yield frame.noted("first", "1")
        seen.append(json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8")))
        yield frame.correct("second", True, "1", "1")

    progress = script.Progress({}, "a card", frame.Budget(100.0, clock=clock), tmp_path)
    run({"one": (looking, 1)}, on_change=progress)
    assert [check["name"] for check in seen[0]["stages"][0]["checks"]] == ["first"]
    assert progress.conclude() == 0
    output = capsys.readouterr().out
    assert output.index("one: noted: first: 1") < output.index("one: passed: second: 1 (expected 1)")
    assert "all passed; 1 stages" in output


def test_hanging_stage_terminated_at_budget(tmp_path: Path, frame: ModuleType) -> None:
    """With what is known so far, in a process of its own: it is ended from a thread, here once the stage hangs."""
    program = f"""
import sys, threading, time
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from pathlib import Path
from types import SimpleNamespace
import gpu_check as script
from gpu_stages import frame

def hanging(_):
    yield frame.bounded("slow", 1.0, 2.0, None, "x")
    hangs.set()
    time.sleep(600)

sys.modules["gpu_stages.one"] = SimpleNamespace(run=hanging)
hangs, budget = threading.Event(), frame.Budget(1.0, clock=lambda: 0.0)
progress = script.Progress({{}}, "a card", budget, Path({str(tmp_path)!r}))
with script.ended_at(budget, lambda: hangs.wait() and script.give_up(progress, Path({str(tmp_path / "work")!r}))):
    frame.run_stages([frame.Stage("one", "one", 0.5)], None, budget, 1.0, progress)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 3, done.stderr
    assert "in hanging" in done.stderr
    checks = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))["stages"][0]["checks"]
    assert [check["verdict"] for check in checks] == ["out of bounds", "skipped"]
