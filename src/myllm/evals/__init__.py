"""What a model can do. Evaluations take a callable model and know nothing of the loop, the ranks' group or the files.

Each is sharded by `rank` and `world_size` and returns sums over its share, which add up over ranks to the same result
for any number of them; `finish` turns the sums into figures.
"""

from collections.abc import Callable

from torch import Tensor

Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Tokens and targets, (B, T) each, to log-probabilities and hits, (B, T) each; a target of -1 is not asked."""
