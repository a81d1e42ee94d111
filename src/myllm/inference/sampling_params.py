"""Sampling parameters. Without torch, so that a command line is parsed and checked at once."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from myllm.errors import UserError, bullets


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen."""

    temperature: float = 0.8
    """0 is greedy; 1 is the model's own distribution."""
    top_k: int = 50
    """Sample from the K most likely tokens (0: all)."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens with a total probability of at least P (1: all)."""
    min_p: float = 0.0
    """Sample from tokens at least P times as likely as the most likely one (0: all)."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the text so far become less likely."""
    seed: int = 0
    """Of the first sample; each further sample adds 1."""

    @property
    def penalizes_repetition(self) -> bool:
        return self.repetition_penalty != 1

    def errors(self) -> Iterator[str]:
        """One message for each parameter out of range."""
        if not 0 <= self.temperature < math.inf:
            yield f"temperature {self.temperature}: give a number of at least 0 (0 is greedy)"
        if self.top_k < 0:
            yield f"top_k {self.top_k}: give an integer of at least 0 (0 for all tokens)"
        if not 0 < self.top_p <= 1:
            yield f"top_p {self.top_p}: give a number above 0 and at most 1 (1 for all tokens)"
        if not 0 <= self.min_p <= 1:
            yield f"min_p {self.min_p}: give a number from 0 to 1 (0 for all tokens)"
        if not 0 < self.repetition_penalty < math.inf:
            yield f"repetition_penalty {self.repetition_penalty}: give a number above 0 (1 for no penalty)"
        if not 0 <= self.seed < 2**63:
            yield f"seed {self.seed}: give an integer of at least 0 and below 2**63"

    def check(self) -> None:
        """
        Raises:
            UserError: names every parameter out of range.
        """
        if errors := list(self.errors()):
            raise UserError(f"invalid sampling parameters:\n{bullets(errors)}")
