"""How the next token is chosen: filters of logits, and the draw. Pure functions.

The filters are applied in this order, which is also that of transformers: repetition penalty, temperature, top-k,
top-p, min-p. A token that is out has a logit of minus infinity.

Shapes: B rows, V vocabulary, N tokens so far.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .sampling_params import SamplingParams

NEG_INF = float("-inf")
TOP_P_FIRST_TRY = 1_024
"""Tokens among which top-p looks first."""


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
    """One token id a row.

    Each row has a random generator of its own on the CPU, and takes one number from it for each token: what it draws
    depends neither on its neighbours nor on the device, up to rounding.

    Args:
        seen: each row's tokens so far; only the repetition penalty looks at them.

    Shapes:
        logits (B, V)
    """
    if sampling.repetition_penalty != 1:
        logits = torch.stack(
            [
                penalize_repetition(row, torch.tensor(tokens, device=row.device), sampling.repetition_penalty)
                for row, tokens in zip(logits, seen, strict=True)
            ]
        )
    if sampling.temperature == 0:
        # On a CPU NumPy's is more than ten times as fast as PyTorch's.
        return (logits.float().numpy() if logits.device.type == "cpu" else logits).argmax(-1).tolist()
    candidates, ids = top_k_candidates(logits.cpu() if logits.device.type == "mps" else logits, sampling.top_k)
    # In float64: a tiny temperature stays a number, and the sum of a whole vocabulary is exact enough to draw from.
    filtered = filter_logits(candidates.double(), sampling)
    drawn = torch.stack([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
    return ids.gather(1, draw(filtered, drawn.to(ids.device)).unsqueeze(1)).squeeze(1).tolist()


def top_k_candidates(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens and their ids, rising; of 0, or more than there are, all. What follows costs k, not V.

    Rising ids, since near equals may change places with the rounding, and a draw must not.

    Shapes:
        logits (B, V); returns (B, k) each
    """
    if not 0 < top_k < logits.shape[-1]:
        return logits, torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    ids = logits.topk(top_k, sorted=False).indices.sort(dim=-1).values
    return logits.gather(-1, ids), ids


def filter_logits(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Temperature, top-k, top-p and min-p, one after the other.

    Shapes:
        logits (B, V); returns (B, V)
    """
    logits = apply_temperature(logits, sampling.temperature)
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide the positive logits of tokens already seen by the penalty, and multiply the negative ones.

    Source: Keskar et al. 2019 (CTRL, arXiv 1909.05858), section 4.1, made to lower negative logits too.

    Shapes:
        logits (V,); seen (N,); returns (V,)
    """
    old = logits[seen]  # (N,)
    return logits.scatter(0, seen, torch.where(old > 0, old / penalty, old * penalty))


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits over the temperature, the largest at 0: so that none is infinite, however small the temperature.

    Shapes:
        logits (B, V); returns (B, V)
    """
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """The k likeliest tokens; of equals, no more than k.

    Source: Fan et al. 2018 (arXiv 1805.04833), section 5.4.

    Shapes:
        logits (B, V); returns (B, V)
    """
    values, ids = logits.topk(min(top_k, logits.shape[-1]))  # (B, k)
    return torch.full_like(logits, NEG_INF).scatter(-1, ids, values)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest tokens whose probabilities sum to top_p or more: the nucleus.

    Source: Holtzman et al. 2019 (arXiv 1904.09751), section 3.1.

    Shapes:
        logits (B, V); returns (B, V)
    """
    total = logits.logsumexp(dim=-1, keepdim=True)
    # Sorting a whole vocabulary costs more than a small model's step, and a trained model's nucleus is mostly small.
    for count in (min(TOP_P_FIRST_TRY, logits.shape[-1]), logits.shape[-1]):
        ordered, ids = logits.topk(count)  # (B, count)
        probabilities = (ordered - total).exp()
        cumulated = probabilities.cumsum(dim=-1)
        if (cumulated[:, -1] >= top_p).all():
            break
    # A token stays while those before it have not reached top_p: the likeliest always does.
    reached = cumulated - probabilities >= top_p
    return torch.full_like(logits, NEG_INF).scatter(-1, ids, ordered.masked_fill(reached, NEG_INF))


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Tokens at least min_p times as likely as the likeliest.

    Source: Nguyen et al. 2024 (arXiv 2407.01082), section 3.

    Shapes:
        logits (B, V); returns (B, V)
    """
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < min_p * probabilities.amax(dim=-1, keepdim=True), NEG_INF)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulated probability passes each row's number in [0, 1).

    Shapes:
        logits (B, V); uniform (B, 1); returns (B,)
    """
    cumulated = logits.softmax(dim=-1).cumsum(dim=-1)  # (B, V)
    # Of the rounded sum, not of 1; a token without probability adds nothing, so it is never where the sum passes.
    drawn = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True).squeeze(1)
    last = (logits > NEG_INF).cumsum(dim=-1).argmax(dim=-1)  # (B,), the last token that is in
    return torch.minimum(drawn, last)


def token_logprobs(logits: Tensor, chosen: Sequence[int], count: int) -> list[TokenLogprobs]:
    """The log-probability of each row's chosen token, and its `count` most likely tokens.

    Shapes:
        logits (B, V)
    """
    logprobs = (logits.cpu() if logits.device.type == "mps" else logits).double().log_softmax(dim=-1)  # (B, V)
    own = logprobs.gather(1, torch.tensor(chosen, device=logprobs.device).unsqueeze(1))  # (B, 1)
    ranks = (logprobs > own).sum(dim=-1) + 1  # (B,)
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]))  # (B, count)
    rows = zip(own[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprobs(logprob, rank, list(zip(top, top_values, strict=True))) for logprob, rank, top, top_values in rows
    ]
