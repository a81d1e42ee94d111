"""Is this card right, and as fast as it should be? One command, one card, nine minutes, one verdict.

    python benchmarks/gpu_check.py [--budget-s 540] [--only STAGE ...] [--out DIR] [--tiny]

Runs the product's own functions on made-up text, in one process, without a network: stages by worth, each with what it
measured and what is expected (gpu_stages/). A stage that there is no time for is skipped and says so; one that crashes
is a failure, and the others go on. Ends with a table, one line, and in --out gpu_check.json and a profile's trace.
--tiny runs every stage at toy size on a CPU, which proves the script and not the machine. docs/speed.md has more.

Exit code: 0 all passed, 1 wrong results, 3 memory or speed out of bounds, 2 no CUDA or a package is missing, 75 the
budget ended first.
"""

import argparse
import faulthandler
import gc
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # runs from a bare checkout too

from gpu_stages.frame import Budget, Outcome, Stage, exit_code, report, run_stages, skipped, summary, table

BEGAN = time.monotonic()
STAGES = [
    Stage("ceilings", "ceilings", 15),
    Stage("correct", "correct", 75),
    Stage("real", "real", 90),
    Stage("resume", "resume", 30),
    Stage("parallel", "parallel", 60),
    Stage("guard", "guard", 15),
    Stage("muon", "muon", 25),
    Stage("memory", "memory", 15),
    Stage("evaluations", "evaluations", 25),
    Stage("decode", "decode", 40),
    Stage("save", "saves", 25),
    Stage("fp16", "float16", 40),
    Stage("peers", "peers", 90),
    Stage("variants", "variants", 45),
]
"""By worth. Seconds are estimates until a card has been measured."""
TINY_SCALE = 0.01
"""Of those seconds, at toy size."""
REPORT = "gpu_check.json"


def main() -> int:
    options = parse(sys.argv[1:])
    budget = Budget(options.budget_s, BEGAN)
    out = options.out or default_out(options.tiny)
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="gpu_check-"))
    # The compiler's time is measured, so no cache of an earlier process counts; runs are rehearsed in this folder.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(work / "inductor"))
    os.environ["MYLLM_DATA"] = str(work)
    try:
        return check(options, budget, out, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def parse(words: list[str]) -> argparse.Namespace:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=f"stages: {', '.join(names)}", allow_abbrev=False
    )
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds it may take in all (540)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help="these stages, in their usual order")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the trace (temp_data/benchmarks/...)")
    parser.add_argument("--tiny", action="store_true", help="every stage at toy size on a CPU")
    return parser.parse_args(words)


def default_out(tiny: bool) -> Path:
    from myllm import paths

    return paths.temp_data() / "benchmarks" / f"gpu_check-{'tiny-' * tiny}{time.strftime('%Y-%m-%d-%H%M%S')}"


def check(options: argparse.Namespace, budget: Budget, out: Path, work: Path) -> int:
    """Run the stages and say what they found; the exit code."""
    from gpu_stages.bench import Bench, no_compiler

    from myllm.distributed import launcher as ranks
    from myllm.distributed.collectives import process_group
    from myllm.distributed.device_info import device_name
    from myllm.errors import UserError
    from myllm.runs.logs import environment

    ranks.make_cublas_deterministic()  # for the deterministic part, which comes long after cuBLAS has begun
    with ExitStack() as stack:
        try:
            process = stack.enter_context(process_group("cpu" if options.tiny else "cuda"))
        except UserError as error:
            print(f"gpu_check: {error}; --tiny tries the script itself on a CPU", file=sys.stderr)
            return 2
        if options.tiny:
            stack.enter_context(no_compiler())
        about = environment(process.device, 1) | {"budget_s": budget.seconds, "tiny": options.tiny}
        progress = Progress(about, f"{device_name(process.device)}, torch {about['versions']['torch']}", budget, out)
        stack.enter_context(ended_at(budget, lambda: give_up(progress, work)))
        stages = [stage for stage in STAGES if not options.only or stage.name in options.only]
        bench = Bench(process, budget, out, work, options.tiny)
        gc.freeze()  # stages collect garbage to count memory, and need not look at what is loaded by now
        run_stages(stages, bench, budget, TINY_SCALE if options.tiny else 1.0, progress)
        return progress.conclude()


class Progress:
    """Says each check as it is made and keeps the JSON up to date, so that a killed run leaves what it had."""

    def __init__(self, about: dict[str, Any], where: str, budget: Budget, out: Path) -> None:
        self._about, self._where, self._budget, self._file = about, where, budget, out / REPORT
        self._n_printed = 0
        self.outcomes: list[Outcome] = []

    def __call__(self, outcomes: list[Outcome]) -> None:
        self.outcomes = outcomes
        self._keep()
        found = [(outcome.name, check) for outcome in outcomes for check in outcome.checks]
        for name, check in found[self._n_printed :]:
            expected = f" (expected {check.expected})" if check.expected else ""
            line = f"{name}: {check.verdict}: {check.name}: {check.measured}{expected}"
            print(f"[{self._budget.used_s:5.0f} s] {line}", flush=True)
        self._n_printed = len(found)

    def conclude(self) -> int:
        """The table and the line that sums it up; the exit code."""
        self._keep()
        print(f"\n{table(self.outcomes)}\n\n{summary(self.outcomes, self._budget.used_s, self._where)}")
        print(f"gpu_check: written to {self._file}", flush=True)
        return exit_code(self.outcomes)

    def _keep(self) -> None:
        from myllm.files import write_json

        write_json(self._file, report(self.outcomes, self._about | {"seconds": self._budget.used_s}))


@contextmanager
def ended_at(budget: Budget, give_up: Callable[[], None]) -> Iterator[None]:
    """Call `give_up` from another thread when the budget is spent: what hangs in CUDA or NCCL cannot be interrupted."""
    timer = threading.Timer(max(budget.left_s, 0.0), give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def give_up(progress: Progress, work: Path) -> None:
    """End the process with what is known so far, and with where it stood."""
    faulthandler.dump_traceback()
    if progress.outcomes:
        progress.outcomes[-1].checks.append(skipped("budget", "not ended when the budget was spent"))
    code = progress.conclude()
    shutil.rmtree(work, ignore_errors=True)
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
