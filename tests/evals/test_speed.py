"""Inference speed: what is timed, by a clock that ticks once a token."""

from itertools import count

import pytest

from myllm.config import ModelConfig
from myllm.evals import speed
from myllm.inference.int8 import weight_bytes
from myllm.model.transformer import Transformer


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(ModelConfig(64, 64, 20, 16, 1, 2, d_ff=16)).eval()


def test_token_counts_fit_context() -> None:
    assert speed.token_counts(2_048) == (128, 64)
    assert speed.token_counts(100) == (50, 50)
    assert speed.token_counts(1) == (1, 2)


def test_measure_clock_readings(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading before, one when the batch has its first tokens, one at the end: here 1 s apart."""
    ticks = count()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(ticks)))
    metrics = speed.measure(model, batches=(1, 3), repeats=2)
    assert next(ticks) == 2 * 3 * 3  # two batches, a warm-up and two rounds, three readings
    assert metrics["first_token_s"] == 1
    assert (metrics["prefill_tokens_per_s_1"], metrics["prefill_tokens_per_s_3"]) == (10, 30)
    assert (metrics["decode_tokens_per_s_1"], metrics["decode_tokens_per_s_3"]) == (9, 27)
    assert metrics["weights_mb"] == weight_bytes(model) / 1e6
    assert metrics["peak_memory_mb"] > 50  # of a process with torch


def test_measured_times_positive(model: Transformer) -> None:
    assert all(value > 0 for value in speed.measure(model, repeats=1).values())
