"""Which updates were left out, and what the gradient norm usually is: the part of TrainState that guard.py keeps."""

from dataclasses import dataclass

FIRST_LOSS_SCALE = 2.0**16
"""As torch.amp.GradScaler begins."""


@dataclass(frozen=True)
class Skips:
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
