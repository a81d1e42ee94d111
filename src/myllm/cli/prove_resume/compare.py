"""Proof by doing that a run survives what ends it: train, kill, start again, and compare with a run left in peace.

    reference               1 rank, uninterrupted
    killed once, twice      1 rank; SIGKILL in the middle; the same command again
    other ranks             1 rank, killed; 2 ranks, killed; 1 rank to the end

Receipts say which samples were trained on and when, losses what came of it. On the same layout both are the same to the
last bit. On another number of ranks the receipts still are; sums are rounded otherwise, so losses agree within
TOLERANCE.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from myllm.config import RunConfig, to_dict
from myllm.distributed.collectives import choose_device
from myllm.distributed.device_info import cuda_device_count
from myllm.distributed.precision import compute_dtype, dtype_name
from myllm.files import write_json

from .training_process import RunFailed, TrainingProcess, logged_step, saved_step, train_rows

TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 3e-2}
"""Largest difference of a loss, in nats, by precision: some hundred times what is seen, and far below what one wrong
batch does."""
OTHER_RANKS = 2
Say = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """A run in one or more starts."""

    name: str
    ranks: tuple[int, ...]
    """Of each start. Every start but the last is killed."""

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-").replace(",", "")

    @property
    def same_layout(self) -> bool:
        return set(self.ranks) == {1}


REFERENCE = Trial("reference", (1,))
AGAIN = Trial("reference again", (1,))


@dataclass
class Result:
    """What became of a trial."""

    trial: Trial
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    kills: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    losses: str = ""
    receipts: str = ""


def run_trials(config: RunConfig, seed: int, folder: Path, say: Say) -> list[Result]:
    """Run every trial in `folder`, a temp_data/ of its own, and compare. Returns what was found, the reference first.

    Raises:
        Broken: not even the reference could be trained.
    """
    chance = random.Random(seed)
    trials = [Trial("killed once", (1, 1)), Trial("killed twice", (1, 1, 1))]
    trials += [Trial(f"1 rank, {other} ranks, 1 rank", (1, other, 1)) for other in world_sizes(config)[1:]]
    if world_sizes(config) == (1,):
        say(f"{OTHER_RANKS} ranks are not tried: that needs as many GPUs, or --train.device cpu")
    path = folder / "config.json"
    write_json(path, to_dict(config))
    reference = run_trial(REFERENCE, config, path, folder, chance, say)
    if reference.faults:
        raise RunFailed(f"the uninterrupted run failed: {reference.faults[0]}")
    results = [reference]
    own_spread: float | None = None
    for trial in trials:
        result = run_trial(trial, config, path, folder, chance, say)
        if trial.same_layout and not result.faults and own_spread is None and max_loss_difference(reference, result):
            say("losses differ on the same layout; does an uninterrupted run repeat itself here?")
            again = run_trial(AGAIN, config, path, folder, chance, say)
            own_spread = max_loss_difference(reference, again) if not again.faults else None
        judge_trial(result, reference, config, own_spread or 0.0)
        say(f"{trial.name}: {'; '.join(result.faults) or 'proven'}")
        results.append(result)
    return results


def run_trial(trial: Trial, config: RunConfig, path: Path, folder: Path, chance: random.Random, say: Say) -> Result:
    """All starts of one trial: each but the last is killed at a random step and moment."""
    result, steps = Result(trial), config.train.max_steps
    killed = sorted(chance.sample(range(1, steps), len(trial.ranks) - 1))
    for ranks, at in zip(trial.ranks, [*killed, None], strict=True):
        say(f"{trial.name}: {'to the end' if at is None else f'to be killed after step {at}'}, on {ranks} rank(s)")
        training = TrainingProcess.start(path, trial.folder, folder, ranks)
        try:
            if at is None:
                training.finish(steps)
            elif training.wait_for_step(at):
                time.sleep(chance.uniform(0, 0.2))  # in the middle of a step, or of a save
                training.kill()
                reached, saved = logged_step(training.run), saved_step(training.run)
                result.kills.append(f"step {reached}, saved {saved}")
                if saved < reached - 2 * config.train.save_every_steps:  # the newest may not have been whole yet
                    result.faults.append(f"killed at step {reached}, only step {saved} was saved")
            elif training.process.returncode:
                training.finish(steps)  # raises, with its last words
        except RunFailed as error:
            result.faults.append(str(error))
            break
        finally:
            if training.process.poll() is None:
                training.kill()
    result.rows = train_rows(training.run)
    return result


def judge_trial(result: Result, reference: Result, config: RunConfig, own_spread: float) -> None:
    """Compare with the reference, row by row.

    Args:
        own_spread: by how much two uninterrupted runs of this machine differ.
    """
    ours, theirs = result.rows, reference.rows
    missing = [step for step in theirs if step not in ours]
    if missing and not result.faults:
        result.faults.append(f"steps {missing[:5]} are not logged")
    shared = [step for step in theirs if step in ours]
    wrong = [step for step in shared if ours[step]["sample_digest"] != theirs[step]["sample_digest"]]
    result.receipts = f"{len(shared) - len(wrong)} of {len(theirs)} the same"
    if wrong:
        result.faults.append(f"from step {wrong[0]} on it trained on other samples")
    worst = max_loss_difference(reference, result)
    exact = result.trial.same_layout and not own_spread
    allowed = 0.0 if exact else tolerance(config)
    dropout = any((config.model.dropout_embedding, config.model.dropout_attention_residual, config.model.dropout_ffn))
    result.losses = "the same, bit for bit" if worst == 0 else f"within {worst:.1g}"
    if not exact and dropout and not result.trial.same_layout:
        result.losses += " (dropout draws other numbers on other ranks: not judged)"
    elif worst > allowed:
        result.faults.append(f"losses differ by up to {worst:.2g}, allowed {allowed:g}")
    elif own_spread:
        result.losses += f" (two uninterrupted runs here differ by {own_spread:.1g}"
        result.losses += ")" if config.train.deterministic else "; not with --train.deterministic)"


def max_loss_difference(one: Result, other: Result) -> float:
    """The largest difference of a loss, over the steps that both have."""
    shared = one.rows.keys() & other.rows.keys()
    return max((abs(one.rows[step]["loss"] - other.rows[step]["loss"]) for step in shared), default=0.0)


def tolerance(config: RunConfig) -> float:
    return TOLERANCE[dtype_name(compute_dtype(config.train.precision, choose_device(config.train.device)))]


def world_sizes(config: RunConfig) -> tuple[int, ...]:
    """The numbers of ranks that can be tried here: 1, and OTHER_RANKS on the CPU or where there are as many GPUs."""
    device = choose_device(config.train.device)
    room = device.type == "cpu" or (device.type == "cuda" and cuda_device_count() >= OTHER_RANKS)
    return (1, OTHER_RANKS) if room else (1,)


def format_results(results: list[Result]) -> str:
    """A table for people."""
    rows = [("trial", "killed at", "receipts", "losses", "verdict")]
    for result in results[1:]:
        kills = "; ".join(result.kills) or "never"
        rows.append((result.trial.name, kills, result.receipts, result.losses, "NO" if result.faults else "proven"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"  {result.trial.name}: {fault}" for result in results for fault in result.faults]
    return "\n".join(lines)
