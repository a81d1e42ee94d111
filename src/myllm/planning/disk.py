"""What a run writes to the disk, from its config alone."""

import bisect
import math
from collections.abc import Sequence

from myllm.config import RunConfig, TrainConfig

from .flops import stored_parameters


def checkpoint_bytes(config: RunConfig) -> int:
    """Weights and AdamW's two moments in float32."""
    return 12 * stored_parameters(config.model)


def n_saves(train: TrainConfig, first: int, last: int) -> int:
    """How many checkpoints are made after step `first`, up to `last`: at multiples of save_every_steps and of
    keep_every_steps, and at the run's end. By arithmetic, however long the run is."""
    cadences = [every for every in (train.save_every_steps, train.keep_every_steps) if every > 0]

    def multiples(of: int) -> int:
        return last // of - first // of

    count = sum(map(multiples, cadences)) - (multiples(math.lcm(*cadences)) if len(cadences) == 2 else 0)
    at_end = first < train.max_steps <= last and not any(train.max_steps % every == 0 for every in cadences)
    return max(count, 0) + at_end


def n_kept(train: TrainConfig, here: Sequence[int] = (), step: int = 0) -> int:
    """How many checkpoints there are when a run has ended: keep_last of the newest (0: all), and those at multiples of
    keep_every_steps.

    Args:
        here: the steps of those that are there already, in order.
        step: where the run goes on.
    """
    end, ahead = train.max_steps, n_saves(train, step, train.max_steps)
    if not train.keep_last or train.keep_last >= len(here) + ahead:
        return len(here) + ahead
    milestone = train.keep_every_steps
    if train.keep_last >= ahead:
        older = here[: len(here) - (train.keep_last - ahead)]
        milestones_ahead = 0
    else:  # the step before the newest keep_last, by bisection: each step further back can only add saves
        older = here
        newest = bisect.bisect_left(
            range(end - step), train.keep_last, key=lambda back: n_saves(train, end - back, end)
        )
        milestones_ahead = (end - newest) // milestone - step // milestone if milestone else 0
    return train.keep_last + milestones_ahead + sum(milestone > 0 and at % milestone == 0 for at in older)


def disk_estimate_bytes(config: RunConfig) -> dict[str, int]:
    """What the run's folder and its data set take, for what can be known before anything is read."""
    kept = n_kept(config.train)
    trained = config.train.max_steps * config.train.batch_tokens
    tokens = min(trained, config.data.target_tokens or trained) + config.data.val_tokens
    best = config.train.early_stop_patience is not None
    # One more than kept: the newest is whole before the oldest goes.
    return {"checkpoints": (kept + 1 + best) * checkpoint_bytes(config), "token shards, at most": 2 * tokens}
