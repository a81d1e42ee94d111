"""Cloze examples come from the right places, and a model's score is what it deserves."""

import math

import numpy as np
import pytest
import torch

from myllm.evals.cloze import CHOICES, CONTEXT_TOKENS, ENDING_TOKENS, cloze_sums, finish, make_examples

END = 50_256
PIECE = CONTEXT_TOKENS + ENDING_TOKENS
CPU = torch.device("cpu")


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


def one_more(tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Knows how documents go on."""
    right = targets == tokens + 1
    return torch.where(right, -0.01, -9.0) * (targets != -1), right


def uniform(tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full(targets.shape, -math.log(50_257)) * (targets != -1), torch.zeros_like(targets, dtype=torch.bool)


def test_where_examples_come_from():
    examples = make_examples(STREAM, END, 1_000, seed=0)
    assert len(examples) == sum(length // PIECE for length in LENGTHS)  # every place once
    assert len({int(example.context[0]) for example in examples}) == len(examples)
    for example in examples:
        assert example.context.shape == (CONTEXT_TOKENS,)
        assert example.endings.shape == (CHOICES, ENDING_TOKENS)
        document = int(example.context[0]) // 1_000
        for text in (example.context, *example.endings):  # each from one place: none runs over a document's end
            assert (np.diff(text.astype(int)) == 1).all()
        assert example.endings[example.answer][0] == example.context[-1] + 1
        others = np.delete(example.endings, example.answer, axis=0)
        homes = {int(ending[0]) // 1_000 for ending in others}
        assert len(homes) == CHOICES - 1
        assert document not in homes
        assert not homes & {2, 4}  # too short


def test_the_same_stream_and_seed_give_the_same_examples():
    def shown(seed: int, count: int = 20) -> list:
        examples = make_examples(STREAM, END, count, seed)
        return [(each.context.tolist(), each.endings.tolist(), each.answer) for each in examples]

    assert shown(1) == shown(1)
    assert shown(1) != shown(2)
    assert shown(1, 5) == shown(1)[:5]
    assert len(shown(1, 5)) == 5


def test_too_few_documents():
    assert make_examples(counting([100, 100, 100]), END, 10, seed=0) == []
    assert make_examples(counting([100, 100, 100, PIECE - 1]), END, 10, seed=0) == []
    assert len(make_examples(counting([48, 48, 48, PIECE]), END, 10, seed=0)) == 4
    assert make_examples(Stream([]), END, 10, seed=0) == []
    assert make_examples(Stream([5] * 500), END, 10, seed=0) == []  # no document begins here


@pytest.fixture(scope="module")
def many() -> list:
    return make_examples(counting([960] * 50), END, 10**6, seed=3)


def test_answers_are_balanced(many):
    assert len(many) == 1_000
    counts = np.bincount([example.answer for example in many], minlength=CHOICES)
    assert (abs(counts - 250) < 5 * math.sqrt(1_000 * 0.25 * 0.75)).all()


def test_a_perfect_model(many):
    figures = finish(cloze_sums(one_more, many[:100], CPU, 0, 1))
    assert figures == {"acc": 1.0, "acc_norm": 1.0, "acc_stderr": 0.0, "n_examples": 100}


def test_the_opposite_of_a_perfect_model(many):
    figures = finish(cloze_sums(lambda *pair: (-one_more(*pair)[0], None), many[:100], CPU, 0, 1))
    assert figures["acc"] == 0


def test_a_model_that_knows_nothing_is_at_chance(many):
    """All endings tie, the first is taken, and the right one is first a quarter of the time."""
    figures = finish(cloze_sums(uniform, many, CPU, 0, 1))
    assert figures["acc"] == pytest.approx(0.25, abs=5 * 0.0137)
    assert figures["acc_norm"] == figures["acc"]
    assert figures["acc_stderr"] == pytest.approx(0.0137, abs=1e-3)
    assert figures["n_examples"] == 1_000


def noise(tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = tokens.double() * 12.9898 + targets.double() * 78.233
    return -torch.sin(x).abs() * (targets != -1), targets == tokens


def test_sums_are_those_of_a_direct_computation(many):
    right = 0
    for example in many[:60]:
        totals = []
        for ending in example.endings.astype(int):
            before = [int(example.context[-1]), *ending[:-1]]
            totals.append(sum(-abs(math.sin(a * 12.9898 + b * 78.233)) for a, b in zip(before, ending, strict=True)))
        right += int(np.argmax(totals)) == example.answer
    assert cloze_sums(noise, many[:60], CPU, 0, 1).tolist() == [right, right, 60]
    assert 0 < right < 60


def test_the_number_of_ranks_changes_nothing(many):
    one = cloze_sums(noise, many[:101], CPU, 0, 1)
    for ranks in (2, 3, 150):
        shares = [cloze_sums(noise, many[:101], CPU, rank, ranks) for rank in range(ranks)]
        assert torch.equal(sum(shares), one)


def test_only_endings_are_asked(many):
    seen = []

    def watch(tokens, targets):
        seen.append((tokens, targets))
        return uniform(tokens, targets)

    cloze_sums(watch, many[:3], CPU, 0, 1)
    ((tokens, targets),) = seen
    assert tokens.shape == targets.shape == (3 * CHOICES, PIECE - 1)
    assert (targets[:, : CONTEXT_TOKENS - 1] == -1).all()
    assert torch.equal(targets[:CHOICES, CONTEXT_TOKENS - 1 :], torch.from_numpy(many[0].endings.astype(np.int64)))
