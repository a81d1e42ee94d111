"""Receipts: a number that says which samples a run has trained on, and when, from its first step on.

Every sequence that the loader hands over adds the hash of its place in the run (0, 1, 2, ... over all steps and ranks),
its number in the training stream and its tokens. A sum does not ask in which order or on which rank its parts were
added: so it is the same on any number of ranks, one addition over ranks completes it when it is wanted, and a run that
goes on from a checkpoint goes on from the checkpoint's receipt. A sample that was skipped, doubled, changed, or swapped
with one of another step changes it, as does one that only took another place within its step.

It guards against faults, not against forgers. docs/data_format.md says how to compute it without this module.

Source of the idea: Bellare and Micciancio 1997, "A New Paradigm for Collision-Free Hashing", the additive hash AdHASH.
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

LANES = 4
"""Sums of 32 bits each. Kept in 64, so that no order of adding overflows: 2^31 samples a lane between two receipts."""


@dataclass(frozen=True)
class SampleDigest:
    """What a run has trained on, since one of its steps."""

    digest: str = "0" * (8 * LANES)
    """Hexadecimal."""
    since_step: int = 0
    """0, unless the run goes on from a checkpoint that had no receipt."""

    def add(self, sums: np.ndarray) -> "SampleDigest":
        """The receipt after samples whose hashes add up to `sums`, those of all ranks together.

        Shapes:
            sums (LANES,) int64
        """
        total = (np.frombuffer(bytes.fromhex(self.digest), dtype="<u4").astype(np.int64) + sums) % (1 << 32)
        return SampleDigest(total.astype("<u4").tobytes().hex(), self.since_step)


def hash_samples(places: np.ndarray, sequences: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The hashes of some samples, added up.

    Shapes:
        places (B,) int64, sequences (B,) int64, rows (B, T + 1) uint16; returns (LANES,) int64
    """
    sums = np.zeros(LANES, dtype=np.int64)
    for place, sequence, row in zip(places, sequences, rows, strict=True):
        digest = blake2b(np.array((place, sequence), dtype="<i8").tobytes(), digest_size=4 * LANES)
        digest.update(row.astype("<u2", copy=False).tobytes())
        sums += np.frombuffer(digest.digest(), dtype="<u4")
    return sums
