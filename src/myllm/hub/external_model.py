"""What an import finds, whatever it was read from."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from myllm.config import ModelConfig


@dataclass(frozen=True)
class ExternalModel:
    """A model made elsewhere, in our terms."""

    config: ModelConfig
    weights: dict[str, Tensor]
    """By our names, as they were stored."""
    tokenizer_file: Path | None
    """None for the vocabulary that ships with the code."""
    notes: tuple[str, ...] = ()
    """What a user may not expect."""
