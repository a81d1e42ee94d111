"""Which documents go where: held against the rules, followed document by document."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.data.cuts import Cut, CutList, HashSet
from myllm.data.readers import Faults
from myllm.data.units import UnitIndex
from myllm.errors import UserError

Document = tuple[int, int]
"""Its tokens, and its hash."""


@dataclass(frozen=True)
class Rules:
    val_tokens: int = 10
    shard_tokens: int = 7
    target_tokens: int | None = None
    max_documents: int | None = None
    dedup: bool = False


class Naive:
    """What the docstrings promise, one document at a time."""

    def __init__(self, rules: Rules, documents: list[Document]) -> None:
        self.rules = rules
        self.val: list[int] = []
        """Documents, by number."""
        self.train: list[int] = []
        self.copies = self.duplicates = 0
        most = rules.max_documents
        seen: set[int] = set()
        held_out: set[int] = set()
        for number, (_, content) in enumerate(documents):
            train_tokens = sum(documents[i][0] for i in self.train)
            if most is not None and len(self.val) + len(self.train) >= most:
                break
            if rules.target_tokens is not None and train_tokens >= rules.target_tokens:
                break
            if rules.dedup and content in seen:
                self.duplicates += 1
                continue
            seen.add(content)
            val_room = most is None or len(self.val) < max(most // 10, 1)
            if not self.train and val_room and sum(documents[i][0] for i in self.val) < rules.val_tokens:
                self.val.append(number)
                held_out.add(content)
            elif content in held_out:
                self.copies += 1
            else:
                self.train.append(number)


def cut(rules: Rules, documents: list[Document], borders: list[int]) -> tuple[list[Cut], CutList, list[list[Document]]]:
    """What CutList makes of the documents, dealt out to units that end at these borders."""
    edges = [0, *sorted(min(border, len(documents)) for border in borders), len(documents)]
    units = [documents[a:b] for a, b in pairwise(edges)]
    cuts = CutList(rules.val_tokens, rules.shard_tokens, rules.target_tokens, rules.max_documents, rules.dedup)
    made = []
    for number, unit in enumerate(units):
        lengths = np.array([length for length, _ in unit], dtype=np.int64)
        hashes = np.array([content for _, content in unit], dtype=np.uint64)
        made += list(cuts.add(number, UnitIndex(Path(str(number)), lengths, hashes, Faults())))
    return made + list(cuts.finish()), cuts, units


def tokens_of(cuts: list[Cut], split: str, units: list[list[Document]]) -> list[tuple[int, int]]:
    """Each token of a split, as its document's number over all units, and its place in it."""
    owners, first = [], 0
    for unit in units:
        owners.append([(first + i, at) for i, (length, _) in enumerate(unit) for at in range(length)])
        first += len(unit)
    spans = [span for each in cuts if each.split == split for span in each.spans]
    assert all(start < end for _, start, end in spans)
    return [owners[unit][at] for unit, start, end in spans for at in range(start, end)]


RULES = st.builds(
    Rules,
    val_tokens=st.integers(1, 60),
    shard_tokens=st.integers(1, 40),
    target_tokens=st.none() | st.integers(1, 150),
    max_documents=st.none() | st.integers(1, 40),
    dedup=st.booleans(),
)
# Few hashes, so that many are copies; the largest one too, where a sorted search ends.
HASHES = st.sampled_from([*range(12), 2**63, 2**64 - 1])


@given(RULES, st.lists(st.tuples(st.integers(1, 20), HASHES), max_size=40), st.lists(st.integers(0, 40), max_size=6))
def test_documents_go_where_the_rules_say_however_they_are_grouped(
    rules: Rules, documents: list[Document], borders: list[int]
) -> None:
    cuts, counted, units = cut(rules, documents, borders)
    naive = Naive(rules, documents)
    sizes = {}
    for split, chosen in (("val", naive.val), ("train", naive.train)):
        expected = [(number, at) for number in chosen for at in range(documents[number][0])]
        # A validation that is not full by the end is never written: there is nothing to train on.
        written = expected if split == "train" or val_is_done(naive, documents) else expected[: full(expected, rules)]
        assert tokens_of(cuts, split, units) == written
        shards = [each for each in cuts if each.split == split]
        sizes[split] = len(expected)
        assert [each.number for each in shards] == list(range(len(shards)))
        assert [each.tokens for each in shards[:-1]] == [rules.shard_tokens] * (len(shards) - 1)
        assert all(0 < each.tokens <= rules.shard_tokens for each in shards)
        size = rules.shard_tokens
        begin = [sum(at == 0 for _, at in written[i : i + size]) for i in range(0, len(written), size)]
        assert [each.documents for each in shards] == begin
        assert [each.tokens for each in shards] == [sum(end - start for _, start, end in c.spans) for c in shards]
    assert counted.counts == {
        "train_documents": len(naive.train), "train_tokens": sizes["train"],
        "val_documents": len(naive.val), "val_tokens": sizes["val"],
        "copies_of_validation_dropped": naive.copies, "duplicates_dropped": naive.duplicates,
    }  # fmt: skip


def val_is_done(naive: Naive, documents: list[Document]) -> bool:
    rules = naive.rules
    room = rules.max_documents is None or len(naive.val) < max(rules.max_documents // 10, 1)
    return not room or sum(documents[i][0] for i in naive.val) >= rules.val_tokens


def full(tokens: list[tuple[int, int]], rules: Rules) -> int:
    """How many of the tokens fill whole shards."""
    return len(tokens) // rules.shard_tokens * rules.shard_tokens


def lengths_of(cuts: list[Cut], split: str) -> list[int]:
    return [each.tokens for each in cuts if each.split == split]


def test_validation_takes_whole_documents_until_it_has_enough() -> None:
    cuts, counted, _ = cut(Rules(val_tokens=10, shard_tokens=100), [(6, 1), (4, 2), (5, 3)], [])
    assert lengths_of(cuts, "val") == [10]
    cuts, counted, _ = cut(Rules(val_tokens=11, shard_tokens=100), [(6, 1), (4, 2), (5, 3), (1, 4)], [])
    assert lengths_of(cuts, "val") == [15]
    assert counted.counts["train_documents"] == 1


def test_training_has_no_copy_of_validation_but_keeps_its_own() -> None:
    documents = [(10, 1), (3, 2), (10, 1), (3, 2), (3, 2)]
    _, counted, _ = cut(Rules(), documents, [2])
    assert counted.counts["train_documents"] == 3
    assert counted.counts["copies_of_validation_dropped"] == 1
    _, counted, _ = cut(Rules(dedup=True), documents, [2])
    assert counted.counts["train_documents"] == 1
    assert counted.counts["duplicates_dropped"] == 3


def test_the_document_that_reaches_the_target_is_the_last() -> None:
    documents = [(10, 0)] + [(5, i) for i in range(1, 10)]
    for wanted, taken in ((1, 5), (5, 5), (6, 10), (10, 10), (11, 15), (10**9, 45)):
        cuts, counted, _ = cut(Rules(target_tokens=wanted, shard_tokens=100), documents, [3, 4])
        assert lengths_of(cuts, "train") == [taken]
        assert counted.full == (wanted < 10**9)


def test_of_a_limited_number_of_documents_a_tenth_is_held_out() -> None:
    documents = [(5, i) for i in range(100)]
    for most, val in ((2, 1), (10, 1), (50, 5), (100, 10), (1_000, 99)):
        _, counted, _ = cut(Rules(val_tokens=495, max_documents=most), documents, [7, 30])
        assert counted.counts["val_documents"] == val
        assert counted.counts["train_documents"] == min(most, 100) - val


def test_nothing_to_train_on_is_said_with_what_was_passed_over() -> None:
    _, counted, _ = cut(Rules(), [(30, 1), (30, 1)], [])
    with pytest.raises(UserError, match=r"x has 2 usable.*; 1,234 x invalid json.*takes 10, which leaves nothing"):
        counted.check_enough("x", {"invalid_json": 1_234})
    _, counted, _ = cut(Rules(), [(30, 1), (30, 2)], [])
    counted.check_enough("x", {})


def test_no_document_at_all_is_said_with_where_and_why() -> None:
    _, counted, _ = cut(Rules(), [], [])
    place = {"reason": "no_text_column", "place": "a.parquet", "detail": "no column 'text', but ['body']"}
    with pytest.raises(UserError, match=r"x has no usable document; 1 x no text column; --text-column NAME(.|\n)*body"):
        counted.check_enough("x", {"no_text_column": 1}, [place])
    with pytest.raises(UserError, match=r"x has no usable document; 2 x empty$"):
        counted.check_enough("x", {"empty": 2})


@given(st.lists(st.lists(st.sampled_from([0, 1, 2, 3, 2**63 - 1, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1))))
def test_a_set_of_hashes_is_a_set(batches: list[list[int]]) -> None:
    found, expected = HashSet(), set()
    for batch in batches:
        hashes = np.array(batch, dtype=np.uint64)
        assert found.holds(hashes).tolist() == [each in expected for each in batch]
        new = []
        for place, each in enumerate(batch):
            if each not in expected:
                new.append(place)
                expected.add(each)
        assert found.add_new(hashes).tolist() == new
        assert found.holds(hashes).all()


def test_a_set_of_many_batches_stays_a_few_runs() -> None:
    found, chance = HashSet(), np.random.default_rng(0)
    batches = [chance.integers(0, 2**64, 100, dtype=np.uint64) for _ in range(300)]
    for batch in batches:
        assert len(found.add_new(batch)) == 100
    assert found.holds(np.concatenate(batches)).all()
    assert len(found._runs) < 20
    assert sum(len(run) for run in found._runs) == 30_000
