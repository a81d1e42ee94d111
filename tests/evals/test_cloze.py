"""Cloze examples come from the right places, and a model's score is what it deserves."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import myllm
from myllm.data.tokenizer.load import load_tokenizer
from myllm.distributed.collectives import DistContext
from myllm.evals.choice import TokenizedQuestion, choice_sums
from myllm.evals.cloze import (
    CHOICES,
    CONTEXT_TOKENS,
    ENDING_TOKENS,
    blind_accuracy,
    finish,
    make_examples,
    why_unavailable,
)

END = 50_256
PIECE = CONTEXT_TOKENS + ENDING_TOKENS
CPU = torch.device("cpu")
ALONE = DistContext(0, 0, 1, CPU)


class Stream:
    """Tokens in memory, read as a TokenStream is."""

    def __init__(self, tokens) -> None:
        self._tokens = np.asarray(tokens, dtype=np.uint16)
        self.tokens = len(self._tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        return self._tokens[start : start + count]


def counting(lengths: list[int]) -> Stream:
    """Document d counts up from 1,000 d: every token says where it stands, and the next one is always one more."""
    parts = [[END, *range(1_000 * d, 1_000 * d + length)] for d, length in enumerate(lengths)]
    return Stream([token for part in parts for token in part])


LENGTHS = [400, 48, 47, 500, 12, 333, 200, 900, 100, 60]
STREAM = counting(LENGTHS)


def one_more(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Knows how documents go on."""
    return torch.where(targets == tokens + 1, -0.01, -9.0) * (targets != -1)


def cloze_sums(
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    examples: list[TokenizedQuestion],
    dist: DistContext = ALONE,
) -> torch.Tensor:
    """With a score of tokens and targets, which sees the last token of a context alone."""
    return choice_sums(lambda prefixes, owners, tokens, targets: score(tokens, targets), examples, dist)


def uniform(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.full(targets.shape, -math.log(50_257)) * (targets != -1)


def test_endings_follow_contexts():
    examples = make_examples(STREAM, END, 1_000, seed=0)
    assert len(examples) == sum(length // PIECE for length in LENGTHS)  # as many as there are places
    for example in examples:
        (context,) = example.contexts
        assert context.shape == (CONTEXT_TOKENS,)
        assert [ending.shape for ending in example.endings] == [(ENDING_TOKENS,)] * CHOICES
        for text in (context, *example.endings):  # each from one place: none runs over a document's end
            assert (np.diff(text.astype(int)) == 1).all()
        assert example.endings[example.answer][0] == context[-1] + 1
        homes = {int(ending[0]) // 1_000 for ending in example.endings}
        assert len(homes) == CHOICES
        assert not homes & {2, 4}  # too short
        assert {int(ending[0]) % 1_000 % PIECE for ending in example.endings} == {CONTEXT_TOKENS}  # true and false ones


def test_examples_deterministic_by_seed():
    def shown(seed: int, count: int = 20) -> list:
        examples = make_examples(STREAM, END, count, seed)
        return [
            (example.contexts[0].tolist(), np.stack(example.endings).tolist(), example.answer) for example in examples
        ]

    assert shown(1) == shown(1)
    assert shown(1) != shown(2)
    assert shown(1, 5) == shown(1)[:5]
    assert len(shown(1, 5)) == 5


def test_too_few_documents():
    assert make_examples(counting([100, 100, 100]), END, 10, seed=0) == []
    assert make_examples(counting([100, 100, 100, PIECE - 1]), END, 10, seed=0) == []
    assert len(make_examples(counting([48, 48, 48, PIECE]), END, 10, seed=0)) == 4
    assert why_unavailable(make_examples(counting([48, 48, 48, PIECE]), END, 1, seed=0), PIECE) is None
    assert "4 held-out documents of at least 48 tokens" in why_unavailable([], PIECE)
    assert "a context of 48 tokens, model.max_seq_len is 47" in why_unavailable(
        make_examples(STREAM, END, 1, seed=0), PIECE - 1
    )
    assert make_examples(Stream([]), END, 10, seed=0) == []
    assert make_examples(Stream([5] * 500), END, 10, seed=0) == []  # no document begins here


@pytest.fixture(scope="module")
def many() -> list:
    return make_examples(counting([960] * 50), END, 10**6, seed=3)


def test_answers_balanced(many):
    assert len(many) == 1_000
    counts = np.bincount([example.answer for example in many], minlength=CHOICES)
    assert (abs(counts - 250) < 5 * math.sqrt(1_000 * 0.25 * 0.75)).all()


def test_perfect_model(many):
    metrics = finish(cloze_sums(one_more, many[:100]), 0.25)
    assert metrics == {"acc": 1.0, "acc_norm": 1.0, "acc_stderr": 0.0, "acc_blind": 0.25, "n_examples": 100}


def test_inverted_model_scores_zero(many):
    metrics = finish(cloze_sums(lambda *pair: -one_more(*pair), many[:100]), 0.25)
    assert metrics["acc"] == 0


def test_uniform_model_scores_chance(many):
    """All endings tie, the first is taken, and the right one is first a quarter of the time."""
    metrics = finish(cloze_sums(uniform, many), 0.25)
    assert metrics["acc"] == pytest.approx(0.25, abs=5 * 0.0137)
    assert metrics["acc_norm"] == metrics["acc"]
    assert metrics["acc_stderr"] == pytest.approx(0.0137, abs=1e-3)
    assert metrics["n_examples"] == 1_000


# -- a model that does not see the context ----------------------------------------------------------------------------


def one_large_document() -> list[np.ndarray]:
    """A long text of few frequent words, beside many short ones of rare words."""
    chance = np.random.default_rng(0)
    return [chance.integers(0, 40, 60_000), *(chance.integers(100, 9_000, 60 + 3 * d) for d in range(120))]


def a_rare_beginning() -> list[np.ndarray]:
    """Every document begins with words that come nowhere else, as licenses and headings do."""
    chance = np.random.default_rng(1)
    return [np.concatenate((chance.integers(5_000, 9_000, 96), chance.integers(0, 300, 20 * d))) for d in range(1, 90)]


def a_frequent_end() -> list[np.ndarray]:
    """Documents that trail off into one token, and of very different lengths."""
    chance = np.random.default_rng(2)
    lengths = (50 * chance.pareto(1.1, 200)).astype(int) + 48
    return [np.where(np.arange(n) > n / 2, 7, chance.zipf(1.3, n) % 8_000) for n in lengths.clip(max=50_000)]


def python_sources() -> list[np.ndarray]:
    encode = load_tokenizer().encode
    return [encode(file.read_text(encoding="utf-8")) for file in sorted(Path(myllm.__file__).parent.rglob("*.py"))]


@pytest.mark.parametrize("corpus", [one_large_document, a_rare_beginning, a_frequent_end, python_sources])
def test_context_free_scoring_at_chance(corpus: Callable[[], list[np.ndarray]]):
    """By the frequencies of tokens, be they liked or shunned: true endings are drawn as the others are."""
    stream = Stream(np.concatenate([np.append(END, document) for document in corpus()]))
    examples = [example for seed in range(10) for example in make_examples(stream, END, 400, seed)]
    error = math.sqrt(0.25 * 0.75 / len(examples))
    assert abs(blind_accuracy(stream, examples) - 0.25) < 4 * error
    counts = np.bincount(stream.read(0, stream.tokens), minlength=65_536)
    shunned = [np.log(counts[np.stack(example.endings)]).sum(axis=1).argmin() == example.answer for example in examples]
    assert abs(np.mean(shunned) - 0.25) < 4 * error


def test_blind_accuracy_uses_token_frequencies():
    stream = Stream([END, *[1] * 90, END, *[2] * 60, END, *[3] * 55, END, *[4] * 50])
    examples = make_examples(stream, END, 4, seed=0)
    expected = np.mean([example.endings[example.answer][0] == 1 for example in examples])
    assert blind_accuracy(stream, examples) == expected


def noise(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    x = tokens.double() * 12.9898 + targets.double() * 78.233
    return -torch.sin(x).abs() * (targets != -1)


def test_sums_match_direct_computation(many):
    right = 0
    for example in many[:60]:
        totals = []
        for ending in np.stack(example.endings).astype(int):
            before = [int(example.contexts[0][-1]), *ending[:-1]]
            totals.append(sum(-abs(math.sin(a * 12.9898 + b * 78.233)) for a, b in zip(before, ending, strict=True)))
        right += int(np.argmax(totals)) == example.answer
    assert cloze_sums(noise, many[:60]).tolist() == [right, right, 15, 60]
    assert 0 < right < 60


def test_sums_independent_of_rank_count(many):
    one = cloze_sums(noise, many[:101])
    for ranks in (2, 3, 150):
        shares = [cloze_sums(noise, many[:101], DistContext(rank, rank, ranks, CPU)) for rank in range(ranks)]
        assert torch.equal(sum(shares), one)


def test_scores_only_endings(many):
    seen = []

    def watch(prefixes, owners, tokens, targets):
        seen.append((prefixes, owners, tokens, targets))
        return uniform(tokens, targets)

    choice_sums(watch, many[:3], ALONE)
    ((prefixes, owners, tokens, targets),) = seen
    assert prefixes.shape == (3, CONTEXT_TOKENS - 1)
    assert owners.tolist() == [0] * CHOICES + [1] * CHOICES + [2] * CHOICES
    assert tokens.shape == targets.shape == (3 * CHOICES, ENDING_TOKENS)
    assert torch.equal(targets[:CHOICES], torch.from_numpy(np.stack(many[0].endings).astype(np.int64)))
