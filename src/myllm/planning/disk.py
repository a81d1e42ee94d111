"""What a run writes to the disk, from its config alone."""

import bisect
import math
from collections.abc import Sequence

from myllm.config import RunConfig, TrainConfig

from .flops import FLOAT, optimizer_state_bytes, stored_parameters

SPARE_BYTES = 2_000_000
"""Per checkpoint, for everything but the numbers in tensors: metadata, random state, tokenizer."""


def bytes_per_token(vocab_size: int) -> int:
    """In shards and work items. Ids of a vocabulary of at most 65,536 tokens are uint16, others uint32."""
    return 2 if vocab_size <= 1 << 16 else 4


def checkpoint_bytes(config: RunConfig) -> int:
    """One checkpoint: the weights in float32 and the optimizer's state."""
    return FLOAT * stored_parameters(config.model) + optimizer_state_bytes(config) + SPARE_BYTES


def save_due(train: TrainConfig, step: int, ending: bool) -> bool:
    """True if a checkpoint is to be saved after `step` steps."""
    return step > 0 and (ending or any(step % every == 0 for every in _save_cadences(train)))


def _save_cadences(train: TrainConfig) -> list[int]:
    return [every for every in (train.save_every_steps, train.keep_every_steps) if every > 0]


def n_saves(train: TrainConfig, first: int, last: int) -> int:
    """Checkpoints written after step `first`, up to step `last`: at multiples of save_every_steps and keep_every_steps,
    and at the end of the run. In constant time, however long the run is."""
    cadences = _save_cadences(train)

    def multiples(every: int) -> int:
        return last // every - first // every

    count = sum(map(multiples, cadences)) - (multiples(math.lcm(*cadences)) if len(cadences) == 2 else 0)
    at_end = first < train.max_steps <= last and not any(train.max_steps % every == 0 for every in cadences)
    return max(count, 0) + at_end


def n_kept(train: TrainConfig, existing: Sequence[int] = (), step: int = 0) -> int:
    """Checkpoints on the disk at the end of a run: the newest keep_last (0: all) and the multiples of keep_every_steps.

    Args:
        existing: steps of the checkpoints that are on the disk now, ascending.
        step: where the run resumes.
    """
    end, ahead = train.max_steps, n_saves(train, step, train.max_steps)
    if not train.keep_last or train.keep_last >= len(existing) + ahead:
        return len(existing) + ahead
    milestone = train.keep_every_steps
    if train.keep_last >= ahead:
        older = existing[: len(existing) - (train.keep_last - ahead)]
        milestones_ahead = 0
    else:  # find the step before the newest keep_last by bisection: n_saves only grows with the distance to the end
        older = existing
        distance = bisect.bisect_left(range(end - step), train.keep_last, key=lambda n: n_saves(train, end - n, end))
        milestones_ahead = (end - distance) // milestone - step // milestone if milestone else 0
    return train.keep_last + milestones_ahead + sum(milestone > 0 and saved % milestone == 0 for saved in older)


def n_added(config: RunConfig, existing: Sequence[int] = (), step: int = 0, has_best: bool = False) -> int:
    """The most checkpoints that a run adds to the existing ones at any time: the newest is complete before the oldest
    is removed.

    Args:
        has_best: the checkpoint with the lowest validation loss is on the disk already.
    """
    train = config.train
    if not n_saves(train, step, train.max_steps):
        return 0
    needs_best = train.early_stop_patience is not None and not has_best
    return max(n_kept(train, existing, step) - len(existing) + needs_best, 0) + 1


def disk_estimate_bytes(config: RunConfig) -> dict[str, int]:
    """Disk space of a new run and its data set."""
    trained = config.train.max_steps * config.train.batch_tokens
    tokens = min(trained, config.data.target_tokens or trained) + config.data.val_tokens
    return {
        "checkpoints": n_added(config) * checkpoint_bytes(config),
        "token shards, at most": bytes_per_token(config.model.vocab_size) * tokens,
    }
