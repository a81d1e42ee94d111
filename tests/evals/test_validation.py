"""Validation's sums against a direct float64 computation, for any number of ranks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from myllm.data.tokenizer.load import load_tokenizer
from myllm.evals.perplexity import finish, perplexity_sums
from myllm.evals.validation import validation_batches

VOCAB = 40
CPU = torch.device("cpu")
Assessed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Stream:
    """Tokens in memory, read as a TokenStream is."""

    def __init__(self, tokens) -> None:
        self._tokens = np.asarray(tokens, dtype=np.uint16)
        self.tokens = len(self._tokens)

    def verify(self, starts: np.ndarray, count: int) -> None:
        """Memory needs none."""

    def read(self, start: int, count: int) -> np.ndarray:
        assert 0 <= start <= start + count <= self.tokens
        return self._tokens[start : start + count]


def toy_evaluate(tokens: torch.Tensor, targets: torch.Tensor) -> Assessed:
    """Some function of both, different for every pair."""
    log_probs = -(1 + torch.sin(tokens * 7.0 + targets) ** 2 + targets / 10).float()
    return log_probs, (tokens + targets) % 9, torch.cos(tokens * 3.0 + targets) ** 2


def sums(stream: Stream, n_sequences: int, batch_size: int, ranks: int, token_bytes: torch.Tensor) -> torch.Tensor:
    shares = [
        perplexity_sums(
            toy_evaluate, validation_batches(stream, n_sequences, 8, batch_size, rank, ranks), token_bytes, CPU
        )
        for rank in range(ranks)
    ]
    assert all(share.dtype == torch.float64 for share in shares)
    return sum(shares)


@settings(max_examples=40, deadline=None)
@given(n_sequences=st.integers(1, 12), batch_size=st.integers(1, 5), ranks=st.integers(1, 4), seed=st.integers(0, 99))
def test_sums_match_float64(n_sequences, batch_size, ranks, seed):
    generator = np.random.default_rng(seed)
    text, token_bytes = generator.integers(VOCAB, size=100), generator.integers(0, 9, size=VOCAB)
    actual = sums(Stream(text), n_sequences, batch_size, ranks, torch.from_numpy(token_bytes))
    last = n_sequences * 8
    tokens, targets = torch.from_numpy(text[:last]), torch.from_numpy(text[1 : last + 1])
    log_probs, token_ranks, _ = toy_evaluate(tokens, targets)
    correct = [(token_ranks == 0).sum(), (token_ranks < 5).sum()]
    expected = [-log_probs.double().sum(), last, token_bytes[text[1 : last + 1]].sum(), *correct]
    torch.testing.assert_close(actual[:5], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_sums_independent_of_world_size():
    stream, token_bytes = Stream(np.random.default_rng(0).integers(VOCAB, size=500)), torch.arange(VOCAB)
    one = sums(stream, 31, 4, 1, token_bytes)
    for ranks in (2, 3, 40):  # of 40 some have no sequence at all
        torch.testing.assert_close(sums(stream, 31, 4, ranks, token_bytes), one, rtol=1e-13, atol=0)


def sums_of(loss: float, tokens: int, n_bytes: int, correct: int, in_top_k: int) -> torch.Tensor:
    """All tokens in one bin of confidence, 0.3 each."""
    table = torch.zeros(15, 3, dtype=torch.float64)
    table[4] = torch.tensor([tokens, correct, tokens * 0.3])
    return torch.cat((torch.tensor([loss, tokens, n_bytes, correct, in_top_k], dtype=torch.float64), table.flatten()))


def test_metrics():
    metrics = finish(sums_of(200 * math.log(2), 100, 50, 25, 40))
    assert metrics == {
        "loss": pytest.approx(2 * math.log(2)),
        "perplexity": pytest.approx(4),
        "bits_per_byte": pytest.approx(4),
        "token_accuracy": 0.25,
        "top5_accuracy": 0.4,
        "calibration_error": pytest.approx(0.05),
        "n_tokens": 100,
    }


def test_metrics_edge_cases():
    assert finish(sums_of(1e6, 10, 1, 0, 0))["perplexity"] == math.inf
    assert math.isnan(finish(sums_of(1, 10, 0, 0, 0))["bits_per_byte"])


def test_bits_per_byte_of_known_text():
    """A model that needs 3 bits a token: 3 bits x tokens over the text's UTF-8 bytes."""
    text = "Größe matters: 漢字 take three bytes each, 🙂 takes four, and naïve has two for one."
    tokenizer = load_tokenizer()
    ids = tokenizer.encode(text)
    stream = Stream([tokenizer.end_of_text, *ids])

    def three_bits(tokens, targets):
        return torch.full(targets.shape, -3 * math.log(2)), torch.ones_like(targets), torch.zeros(targets.shape)

    token_bytes = torch.from_numpy(tokenizer.token_bytes())
    actual = perplexity_sums(three_bits, validation_batches(stream, 1, len(ids), 1), token_bytes, CPU)
    assert actual[2] == len(text.encode()) > len(text)
    assert finish(actual)["bits_per_byte"] == pytest.approx(3 * len(ids) / len(text.encode()), rel=1e-6)


def test_end_of_text_counts_zero_bytes():
    tokenizer = load_tokenizer()
    stream = Stream([*tokenizer.encode_document("one two"), *tokenizer.encode_document("three")])
    token_bytes = torch.from_numpy(tokenizer.token_bytes())

    def certain(tokens, targets):
        return torch.zeros(targets.shape), torch.zeros_like(targets), torch.ones(targets.shape)

    n = stream.tokens - 1
    actual = perplexity_sums(certain, validation_batches(stream, 1, n, 1), token_bytes, CPU)
    assert actual[:5].tolist() == [0, n, len("one two") + len("three"), n, n]
