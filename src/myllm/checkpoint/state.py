"""The state of a run: how far it has come, and what early stopping and the gradient guard count. Stored in state.json.

A validation is better if its loss is lower than every one before, by however little, as in Keras and Lightning. One
that is not finite is not better; one that failed does not count. The one before the first step does not count either.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from myllm.data.sample_digest import SampleDigest
from myllm.data.sampler import DataPosition
from myllm.errors import UserError
from myllm.files import read_json
from myllm.migrations import STATE, dataclass_from_json

NO_DATASET = ""
"""In place of a data set's hash: weights from elsewhere, to be trained on whatever they are given."""
FIRST_LOSS_SCALE = 2.0**16
"""As torch.amp.GradScaler begins."""


@dataclass(frozen=True)
class EarlyStop:
    """The validations since early stopping was switched on. Part of TrainState, so that a restart counts on."""

    best_loss: float | None = None
    best_step: int | None = None
    """None: none yet, or none that was finite."""
    since_best: int = 0
    """Validations after the best one."""
    counted_step: int = 0
    """Of the newest validation that is counted."""

    def after(self, step: int, loss: float) -> "EarlyStop":
        """With one more validation. One that is counted already, and done again after a restart, changes nothing."""
        if step <= self.counted_step:
            return self
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            return EarlyStop(loss, step, 0, step)
        return replace(self, since_best=self.since_best + 1, counted_step=step)

    def exhausted(self, patience: int | None) -> bool:
        return patience is not None and self.since_best >= patience

    def __str__(self) -> str:
        if self.best_loss is None:
            return f"no validation loss was finite, {self.since_best} in a row"
        return (
            f"the lowest validation loss is {self.best_loss:.4f}, at step {self.best_step:,}, with {self.since_best} "
            f"validation{'s' * (self.since_best != 1)} since"
        )


@dataclass(frozen=True)
class SkipStats:
    """Counts since the run's first step, and running statistics of the norm's logarithm, in float32."""

    nonfinite: int = 0
    """Updates left out because the loss or the gradient was not finite."""
    spikes: int = 0
    """Updates left out because the gradient norm was far above what it usually is."""
    in_a_row: int = 0
    """Of both kinds, up to the newest step."""
    counted: int = 0
    """Norms in the statistics."""
    log_norm_mean: float = 0.0
    log_norm_variance: float = 0.0
    overflows: int = 0
    """Updates left out because the scaled gradient was too large for float16; none of `nonfinite`, nor in a row."""
    loss_scale: float = FIRST_LOSS_SCALE
    """What the loss is multiplied by before its backward pass, where products are in float16."""
    scaled_steps: int = 0
    """Made since the scale last changed."""


@dataclass(frozen=True)
class TrainState:
    """How far a run has come. With weights, optimizer and random state, all that survives a restart."""

    step: int
    """Completed optimizer updates."""
    tokens_seen: int
    data: DataPosition
    early_stop: EarlyStop | None = None
    """None: early stopping is off."""
    skips: SkipStats | None = None
    """Updates left out, and what the gradient norm usually is. None: nothing yet."""
    sample_digest: SampleDigest | None = None
    """Of every sample trained on. None: nothing yet, or a checkpoint from before there were receipts."""


def read_state(folder: Path) -> TrainState:
    """Read the training state of a checkpoint. What an earlier version did not save has its default.

    Raises:
        UserError: it was written by a later version, or is invalid.
    """
    file, errors = folder / "state.json", list[str]()
    state = dataclass_from_json(TrainState, STATE.upgrade(read_json(file), file), errors)
    if errors:
        raise UserError(f"cannot use {file}: {'; '.join(errors)}; it may be from a later version of MyLLM")
    return state
