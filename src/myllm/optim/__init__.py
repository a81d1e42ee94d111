"""AdamW and its learning-rate schedule. Takes named parameters; knows no model."""

from .adamw import ScheduledAdamW
from .schedule import learning_rate

__all__ = ["ScheduledAdamW", "learning_rate"]
