"""Sampling: cached and uncached agree, seeds decide, limits hold."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest
import torch
from support.random_models import random_model

from myllm.config import ModelConfig
from myllm.errors import UserError
from myllm.inference.generate import Sequence, generate_batch, stream_tokens
from myllm.inference.sampling import choose
from myllm.inference.sampling_params import SamplingParams
from myllm.model.transformer import Transformer

SMALL = ModelConfig(vocab_size=50, vocab_multiple=32, max_seq_len=24, d_model=24, n_layers=2, n_heads=4, d_ff=32)
PROMPT = [3, 14, 15]


def model_of(**changes: object) -> Transformer:
    return random_model(replace(SMALL, **changes), 0.3)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return model_of()


def generate(
    model: Transformer, prompt: list[int], max_new_tokens: int, end_of_text: int | None = None, **settings: float
) -> Iterator[int]:
    return stream_tokens(model, prompt, max_new_tokens, SamplingParams(**{"top_k": 0, **settings}), end_of_text)


@torch.no_grad()
def greedy_without_cache(model: Transformer, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "kind", [{}, {"position": "learned", "bias": True}, {"n_kv_heads": 2, "qk_norm": True}], ids=str
)
@pytest.mark.parametrize("prompt", [[7], PROMPT, list(range(20))], ids=len)
def test_greedy_matches_uncached_loop(kind, prompt):
    model, count = model_of(**kind), SMALL.max_seq_len - len(prompt)
    expected = greedy_without_cache(model, prompt, count)
    assert list(generate(model, prompt, count, temperature=0)) == expected


def test_top_k_of_one_is_greedy(model):
    greedy = list(generate(model, PROMPT, 20, temperature=0))
    assert list(generate(model, PROMPT, 20, temperature=1.5, top_k=1, seed=9)) == greedy
    assert list(generate(model, PROMPT, 20, temperature=1e-320, seed=9)) == greedy  # tiny, and still a number


def test_seeds_and_random_state(model):
    before = torch.get_rng_state()
    first = list(generate(model, PROMPT, 20, temperature=1, seed=1))
    torch.manual_seed(99)
    torch.rand(5)
    assert list(generate(model, PROMPT, 20, temperature=1, seed=1)) == first
    assert list(generate(model, PROMPT, 20, temperature=1, seed=2)) != first
    torch.set_rng_state(before)
    list(generate(model, PROMPT, 5, temperature=1, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_grad_mode_unchanged_between_tokens(model):
    """The generator turns gradients off while it runs, not for its caller."""
    ids = generate(model, PROMPT, 3)
    next(ids)
    assert torch.is_grad_enabled()


# -- the draw ---------------------------------------------------------------------------------------------------------


def frequencies(logits: torch.Tensor, temperature: float, top_k: int, draws: int = 6_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sampling = SamplingParams(temperature, top_k)
    drawn = torch.tensor([choose(logits[None], sampling, [generator], [[]])[0] for _ in range(draws)])
    return drawn.bincount(minlength=len(logits)) / draws


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 3), (1.0, 6), (1.0, 99)])
def test_sampling_frequencies_match_softmax(temperature, top_k):
    logits = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.7, -3.0])
    allowed = logits.topk(min(top_k or 6, 6)).indices
    expected = torch.zeros(6)
    expected[allowed] = (logits[allowed] / temperature).softmax(dim=0)
    seen, draws = frequencies(logits, temperature, top_k), 6_000
    assert not seen[expected == 0].any()
    kept = expected > 0
    chi_square = draws * ((seen - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < 25  # of up to 5 degrees of freedom: exceeded once in 7,000 by a correct sampler


def test_top_k_with_ties():
    assert (frequencies(torch.zeros(6), 1.0, 2, draws=200) > 0).sum() == 2


def test_huge_and_low_precision_logits():
    generator = torch.Generator().manual_seed(0)
    assert choose(torch.tensor([[3e38, -3e38, 2.9e38]]), SamplingParams(0.1, 0), [generator], [[]]) == [0]
    low = torch.tensor([[1.0, 5.0, 2.0]], dtype=torch.bfloat16)
    assert choose(low, SamplingParams(0.01, 2), [generator], [[]]) == [1]


def test_top_k_draws_from_most_likely(model):
    tokens = list(PROMPT)
    for token in generate(model, PROMPT, 20, temperature=5, top_k=4, seed=3):
        with torch.no_grad():
            most_likely = model(torch.tensor([tokens]))[0, -1].topk(4).indices.tolist()
        assert token in most_likely
        tokens.append(token)


def test_vocabulary_padding_is_never_sampled():
    """Rows of the vocabulary's padding would win every draw if they took part."""
    model = model_of(vocab_size=33)
    with torch.no_grad():
        model.embedding.weight[33:] = 1e3 * model.embedding.weight[:31]
    assert model.embedding.weight.shape[0] == 64
    drawn = [token for seed in range(5) for token in generate(model, [1], 40, temperature=50, seed=seed)]
    assert len(set(drawn)) > 25
    assert max(drawn) < 33


# -- where it ends ----------------------------------------------------------------------------------------------------


def test_end_of_text_stops_generation(model):
    every = list(generate(model, PROMPT, 20, temperature=1, seed=1))
    stop = every[8]
    assert list(generate(model, PROMPT, 20, temperature=1, seed=1, end_of_text=stop)) == every[: every.index(stop)]


def test_zero_new_tokens(model):
    assert list(generate(model, PROMPT, 0)) == []


@torch.no_grad()
def test_window_slides_beyond_context(model):
    """Each time it is full, the newer half is read again and the rest forgotten."""
    context, count = SMALL.max_seq_len, 3 * SMALL.max_seq_len
    actual = list(generate(model, PROMPT, count, temperature=0))
    assert len(actual) == count
    window, tokens, expected = list(PROMPT), list(PROMPT), []
    while len(expected) < count:
        if len(window) > context:
            window = tokens[-(context // 2) :]
        token = int(model(torch.tensor([window]))[0, -1].argmax())
        window, tokens, expected = [*window, token], [*tokens, token], [*expected, token]
    assert actual == expected


def test_long_prompt_is_truncated_left(model):
    long = [(7 * i) % 50 for i in range(100)]
    for count in (1, 30):
        full = list(generate(model, long, count, temperature=0))
        assert full == list(generate(model, long[-24:], count, temperature=0))
    assert full[:1] == greedy_without_cache(model, long[-24:], 1)


def test_single_token_context():
    assert len(list(generate(model_of(max_seq_len=1), PROMPT, 5))) == 5


def test_tokens_are_streamed(model):
    assert len(list(islice(generate(model, PROMPT, 10**9), 3))) == 3


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "the prompt is empty"),
        (PROMPT, {"temperature": -0.1}, "temperature -0.1"),
        (PROMPT, {"temperature": float("nan")}, "temperature nan"),
        (PROMPT, {"temperature": float("inf")}, "temperature inf"),
        (PROMPT, {"top_k": -1}, "top_k -1"),
        (PROMPT, {"max_new_tokens": -1}, "max_new_tokens is -1"),
    ],
)
def test_invalid_parameters_raise_immediately(model, prompt, settings, message):
    with pytest.raises(UserError, match=message):
        generate(model, prompt, **{"max_new_tokens": 1, **settings})


# -- batches ----------------------------------------------------------------------------------------------------------

PROMPTS = [[7], PROMPT, list(range(20)), [9, 8, 7, 6, 5], [(7 * i) % 50 for i in range(40)]]


@pytest.mark.parametrize(
    "kind",
    [{}, {"qk_norm": True}, {"n_kv_heads": 2, "qk_norm": True}, {"position": "learned", "bias": True}],
    ids=str,
)
@pytest.mark.parametrize(
    "sampling", [SamplingParams(temperature=0), SamplingParams(1.2, 20, 0.9, 0.01, 1.1)], ids=["greedy", "sampled"]
)
def test_batch_matches_single_sequences(kind, sampling):
    """Lengths from 1 to beyond the context, rows that end early, and windows that slide, each at its own time."""
    model, count, end = model_of(**kind), 2 * SMALL.max_seq_len, 11
    batch = [Sequence(prompt, seed=number) for number, prompt in enumerate(PROMPTS)]
    assert sum(1 for _ in generate_batch(model, batch, count, sampling, end)) == sum(
        len(row.generated) for row in batch
    )
    for row in batch:
        alone = list(stream_tokens(model, row.prompt, count, replace(sampling, seed=row.seed), end))
        assert row.generated == alone
        assert row.finish_reason == ("length" if len(alone) == count else "end_of_text")


def test_stopped_sequence_does_not_affect_others(model):
    expected = list(generate(model, PROMPT, 30, temperature=1, seed=1))
    batch = [Sequence([5, 6], 0), Sequence(PROMPT, 1)]
    for row in generate_batch(model, batch, 30, SamplingParams(1.0, 0)):
        if row is batch[0] and len(row.generated) == 4:
            row.finish_reason = "stop"
    assert len(batch[0].generated) == 4
    assert batch[1].generated == expected


def test_empty_batch(model):
    assert list(generate_batch(model, [], 5, SamplingParams())) == []
