"""What a model can do. Evaluations take a callable model and know nothing of the loop, the ranks' group or the files;
`hellaswag_data` alone reads one, before any is measured.

Each is sharded by `rank` and `world_size` and returns sums over its share, which add up over ranks to the same result
for any number of them; `finish` turns the sums into figures.
"""

from collections.abc import Callable

from torch import Tensor

Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Tokens and targets, (B, T) each, to log-probabilities and hits, (B, T) each; a target of -1 is not asked."""
ScoreContinuations = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Prefixes (B, P), the prefix of each row (M,), tokens and targets (M, T), to what `Score` gives, (M, T) each."""
Assess = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Tokens and targets, (B, T) each, to log-probabilities, how many tokens were likelier than the target, and the
probability of the likeliest, (B, T) each."""
