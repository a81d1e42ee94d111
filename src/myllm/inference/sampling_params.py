"""The settings of a draw. Without torch, so that a command line can be read and refused at once."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from myllm.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How freely to write."""

    temperature: float = 0.8
    """0 takes the likeliest token; 1 is the model's own distribution."""
    top_k: int = 50
    """Draw among this many likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens that hold this much probability; 1: all."""
    min_p: float = 0.0
    """Draw among tokens at least this fraction as likely as the likeliest; 0: all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt and of the text so far less likely."""
    seed: int = 0
    """Of the first sample; the next ones count up."""

    def faults(self) -> Iterator[str]:
        """Every setting out of range: what it is and what it may be."""
        if not 0 <= self.temperature < math.inf:
            yield f"temperature {self.temperature}: give a number of at least 0 (0 takes the likeliest token)"
        if self.top_k < 0:
            yield f"top_k {self.top_k}: give a whole number of at least 0 (0 for all tokens)"
        if not 0 < self.top_p <= 1:
            yield f"top_p {self.top_p}: give a number above 0 and at most 1 (1 for all tokens)"
        if not 0 <= self.min_p <= 1:
            yield f"min_p {self.min_p}: give a number from 0 to 1 (0 for all tokens)"
        if not 0 < self.repetition_penalty < math.inf:
            yield f"repetition_penalty {self.repetition_penalty}: give a number above 0 (1 for none)"
        if not 0 <= self.seed < 2**63:
            yield f"seed {self.seed}: give a whole number of at least 0 and below 2**63"

    def check(self) -> None:
        """
        Raises:
            UserError: names every setting out of range.
        """
        if faults := list(self.faults()):
            raise UserError("cannot sample so:\n" + "\n".join(f"  - {fault}" for fault in faults))
