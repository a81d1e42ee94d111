"""A hash of all samples that a run has trained on, in order, from its first step on.

Each sequence adds the hash of its index in the run (0, 1, 2, ... over all steps and ranks), its number in the training
stream, and its tokens. A sum does not depend on the order of its terms, so the digest is the same on any number of
ranks, one all-reduce completes it, and a resumed run continues from the checkpoint's digest. A sample that was skipped,
repeated, changed or moved changes it, even within a step.

It detects faults, not forgery. docs/data_format.md has a program that computes it without this module.

Source of the idea: Bellare and Micciancio 1997, "A New Paradigm for Collision-Free Hashing", the additive hash AdHASH.
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

LANES = 4
"""Sums of 32 bits each, kept in 64 bits: no overflow for 2^31 samples between two digests."""


@dataclass(frozen=True)
class SampleDigest:
    """Digest of the samples since one of a run's steps."""

    digest: str = "0" * (8 * LANES)
    """Hexadecimal."""
    since_step: int = 0
    """0, unless the run was resumed from a checkpoint without a digest."""

    def add(self, sums: np.ndarray) -> "SampleDigest":
        """The digest after more samples, with the sums of their hashes over all ranks: (LANES,) int64."""
        total = (np.frombuffer(bytes.fromhex(self.digest), dtype="<u4").astype(np.int64) + sums) % (1 << 32)
        return SampleDigest(total.astype("<u4").tobytes().hex(), self.since_step)


def hash_samples(indices: np.ndarray, sequences: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The sum of the hashes of some samples.

    Shapes:
        indices (B,) int64, sequences (B,) int64, rows (B, T + 1) uint16 or uint32; returns (LANES,) int64
    """
    sums = np.zeros(LANES, dtype=np.int64)
    for index, sequence, row in zip(indices, sequences, rows, strict=True):
        digest = blake2b(np.array((index, sequence), dtype="<i8").tobytes(), digest_size=4 * LANES)
        digest.update(row.astype(f"<u{row.itemsize}", copy=False).tobytes())
        sums += np.frombuffer(digest.digest(), dtype="<u4")
    return sums
