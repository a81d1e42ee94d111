"""Choose the next token: filters of logits, and the draw. Pure functions.

Filters are applied in the order of transformers: repetition penalty, temperature, top-k, top-p, min-p. The logit of an
excluded token is minus infinity.

Shapes: B sequences, V vocabulary, N tokens so far.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .sampling_params import SamplingParams

NEG_INF = float("-inf")
TOP_P_FIRST_TRY = 1_024
"""top-p sorts this many tokens first, and all tokens only if these do not suffice."""


class TokenLogprobs(NamedTuple):
    """How likely the model found a token, and the most likely tokens.

    In the model's own distribution: at temperature 1, before all filters and penalties, so the numbers do not depend on
    the sampling parameters.
    """

    logprob: float
    rank: int
    """1 for the most likely token."""
    top: list[tuple[int, float]]
    """Token ids and their log-probabilities, the most likely first."""


def choose(
    logits: Tensor, sampling: SamplingParams, generators: Sequence[torch.Generator], seen: Sequence[Sequence[int]]
) -> list[int]:
    """One token id for each sequence.

    Each sequence draws one number for each token from its own CPU generator, so its tokens depend neither on the other
    sequences nor, up to rounding, on the device.

    Args:
        seen: all tokens of each sequence so far; only used by the repetition penalty.

    Shapes:
        logits (B, V)
    """
    if sampling.penalizes_repetition:
        rows = [
            penalize_repetition(row, torch.tensor(tokens, device=row.device), sampling.repetition_penalty)
            for row, tokens in zip(logits, seen, strict=True)
        ]
        logits = torch.stack(rows)
    if sampling.temperature == 0:
        # On CPUs, NumPy's argmax is more than ten times as fast as torch's.
        return (logits.float().numpy() if logits.device.type == "cpu" else logits).argmax(-1).tolist()
    candidates, ids = top_k_candidates(_without_mps(logits), sampling.top_k)
    # float64: tiny temperatures stay above 0, and the cumulative sum over a vocabulary is exact enough.
    filtered = filter_logits(candidates.double(), sampling)
    uniform = torch.stack([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
    return ids.gather(1, draw(filtered, uniform.to(ids.device)).unsqueeze(1)).squeeze(1).tolist()


def _without_mps(logits: Tensor) -> Tensor:
    """MPS has no float64."""
    return logits.cpu() if logits.device.type == "mps" else logits


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of seen tokens by the penalty and multiply negative ones by it.

    Source: Keskar et al. 2019 (CTRL, arXiv 1909.05858), section 4.1, extended to negative logits.

    Shapes:
        logits (V,); seen (N,); returns (V,)
    """
    old = logits[seen]  # (N,)
    return logits.scatter(0, seen, torch.where(old > 0, old / penalty, old * penalty))


def top_k_candidates(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k most likely tokens (all, if k is 0 or exceeds V), so that later steps cost k instead of V.

    Sorted by id: rounding can swap nearly equal logits, which must not change the draw.

    Source: Fan et al. 2018 (arXiv 1805.04833), section 5.4.

    Shapes:
        logits (B, V); returns logits and ids, (B, k) each
    """
    if not 0 < top_k < logits.shape[-1]:
        return logits, torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    ids = logits.topk(top_k, sorted=False).indices.sort(dim=-1).values
    return logits.gather(-1, ids), ids


def filter_logits(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Apply temperature, top-p and min-p.

    Shapes:
        logits (B, k); returns (B, k)
    """
    # The largest logit becomes 0, so that no logit overflows at a tiny temperature.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Nucleus sampling: the fewest most likely tokens whose probabilities sum to at least top_p.

    Source: Holtzman et al. 2019 (arXiv 1904.09751), section 3.1.

    Shapes:
        logits (B, V); returns (B, V)
    """
    total = logits.logsumexp(dim=-1, keepdim=True)
    # Sorting a whole vocabulary costs more than a step of a small model, and most nuclei are small.
    for count in (min(TOP_P_FIRST_TRY, logits.shape[-1]), logits.shape[-1]):
        ordered, ids = logits.topk(count)  # (B, count)
        probabilities = (ordered - total).exp()
        cumulative = probabilities.cumsum(dim=-1)
        if (cumulative[:, -1] >= top_p).all():
            break
    # Keep a token if the tokens before it sum to less than top_p. The most likely token is always kept.
    excluded = cumulative - probabilities >= top_p
    return torch.full_like(logits, NEG_INF).scatter(-1, ids, ordered.masked_fill(excluded, NEG_INF))


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Tokens at least min_p times as likely as the most likely one.

    Source: Nguyen et al. 2024 (arXiv 2407.01082), section 3.

    Shapes:
        logits (B, V); returns (B, V)
    """
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < min_p * probabilities.amax(dim=-1, keepdim=True), NEG_INF)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Inverse transform sampling: the token where the cumulative probability passes a number in [0, 1).

    Shapes:
        logits (B, V); uniform (B, 1); returns (B,)
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)  # (B, V)
    # Scaled by the rounded sum, which may differ from 1. Excluded tokens add 0, so they are never drawn.
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)
    last = (logits > NEG_INF).cumsum(dim=-1).argmax(dim=-1)  # (B,), the last token that is not excluded
    return torch.minimum(drawn, last)


def token_logprobs(logits: Tensor, chosen: Sequence[int], count: int) -> list[TokenLogprobs]:
    """The log-probability of each sequence's chosen token, and its `count` most likely tokens.

    Shapes:
        logits (B, V)
    """
    logprobs = _without_mps(logits).double().log_softmax(dim=-1)  # (B, V)
    own = logprobs.gather(1, torch.tensor(chosen, device=logprobs.device).unsqueeze(1))  # (B, 1)
    ranks = (logprobs > own).sum(dim=-1) + 1  # (B,)
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]))  # (B, count)
    rows = zip(own[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), strict=True)
    return [TokenLogprobs(logprob, rank, list(zip(ids, values, strict=True))) for logprob, rank, ids, values in rows]
