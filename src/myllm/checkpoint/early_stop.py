"""Early stopping: the validations without a new lowest loss."""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class EarlyStop:
    """The validations since early stopping was switched on.

    As in Keras and Lightning, a validation is better if its loss is lower than all before, by however little. A loss
    that is not finite is not better. Failed validations and the one before the first step do not count.
    """

    best_loss: float | None = None
    best_step: int | None = None
    """None: no finite validation yet."""
    since_best: int = 0
    """Validations after the best one."""
    last_step: int = 0
    """Step of the newest validation."""

    def after(self, step: int, loss: float) -> "EarlyStop":
        """Count one more validation. One that is repeated after a restart changes nothing."""
        if step <= self.last_step:
            return self
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            return EarlyStop(loss, step, 0, step)
        return replace(self, since_best=self.since_best + 1, last_step=step)

    def exhausted(self, patience: int | None) -> bool:
        return patience is not None and self.since_best >= patience

    def __str__(self) -> str:
        if self.best_loss is None:
            return f"no validation loss was finite, {self.since_best} in a row"
        return (
            f"the lowest validation loss is {self.best_loss:.4f}, at step {self.best_step:,}, with {self.since_best} "
            f"validation{'s' * (self.since_best != 1)} since"
        )
