"""Read a checkpoint into a model and an optimizer, which may be sharded: each rank reads its own part."""

from pathlib import Path

from torch import nn

from myllm.optim.optimizer import ScheduledOptimizer

from .dcp import flatten_moments, read_into, strip_wrapper_prefixes
from .layout import OPTIMIZER, WEIGHTS


def read_weights(folder: Path, model: nn.Module) -> None:
    """
    Raises:
        UserError: the checkpoint is of another model.
    """
    read_into(folder / WEIGHTS, strip_wrapper_prefixes(model.state_dict().items()))


def read_moments(folder: Path, optimizer: ScheduledOptimizer) -> None:
    """
    Raises:
        UserError: the checkpoint is of another model or optimizer.
    """
    blank = optimizer.zero_state()
    read_into(folder / OPTIMIZER, strip_wrapper_prefixes(flatten_moments(blank).items()))
    optimizer.load_state_dict(blank)
