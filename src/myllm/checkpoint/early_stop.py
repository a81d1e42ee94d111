"""Early stopping: which validation was the best, and how many have come since.

A validation is better if its loss is lower than every one before, by however little, as in Keras and Lightning. One
that is not finite is not better; one that failed does not count. The one before the first step does not count either.
"""

import math
from dataclasses import dataclass, replace


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
