"""TrainState: everything but tensors that a restart needs. Stored in state.json."""

from dataclasses import dataclass
from pathlib import Path

from myllm.data.sample_digest import SampleDigest
from myllm.data.sampler import DataPosition
from myllm.errors import UserError
from myllm.files import read_json
from myllm.migrations import STATE, dataclass_from_json

from .early_stop import EarlyStop
from .layout import STATE_FILE

NO_DATASET = ""
"""Data set hash of imported weights, which no data set has trained."""
FIRST_LOSS_SCALE = 2.0**16
"""As in torch.amp.GradScaler."""


@dataclass(frozen=True)
class SkipStats:
    """Skipped updates since the first step, and running statistics (in float32) of the logarithm of gradient norms."""

    nonfinite: int = 0
    """Updates skipped because the loss or the gradient was not finite."""
    spikes: int = 0
    """Updates skipped because the gradient norm was a spike."""
    consecutive: int = 0
    """Skipped updates of both kinds in a row, up to the newest step."""
    norm_count: int = 0
    """Norms in the statistics."""
    log_norm_mean: float = 0.0
    log_norm_variance: float = 0.0
    overflows: int = 0
    """Updates skipped because the scaled gradient overflowed float16. Not in `nonfinite` or `consecutive`."""
    loss_scale: float = FIRST_LOSS_SCALE
    """Factor of the loss before the backward pass in float16."""
    steps_at_scale: int = 0
    """Steps since the scale last changed."""


@dataclass(frozen=True)
class TrainState:
    """How far a run has come."""

    step: int
    """Completed optimizer steps."""
    tokens_seen: int
    data: DataPosition
    early_stop: EarlyStop | None = None
    """None: early stopping is off."""
    skips: SkipStats | None = None
    """None: no step yet."""
    sample_digest: SampleDigest | None = None
    """Hash of all samples trained on. None: no step yet, or a checkpoint of a version without digests."""


def read_state(folder: Path) -> TrainState:
    """Read the training state of a checkpoint. What an earlier version did not save has its default.

    Raises:
        UserError: it was written by a later version, or is invalid.
    """
    file, errors = folder / STATE_FILE, list[str]()
    state = dataclass_from_json(TrainState, STATE.upgrade(read_json(file), file), errors)
    if errors:
        raise UserError(f"cannot use {file}: {'; '.join(errors)}; it may be from a later version of MyLLM")
    return state
