"""Filters are those of transformers; the draw is the inverse of the cumulated distribution."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from myllm.errors import UserError
from myllm.inference.sampling import (
    TOP_P_FIRST_TRY,
    draw,
    filter_logits,
    keep_min_p,
    keep_top_p,
    penalize_repetition,
    top_k_candidates,
)
from myllm.inference.sampling_params import SamplingParams

LOGITS = 3 * torch.randn(8, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
SEEN = torch.randint(40, (8, 6), generator=torch.Generator().manual_seed(3))


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """The same distribution: logits may differ by a constant."""
    assert torch.equal(ours == float("-inf"), theirs == float("-inf"))
    return torch.allclose(ours.softmax(dim=-1), theirs.softmax(dim=-1), rtol=0, atol=1e-12)


def scattered(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.full_like(LOGITS, float("-inf")).scatter(1, ids, logits)


@pytest.mark.parametrize("k", [1, 3, 40, 99])
def test_top_k(k):
    assert same(scattered(*top_k_candidates(LOGITS, k)), TopKLogitsWarper(k)(SEEN, LOGITS))


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p(p):
    assert same(keep_top_p(LOGITS, p), TopPLogitsWarper(p)(SEEN, LOGITS))


@pytest.mark.parametrize("spread", [0.1, 5.0], ids=["wide", "narrow"])
def test_top_p_with_large_vocabulary(spread):
    """Wider than what is looked at first, and not."""
    logits = spread * torch.randn(
        3, 3 * TOP_P_FIRST_TRY, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    ours = keep_top_p(logits, 0.9)
    assert ((ours > float("-inf")).sum(dim=-1) > TOP_P_FIRST_TRY).all() == (spread < 1)
    assert same(ours, TopPLogitsWarper(0.9)(SEEN, logits))


def test_candidates_are_sorted_by_id():
    logits, ids = top_k_candidates(LOGITS, 5)
    assert torch.equal(ids, LOGITS.topk(5).indices.sort().values)
    assert torch.equal(logits, LOGITS.gather(1, ids))
    for k in (0, 40, 99):
        logits, ids = top_k_candidates(LOGITS, k)
        assert torch.equal(logits, LOGITS)
        assert torch.equal(ids, torch.arange(40).expand(8, 40))


@pytest.mark.parametrize("p", [0.01, 0.2, 1.0])
def test_min_p(p):
    assert same(keep_min_p(LOGITS, p), MinPLogitsWarper(p)(SEEN, LOGITS))


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty(penalty):
    ours = torch.stack([penalize_repetition(row, seen, penalty) for row, seen in zip(LOGITS, SEEN, strict=True)])
    assert torch.allclose(ours, RepetitionPenaltyLogitsProcessor(penalty)(SEEN, LOGITS))
    assert not torch.allclose(ours, LOGITS)


def test_all_filters_in_order():
    theirs = LOGITS
    for warper in (TemperatureLogitsWarper(1.7), TopKLogitsWarper(20), TopPLogitsWarper(0.8), MinPLogitsWarper(0.1)):
        theirs = warper(SEEN, theirs)
    candidates, ids = top_k_candidates(LOGITS, 20)
    assert same(scattered(filter_logits(candidates, SamplingParams(1.7, 20, 0.8, 0.1)), ids), theirs)


def test_draw_edge_cases():
    out = float("-inf")
    logits = torch.tensor([[out, 0.0, out, 0.0, out]], dtype=torch.float64)
    for uniform, expected in ((0.0, 1), (0.4999, 1), (0.5, 3), (1 - 2**-53, 3)):
        assert draw(logits, torch.tensor([[uniform]], dtype=torch.float64)).item() == expected


def test_all_invalid_parameters_are_reported():
    wrong = SamplingParams(float("nan"), -1, 0.0, 2.0, 0.0, -5)
    with pytest.raises(UserError) as caught:
        wrong.check()
    for name in ("temperature nan", "top_k -1", "top_p 0.0", "min_p 2.0", "repetition_penalty 0.0", "seed -5"):
        assert name in str(caught.value)
    assert [error[:9] for error in SamplingParams(top_p=1.1).errors()] == ["top_p 1.1"]
    SamplingParams(0.0, 0, 1.0, 0.0, 1.0, 0).check()
