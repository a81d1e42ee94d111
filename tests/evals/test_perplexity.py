"""Sliding-window figures against a loop in float64; calibration against a table made by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from myllm.config import ModelConfig
from myllm.errors import UserError
from myllm.evals.perplexity import BINS, expected_calibration_error, finish, perplexity_sums, window_batches, windows
from myllm.model.transformer import Transformer

CPU = torch.device("cpu")
END = 40
CONFIG = ModelConfig(vocab_size=41, vocab_multiple=16, max_seq_len=12, d_model=16, n_layers=2, n_heads=2, d_ff=24)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model, generator = Transformer(CONFIG).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return model


@settings(max_examples=200, deadline=None)
@given(n=st.integers(0, 60), context=st.integers(1, 20), data=st.data())
def test_windows_score_tokens_once_with_context(n, context, data):
    stride = data.draw(st.integers(1, context))
    scored = []
    for start, end, count in windows(n, context, stride):
        assert 0 <= start < end <= n
        assert end - start == min(context, n)
        assert 1 <= count <= end - start
        for token in range(end - count + 1, end + 1):  # token number k of the text is predicted from input k - 1
            scored.append(token)
            assert token - start > min(context - stride, token - 1)
    assert scored == list(range(1, n + 1))


@pytest.mark.parametrize("stride", [0, 13, -1])
def test_invalid_stride_raises(stride):
    with pytest.raises(UserError, match=f"the stride is {stride}, but must be at least 1 and at most"):
        windows(100, 12, stride)


@torch.no_grad()
def naive(model: Transformer, text: np.ndarray, context: int, stride: int) -> list[tuple[float, int, float]]:
    """Each token's log-probability, its place and the greatest probability, one window at a time in float64."""
    full, scored = [END, *text.tolist()], []
    while len(scored) < len(text):
        end = min(context if not scored else len(scored) + stride, len(text))
        start = max(end - context, 0)
        logits = model(torch.tensor([full[start:end]]))[0].double().numpy()  # (T, V)
        for token in range(len(scored) + 1, end + 1):
            row = logits[token - 1 - start]
            odds = np.exp(row - row.max())
            odds /= odds.sum()
            own = odds[full[token]]
            scored.append((math.log(own), int((odds > own).sum()), odds.max()))
    return scored


@pytest.mark.parametrize(("n", "stride"), [(100, 6), (100, 12), (57, 1), (7, 4), (12, 5), (13, 12)])
def test_metrics_match_naive_loop(n, stride, model):
    text = np.random.default_rng(n).integers(40, size=n).astype(np.uint16)
    token_bytes = torch.arange(41)
    expected = naive(model, text, 12, stride)

    def sums(batch: int, ranks: int) -> torch.Tensor:
        return sum(
            perplexity_sums(model.evaluate, window_batches(text, END, 12, stride, batch, rank, ranks), token_bytes, CPU)
            for rank in range(ranks)
        )

    for batch, ranks in ((1, 1), (5, 1), (3, 2)):
        metrics = finish(sums(batch, ranks), text_bytes=3 * n)
        loss = -sum(token[0] for token in expected)
        assert metrics["loss"] == pytest.approx(loss / n, abs=1e-5)
        assert metrics["perplexity"] == pytest.approx(math.exp(loss / n), rel=1e-5)
        assert metrics["bits_per_byte"] == pytest.approx(loss / math.log(2) / (3 * n), rel=1e-5)
        assert metrics["token_accuracy"] == sum(token_rank == 0 for _, token_rank, _ in expected) / n
        assert metrics["top5_accuracy"] == sum(token_rank < 5 for _, token_rank, _ in expected) / n
        assert metrics["n_tokens"] == n
        assert metrics["calibration_error"] == pytest.approx(naive_error(expected), abs=1e-5)
    assert finish(sums(1, 1))["bits_per_byte"] == pytest.approx(loss / math.log(2) / text.sum(), rel=1e-5)


def naive_error(scored: list[tuple[float, int, float]]) -> float:
    error = 0.0
    for b in range(BINS):
        inside = [
            (token_rank == 0, confidence)
            for _, token_rank, confidence in scored
            if b / BINS <= confidence < (b + 1) / BINS
        ]
        if inside:
            error += abs(sum(hit for hit, _ in inside) - sum(confidence for _, confidence in inside)) / len(scored)
    return error


def test_smaller_strides_give_more_context(model):
    """The first window is the same for any stride; later tokens see others."""
    text = np.random.default_rng(0).integers(40, size=60).astype(np.uint16)
    narrow, wide = naive(model, text, 12, 12), naive(model, text, 12, 1)
    assert narrow[:12] == wide[:12]
    assert narrow[12:] != wide[12:]


def test_calibration_error():
    table = torch.zeros(BINS, 3, dtype=torch.float64)
    table[2] = torch.tensor([10, 3, 1.5])  # right in 30 %, says 15 %
    table[7] = torch.tensor([20, 10, 10.0])  # as it says
    table[14] = torch.tensor([70, 35, 68.0])  # right in 50 %, says 97 %
    assert expected_calibration_error(table) == pytest.approx(0.1 * 0.15 + 0.2 * 0 + 0.7 * abs(0.5 - 68 / 70))


def test_confidence_bins():
    confidence = [0.0, 0.0667, 0.5, 0.999, 1.0]
    token_ranks = [3, 0, 0, 7, 0]

    def fixed(tokens, targets):
        return torch.zeros(targets.shape), torch.tensor([token_ranks]), torch.tensor([confidence])

    batch = (torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long))
    sums = perplexity_sums(fixed, [batch], torch.ones(1), CPU)
    table = sums[5:].view(BINS, 3)
    assert table[:, 0].nonzero().flatten().tolist() == [0, 1, 7, 14]
    assert table[14].tolist() == pytest.approx([2, 1, 1.999])
    assert sums[:5].tolist() == [0, 5, 5, 3, 4]
