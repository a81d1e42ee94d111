"""Kill and restart small runs, and compare them with an uninterrupted one.

    reference                  1 rank, uninterrupted
    killed once, killed twice  1 rank, SIGKILL at a random moment, same command again
    1 rank, 2 ranks, 1 rank    killed on 1 rank, killed on 2, finished on 1

Sample digests show which samples were used at which step; losses show the result. With an unchanged number of ranks,
both must be bitwise equal. With another number, digests must be equal and losses agree within TOLERANCE, because sums
are rounded differently.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from myllm.checkpoint.layout import newest_step
from myllm.config import RunConfig, to_dict
from myllm.distributed.collectives import choose_device
from myllm.distributed.device_info import cuda_device_count
from myllm.distributed.precision import compute_dtype, dtype_name
from myllm.files import write_json
from myllm.formatting import format_table
from myllm.paths import RunPaths

from .training_process import RunFailed, TrainingProcess, logged_step, train_rows

TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 3e-2}
"""Largest difference of a loss, in nats, by precision: about 100 times the usual one, and much less than that of a
single wrong batch."""
MORE_RANKS = 2


@dataclass(frozen=True)
class Trial:
    """A run in one or more starts. All but the last are killed."""

    name: str
    ranks: tuple[int, ...]
    """Number of ranks of each start."""

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-").replace(",", "")

    @property
    def same_ranks(self) -> bool:
        return set(self.ranks) == {1}


REFERENCE = Trial("reference", (1,))
REPEATED = Trial("reference again", (1,))


@dataclass
class Result:
    """The outcome of a trial."""

    trial: Trial
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Metrics by step."""
    kills: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    losses: str = ""
    digests: str = ""


@dataclass(frozen=True)
class Prover:
    """Runs trials with one config in a folder, which serves as their temp_data/."""

    config: RunConfig
    folder: Path
    rng: random.Random
    log: Callable[[str], None]

    def run_trials(self) -> list[Result]:
        """Run all trials and compare them. The first result is that of the reference.

        Raises:
            RunFailed: the reference could not be trained.
        """
        sizes = world_sizes(self.config)
        trials = [Trial("killed once", (1, 1)), Trial("killed twice", (1, 1, 1))]
        trials += [Trial(f"1 rank, {ranks} ranks, 1 rank", (1, ranks, 1)) for ranks in sizes[1:]]
        if len(sizes) == 1:
            self.log(f"not tested with {MORE_RANKS} ranks: that needs as many GPUs, or --train.device cpu")
        reference = self.run_trial(REFERENCE)
        if reference.errors:
            raise RunFailed(f"the uninterrupted run failed: {reference.errors[0]}")
        results, noise = [reference], None
        for trial in trials:
            result = self.run_trial(trial)
            if trial.same_ranks and not result.errors and noise is None and max_loss_difference(reference, result):
                self.log("losses differ with the same number of ranks; are uninterrupted runs reproducible here?")
                repeated = self.run_trial(REPEATED)
                noise = None if repeated.errors else max_loss_difference(reference, repeated)
            judge_trial(result, reference, self.config, noise or 0.0)
            self.log(f"{trial.name}: {'; '.join(result.errors) or 'proven'}")
            results.append(result)
        return results

    def run_trial(self, trial: Trial) -> Result:
        """Run all starts of a trial. Each but the last is killed at a random step and moment."""
        result, steps, run = Result(trial), self.config.train.max_steps, RunPaths(self.folder / "runs" / trial.folder)
        run.root.mkdir(parents=True)
        write_json(run.trial, to_dict(self.config))
        kill_steps = sorted(self.rng.sample(range(1, steps), len(trial.ranks) - 1))
        for ranks, kill_step in zip(trial.ranks, [*kill_steps, None], strict=True):
            until = "to the end" if kill_step is None else f"killed after step {kill_step}"
            self.log(f"{trial.name}: {until}, on {ranks} rank{'s' * (ranks != 1)}")
            training = TrainingProcess.start(run.trial, trial.folder, self.folder, ranks)
            try:
                if kill_step is not None and training.wait_for_step(kill_step):
                    time.sleep(self.rng.uniform(0, 0.2))  # in the middle of a step or a save
                    training.kill()
                    self._record_kill(result, training)
                elif kill_step is None or training.process.returncode:
                    training.finish(steps)
            except RunFailed as error:
                result.errors.append(str(error))
                break
            finally:
                if training.process.poll() is None:
                    training.kill()
        result.rows = train_rows(training.run)
        return result

    def _record_kill(self, result: Result, training: TrainingProcess) -> None:
        reached, saved = logged_step(training.run), newest_step(training.run.checkpoints)
        result.kills.append(f"step {reached}, saved {saved}")
        if saved < reached - 2 * self.config.train.save_every_steps:  # the newest save may have been incomplete
            result.errors.append(f"killed at step {reached}, but only step {saved} was saved")


def judge_trial(result: Result, reference: Result, config: RunConfig, noise: float) -> None:
    """Compare a result with the reference, row by row, and record errors.

    `noise` is the largest difference of losses between two uninterrupted runs on this machine.
    """
    rows, expected = result.rows, reference.rows
    missing = [step for step in expected if step not in rows]
    if missing and not result.errors:
        result.errors.append(f"steps {missing[:5]} are not logged")
    shared = [step for step in expected if step in rows]
    wrong = [step for step in shared if rows[step]["sample_digest"] != expected[step]["sample_digest"]]
    result.digests = f"{len(shared) - len(wrong)} of {len(expected)} equal"
    if wrong:
        result.errors.append(f"from step {wrong[0]} on, it trained on other samples")
    worst = max_loss_difference(reference, result)
    exact = result.trial.same_ranks and not noise
    allowed = 0.0 if exact else tolerance(config)
    dropout = any((config.model.dropout_embedding, config.model.dropout_attention_residual, config.model.dropout_ffn))
    result.losses = "bitwise equal" if worst == 0 else f"within {worst:.1g}"
    if not exact and dropout and not result.trial.same_ranks:
        result.losses += " (not compared: dropout differs between numbers of ranks)"
    elif worst > allowed:
        result.errors.append(f"losses differ by up to {worst:.2g}, allowed {allowed:g}")
    elif noise:
        result.losses += f" (two uninterrupted runs here differ by {noise:.1g}"
        result.losses += ")" if config.train.deterministic else "; not with --train.deterministic)"


def max_loss_difference(a: Result, b: Result) -> float:
    """The largest difference of a loss, over the steps that both have."""
    return max(
        (abs(a.rows[step]["loss"] - b.rows[step]["loss"]) for step in a.rows.keys() & b.rows.keys()), default=0.0
    )


def tolerance(config: RunConfig) -> float:
    return TOLERANCE[dtype_name(compute_dtype(config.train.precision, choose_device(config.train.device)))]


def world_sizes(config: RunConfig) -> tuple[int, ...]:
    """Numbers of ranks to test: 1, and MORE_RANKS on the CPU or if there are enough GPUs."""
    device = choose_device(config.train.device)
    enough = device.type == "cpu" or (device.type == "cuda" and cuda_device_count() >= MORE_RANKS)
    return (1, MORE_RANKS) if enough else (1,)


def format_results(results: list[Result]) -> str:
    """A table of all results but the reference, and all errors."""
    rows = [("trial", "killed at", "sample digests", "losses", "result")]
    for result in results[1:]:
        kills = "; ".join(result.kills) or "never"
        rows.append((result.trial.name, kills, result.digests, result.losses, "FAILED" if result.errors else "proven"))
    errors = [f"  {result.trial.name}: {error}" for result in results for error in result.errors]
    return "\n".join([format_table(rows), *errors])
