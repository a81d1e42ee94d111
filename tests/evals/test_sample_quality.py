"""Figures of samples: by hand, against `myllm sample`'s texts, and against the model's own distribution."""

import math
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from myllm.config import ModelConfig
from myllm.data.tokenizer.load import load_tokenizer
from myllm.evals import sample_quality
from myllm.inference.completion import complete
from myllm.inference.generate import Sequence
from myllm.inference.load import LanguageModel
from myllm.model.transformer import Transformer

R50K = load_tokenizer()
END = R50K.end_of_text


@pytest.fixture(scope="module")
def pair() -> LanguageModel:
    config = ModelConfig(max_seq_len=48, d_model=16, n_layers=1, n_heads=2, d_ff=32, init="reference")
    return LanguageModel(Transformer(config).eval(), R50K)


def test_variety() -> None:
    samples = [[1, 2, 1, 2, 1, 2], [1, 3], [4, 5, 6, 7, 8]]
    metrics = sample_quality.variety(samples)
    assert metrics["distinct_1"] == 8 / 13
    # 12 21 12 21 12 | 13 | 45 56 67 78: seven different of ten, none across samples
    assert metrics["distinct_2"] == 7 / 10
    # 1212 2121 1212: one of three was there before; the short sample has no run of four; the last repeats nothing
    assert metrics["repetition"] == pytest.approx((1 / 3 + 0) / 2)
    assert sample_quality.repetition([9] * 103) == 1 - 1 / 100
    assert sample_quality.variety([[], [1]]) == {"distinct_1": 1.0, "distinct_2": 0.0, "repetition": 0.0}


def test_sample_metrics() -> None:
    rows = [Sequence([0], 0, [1, 2], "end_of_text"), Sequence([0], 1, [1, 2, 3], "length")]
    metrics = sample_quality.sample_metrics([(rows[0], [-1.0, -2.0, -6.0]), (rows[1], [-1.0, -1.0, -1.0])])
    assert (metrics["ended"], metrics["mean_log_prob"], metrics["n_samples"], metrics["n_tokens"]) == (0.5, -2.0, 2, 5)


def test_samples_independent_of_batch_size(pair: LanguageModel) -> None:
    texts = sample_quality.prompts()[:3]
    first = list(sample_quality.sample_prompts(pair, texts, 2, 12, batch_size=16))
    again = list(sample_quality.sample_prompts(pair, texts, 2, 12, batch_size=4))
    assert [row.generated for row, _ in first] == [row.generated for row, _ in again]
    assert sample_quality.sample_metrics(first)["mean_log_prob"] == pytest.approx(
        sample_quality.sample_metrics(again)["mean_log_prob"], abs=1e-6
    )
    # They are what `myllm sample` makes of these prompts.
    completions = complete(pair, texts, 12, sample_quality.SAMPLING, num_samples=2)
    assert [R50K.decode(row.generated) for row, _ in first] == [completion.text for completion in completions]


@torch.no_grad()
def test_log_probabilities_match_forward_pass(pair: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each drawn token, at temperature 1 and of the whole vocabulary; the end of the text is one of them."""
    monkeypatch.setattr(sample_quality, "SAMPLING", replace(sample_quality.SAMPLING, temperature=0.5, top_k=3))
    (plain, *_) = sample_quality.sample_prompts(pair, ["The weather"], 1, 9, batch_size=1)
    ending = next(token for token in plain[0].generated[2:] if token not in plain[0].generated[:2])
    at = plain[0].generated.index(ending)
    prompt = R50K.encode_document("The weather")
    monkeypatch.setattr(R50K, "encode_document", lambda _: prompt)  # as it was with the real end of text
    monkeypatch.setattr(R50K, "end_of_text", ending)
    ((row, scores),) = sample_quality.sample_prompts(pair, ["The weather"], 1, 9, batch_size=1)
    assert (row.finish_reason, row.generated) == ("end_of_text", plain[0].generated[:at])
    full = torch.tensor([[*row.prompt, *row.generated, ending]])
    expected = pair.model(full[:, :-1]).double().log_softmax(dim=-1).gather(2, full[:, 1:, None])[0, :, 0]
    assert scores == pytest.approx(expected[len(row.prompt) - 1 :].tolist(), abs=1e-5)


def test_held_out_samples() -> None:
    class Stream:
        tokens = 100

        def read(self, start: int, count: int) -> np.ndarray:
            documents = [list(range(20)), list(range(100, 105)), list(range(200, 240))]
            return np.array([token for document in documents for token in [END, *document]][start : start + count])

    assert sample_quality.held_out_samples(Stream(), END, 9, 10) == [list(range(8, 18)), list(range(208, 218))]
    assert sample_quality.held_out_samples(Stream(), END, 1, 10) == [list(range(8, 18))]
    assert sample_quality.held_out_samples(Stream(), END, 9, 1_000) == []


def test_prompts_in_package_data() -> None:
    texts = sample_quality.prompts()
    assert len(texts) == len(set(texts)) >= 20
    assert all(text == text.strip() and len(text) > 8 for text in texts)
    assert math.isfinite(len(files("myllm.evals").joinpath("prompts.txt").read_bytes()))
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert '"myllm.evals" = ["prompts.txt"]' in project
