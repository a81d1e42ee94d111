"""Kill and restart one training run at random moments for a long time.

    python benchmarks/soak.py --minutes 30 --seed 1

Each start gets SIGKILL or SIGTERM, in one rank or in torchrun and all of them, after a random time; the number of ranks
changes between starts. At the end the run is finished, and its sample digests must be those of an uninterrupted run
(losses are shown; they differ by rounding between numbers of ranks). Prints the number of kills, the steps lost, and
the seconds from a start to its first new step.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from myllm.checkpoint.layout import newest_step
from myllm.cli.prove_resume.command import shrink_config
from myllm.cli.prove_resume.training_process import (
    RunFailed,
    TrainingProcess,
    logged_step,
    train_rows,
    wait_until_gone,
)
from myllm.config import to_dict
from myllm.files import write_json
from myllm.presets import get_preset

SAVE_EVERY = 5
KILL_TIMEOUT_S = 120
MAX_STEPS = 15
"""Most steps of a start before it is killed."""


@dataclass
class Figures:
    kills: dict[str, int] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)
    """Steps from the newest save to each kill."""
    recovery_s: list[float] = field(default_factory=list)
    """From a start to the first new step."""


def kill_randomly(training: TrainingProcess, rng: random.Random) -> str:
    """Kill a run in one of four ways, and return which."""
    number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
    pids, ranks = training.processes(), training.ranks()
    target_name = rng.choice(("one rank", "all"))
    if target_name == "all" and number == signal.SIGKILL:
        training.kill()
    else:
        # torchrun forwards SIGTERM to every rank.
        target = rng.choice(ranks) if target_name == "one rank" and ranks else training.process.pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, number)
        training.process.wait(KILL_TIMEOUT_S)
    wait_until_gone(pids)
    return f"{number.name} to {target_name}"


def wait_for(training: TrainingProcess, step: int) -> None:
    """
    Raises:
        RunFailed: the run ended before.
    """
    if not training.wait_for_step(step):
        raise RunFailed(
            f"the run ended without being killed, with exit code {training.process.returncode}; see {training.log}"
        )


def soak(minutes: float, seed: int, folder: Path) -> Figures:
    rng, figures = random.Random(seed), Figures()
    config = shrink_config(get_preset("debug"))
    small = replace(config.model, max_seq_len=64, d_model=16, n_layers=2, n_heads=2, d_ff=32)
    config = replace(
        config, model=small, data=replace(config.data, target_tokens=1_000_000),
        optim=replace(config.optim, schedule="wsd", decay_fraction=0.0),
        train=replace(
            config.train, max_steps=1_000_000, batch_tokens=128, micro_batch_size=1, save_every_steps=SAVE_EVERY
        ),
    )  # fmt: skip
    path = folder / "config.json"
    write_json(path, to_dict(config))
    until, last, training = time.monotonic() + 60 * minutes, 0, None
    while time.monotonic() < until:
        ranks = rng.choice((1, 2, 2))
        started = time.monotonic()
        training = TrainingProcess.start(path, "soak", folder, ranks)
        wait_for(training, last + 1)
        figures.recovery_s.append(time.monotonic() - started)
        wait_for(training, last + 1 + rng.randrange(MAX_STEPS))
        time.sleep(rng.uniform(0, 0.5))  # in the middle of a step or of a save
        kind = kill_randomly(training, rng)
        reached, saved = logged_step(training.run), newest_step(training.run.checkpoints)
        figures.kills[kind] = figures.kills.get(kind, 0) + 1
        figures.lost.append(reached - saved)
        if saved < last or reached - saved > 2 * SAVE_EVERY:  # the newest save may have been incomplete
            raise RunFailed(f"reached step {reached} with step {last} saved, but now the newest save is step {saved}")
        last = saved
        print(f"{sum(figures.kills.values()):4}  {kind:<20} on {ranks}: step {reached}, saved {saved}", flush=True)
    steps = logged_step(training.run) + 5
    write_json(path, to_dict(replace(config, train=replace(config.train, max_steps=steps))))
    TrainingProcess.start(path, "soak", folder, 2).finish(steps)
    whole = TrainingProcess.start(path, "whole", folder, 1)
    whole.finish(steps)
    compare(train_rows(training.run), train_rows(whole.run), steps)
    return figures


def compare(rows: dict, expected: dict, steps: int) -> None:
    """
    Raises:
        RunFailed: the runs trained on other samples.
    """
    for step in range(1, steps + 1):
        if rows[step]["sample_digest"] != expected[step]["sample_digest"]:
            raise RunFailed(f"at step {step} it had trained on other samples than the uninterrupted run")
    worst = max(abs(rows[step]["loss"] - expected[step]["loss"]) for step in expected)
    print(f"{steps} sample digests equal those of the uninterrupted run; losses differ by {worst:.1e} at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    folder = Path(mkdtemp(prefix="myllm-soak-"))
    print(f"{args.minutes:g} minutes, --seed {args.seed}, in {folder}", flush=True)
    try:
        figures = soak(args.minutes, args.seed, folder)
    except RunFailed as error:
        sys.exit(f"FAILED: {error}\nall files are in {folder}")
    shutil.rmtree(folder)
    for kind, count in sorted(figures.kills.items()):
        print(f"  {count:4}  {kind}")
    print(
        f"kills survived: {sum(figures.kills.values())}; steps lost: mean {statistics.mean(figures.lost):.1f}, at most "
        f"{max(figures.lost)} (a save every {SAVE_EVERY}); a start to its first new step: mean "
        f"{statistics.mean(figures.recovery_s):.1f} s"
    )


if __name__ == "__main__":
    main()
