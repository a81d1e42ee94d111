"""Which documents go where: held against the rules, followed document by document."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.config import DataConfig
from myllm.data.prepare.shard_plan import HashSet, ShardPlanner, ShardSpec
from myllm.data.prepare.shard_writer import check_enough
from myllm.data.prepare.work_items import ItemIndex
from myllm.data.sources.readers import SkipLog
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

    @property
    def most_held_out(self) -> int:
        return min(self.val_tokens, 10**9 if self.target_tokens is None else self.target_tokens // 9)


class Naive:
    """What the docstrings promise, one document at a time."""

    def __init__(self, rules: Rules, documents: list[Document], borders: list[int]) -> None:
        self.rules, self.documents = rules, documents
        self.val: list[tuple[int, int]] = []
        """Tokens: a document by number, and a place in it."""
        self.train: list[tuple[int, int]] = []
        self.counts = dict.fromkeys(("train_documents", "val_documents", "documents_split", "copies", "duplicates"), 0)
        edges = [0, *sorted(min(border, len(documents)) for border in borders), len(documents)]
        held_out, split = self.hold_out(edges)
        for number, places in [*sorted(held_out.items()), *split.items()]:
            self.val += [(number, at) for at in places]
        self.counts["val_documents"], self.counts["documents_split"] = len(held_out) + len(split), len(split)
        if self.val:
            self.take_for_training(edges, held_out, split)

    def hold_out(self, edges: list[int]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """Whole documents, and the one whose end is held out, by number, with the places held out."""
        rules, documents = self.rules, self.documents
        most = rules.most_held_out
        for edge in edges[1:]:  # whole items, until there is enough to know what a tenth is
            eligible, distinct, seen = [], [], set()
            for number, (_, content) in enumerate(documents[:edge]):
                if content not in seen:
                    distinct.append(number)
                if content not in seen or not rules.dedup:
                    eligible.append(number)
                seen.add(content)
            tokens = sum(documents[i][0] for i in distinct)
            if tokens >= 10 * most or (rules.max_documents is not None and len(eligible) >= rules.max_documents):
                break
        within = set(eligible[: rules.max_documents])
        distinct = [i for i in distinct if i in within]
        tokens = sum(documents[i][0] for i in distinct)
        most = min(most, tokens // 10)
        held_out, left = {}, most
        for number in distinct:
            if len(held_out) == len(distinct) // 10:
                break
            if documents[number][0] <= left:
                held_out[number] = list(range(documents[number][0]))
                left -= documents[number][0]
            elif left * 10 <= most:
                break
        if distinct and most - left < most / 2:
            longest = max(distinct, key=lambda i: (documents[i][0], -i))
            length = documents[longest][0]
            end = min(left, length // 2) - 1
            if longest not in held_out and end >= 1:
                return held_out, {longest: [0, *range(length - end, length)]}
        return held_out, {}

    def take_for_training(self, edges: list[int], held_out: dict[int, list[int]], split: dict[int, list[int]]) -> None:
        rules, counts, seen = self.rules, self.counts, set()
        contents = {self.documents[i][1] for i in {*held_out, *split}}
        room = rules.max_documents - len(held_out) if rules.max_documents is not None else 10**9
        target = rules.target_tokens or 10**9
        for number, (length, content) in enumerate(self.documents):
            if not room or len(self.train) >= target:
                break
            copy, seen = content in seen, {*seen, content}
            if rules.dedup and copy:
                counts["duplicates"] += 1
            elif number in held_out:
                continue
            elif content in contents and number not in split:
                counts["copies"] += 1
            else:
                kept = range(length - len(split.get(number, [0])) + 1)
                self.train += [(number, at) for at in kept][: target - len(self.train)]
                room -= 1
                counts["train_documents"] += 1


def cut(
    rules: Rules, documents: list[Document], borders: list[int]
) -> tuple[list[ShardSpec], ShardPlanner, list[list[Document]]]:
    """What ShardPlanner plans for the documents, in work items that end at these borders."""
    edges = [0, *sorted(min(border, len(documents)) for border in borders), len(documents)]
    items = [documents[a:b] for a, b in pairwise(edges)]
    config = DataConfig(
        val_tokens=rules.val_tokens, shard_tokens=rules.shard_tokens, target_tokens=rules.target_tokens,
        max_documents=rules.max_documents, dedup_exact=rules.dedup,
    )  # fmt: skip
    planner = ShardPlanner(config)
    shards = []
    for number, item in enumerate(items):
        lengths = np.array([length for length, _ in item], dtype=np.int64)
        hashes = np.array([content for _, content in item], dtype=np.uint64)
        shards += list(planner.add(number, ItemIndex(lengths, hashes, SkipLog())))
    return shards + list(planner.finish()), planner, items


def tokens_of(cuts: list[ShardSpec], split: str, items: list[list[Document]]) -> list[tuple[int, int]]:
    """Each token of a split, as its document's number over all items, and its place in it."""
    owners, first = [], 0
    for item in items:
        owners.append([(first + i, at) for i, (length, _) in enumerate(item) for at in range(length)])
        first += len(item)
    spans = [span for shard in cuts if shard.split == split for span in shard.spans]
    assert all(start < end for _, start, end in spans)
    return [owners[item][at] for item, start, end in spans for at in range(start, end)]


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
def test_planner_matches_naive_reference(rules: Rules, documents: list[Document], borders: list[int]) -> None:
    cuts, counted, items = cut(rules, documents, borders)
    naive = Naive(rules, documents, borders)
    for split, expected in (("val", naive.val), ("train", naive.train)):
        assert tokens_of(cuts, split, items) == expected
        shards = [shard for shard in cuts if shard.split == split]
        assert [shard.number for shard in shards] == list(range(len(shards)))
        assert [shard.tokens for shard in shards[:-1]] == [rules.shard_tokens] * (len(shards) - 1)
        assert all(0 < shard.tokens <= rules.shard_tokens for shard in shards)
        size = rules.shard_tokens
        begin = [sum(at == 0 for _, at in expected[i : i + size]) for i in range(0, len(expected), size)]
        assert [shard.documents for shard in shards] == begin
        assert [shard.tokens for shard in shards] == [sum(end - start for _, start, end in c.spans) for c in shards]
    assert counted.counts == {
        "train_documents": naive.counts["train_documents"], "train_tokens": len(naive.train),
        "val_documents": naive.counts["val_documents"], "val_tokens": len(naive.val),
        "documents_split": naive.counts["documents_split"],
        "copies_of_validation_dropped": naive.counts["copies"], "duplicates_dropped": naive.counts["duplicates"],
    }  # fmt: skip
    held_out, tokens = len(naive.val), len(naive.val) + len(naive.train)
    assert held_out <= rules.val_tokens
    assert 10 * held_out <= tokens or not naive.train


def lengths_of(cuts: list[ShardSpec], split: str) -> list[int]:
    return [shard.tokens for shard in cuts if shard.split == split]


def test_validation_takes_whole_fitting_documents() -> None:
    documents = [(6, 1), (4, 2), (5, 3), *((5, i) for i in range(4, 60))]
    for val_tokens, taken in ((10, [6, 4]), (14, [6, 4]), (15, [6, 4, 5]), (9, [6])):
        cuts, counted, _ = cut(Rules(val_tokens=val_tokens, shard_tokens=100), documents, [])
        assert lengths_of(cuts, "val") == [sum(taken)]
        assert counted.counts["val_documents"] == len(taken)


LINES = [(4, i) for i in range(1, 3_001)]


@pytest.mark.parametrize("at", [0, 1_500, 3_000])
@pytest.mark.parametrize("val_tokens", [1_000, 10**6])
def test_long_document_not_held_out(at: int, val_tokens: int) -> None:
    """Nor are all the short ones: of each kind there is something to train on, and something held out."""
    documents = [*LINES[:at], (1_400_000, 0), *LINES[at:]]
    for borders in ([], [1], [500, 1_000, 2_000]):
        _, counted, _ = cut(Rules(val_tokens=val_tokens, shard_tokens=10**6), documents, borders)
        counts = counted.counts
        assert counts["train_tokens"] + counts["val_tokens"] == 1_412_000 + counts["documents_split"]
        assert min(val_tokens, 141_200) / 2 <= counts["val_tokens"] <= min(val_tokens, 141_201)
        assert counts["val_documents"] <= 301
        assert counts["train_documents"] >= 2_700


def test_single_document_split_holds_out_end() -> None:
    cuts, counted, items = cut(Rules(val_tokens=500, shard_tokens=1_000), [(1_000, 1)], [])
    assert tokens_of(cuts, "train", items) == [(0, at) for at in range(901)]
    assert tokens_of(cuts, "val", items) == [(0, 0), *((0, at) for at in range(901, 1_000))]
    assert [shard.documents for shard in cuts] == [1, 1]
    assert counted.counts["documents_split"] == 1


def test_copies_of_split_document_dropped() -> None:
    documents = [(100, 1), (100, 2), (100, 1), (100, 1)]
    _, counted, _ = cut(Rules(val_tokens=500), documents, [2])
    assert counted.counts["copies_of_validation_dropped"] == 2
    assert counted.counts["train_tokens"] == 200 - (counted.counts["val_tokens"] - 1)


def test_training_drops_only_validation_copies() -> None:
    documents = [(10, 1), (3, 2), (10, 1), (3, 2), (3, 2), *((10, i) for i in range(3, 13))]
    _, counted, _ = cut(Rules(), documents, [2])
    assert counted.counts["train_documents"] == 13
    assert counted.counts["copies_of_validation_dropped"] == 1
    _, counted, _ = cut(Rules(dedup=True), documents, [2])
    assert counted.counts["train_documents"] == 11
    assert counted.counts["duplicates_dropped"] == 3


def test_target_tokens_met_exactly() -> None:
    documents = [(5, i) for i in range(10)] + [(900, i) for i in range(10, 12)]
    for target in (20, 43, 45, 800, 10**9):
        cuts, counted, _ = cut(Rules(target_tokens=target, shard_tokens=10_000), documents, [3, 11])
        assert counted.full == (target < 10**9)
        [held_out] = lengths_of(cuts, "val")
        assert held_out <= (held_out + target) / 10
        whole = 1_850 - held_out + counted.counts["documents_split"]
        assert lengths_of(cuts, "train") == [min(target, whole)]


def test_max_documents_holds_out_tenth() -> None:
    documents = [(5, i) for i in range(100)]
    for most, val in ((10, 1), (50, 5), (100, 10), (1_000, 10)):
        _, counted, _ = cut(Rules(val_tokens=495, max_documents=most), documents, [7, 30])
        assert counted.counts["val_documents"] == val
        assert counted.counts["train_documents"] == min(most, 100) - val
    _, counted, _ = cut(Rules(val_tokens=495, max_documents=9), documents, [7, 30])
    assert counted.counts["documents_split"] == 1
    assert (counted.counts["train_documents"], counted.counts["val_tokens"]) == (9, 2)


def test_too_few_tokens_error_lists_skips() -> None:
    _, counted, _ = cut(Rules(), [(8, 1), (8, 1)], [])
    with pytest.raises(UserError, match=r"x has 2 usable.*8 tokens; 1,234 x invalid json.*at most a tenth.*add text$"):
        check_enough(counted, "x", {"invalid_json": 1_234})
    _, counted, _ = cut(Rules(target_tokens=9), [(100, 1), (100, 2)], [])
    with pytest.raises(UserError, match=r"target_tokens takes 9.*raise data.target_tokens"):
        check_enough(counted, "x", {})
    _, counted, _ = cut(Rules(), [(30, 1), (30, 2)], [])
    check_enough(counted, "x", {})


def test_no_documents_error_explains_cause() -> None:
    _, counted, _ = cut(Rules(), [], [])
    place = {"reason": "no_text_column", "place": "a.parquet", "detail": "no column 'text', but ['body']"}
    with pytest.raises(UserError, match=r"x has no usable document; 1 x no text column; --text-column NAME(.|\n)*body"):
        check_enough(counted, "x", {"no_text_column": 1}, [place])
    with pytest.raises(UserError, match=r"x has no usable document; 2 x empty$"):
        check_enough(counted, "x", {"empty": 2})


@given(st.lists(st.lists(st.sampled_from([0, 1, 2, 3, 2**63 - 1, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1))))
def test_hash_set_matches_python_set(batches: list[list[int]]) -> None:
    found, expected = HashSet(), set()
    for batch in batches:
        hashes = np.array(batch, dtype=np.uint64)
        assert found.holds(hashes).tolist() == [value in expected for value in batch]
        new = []
        for place, value in enumerate(batch):
            if value not in expected:
                new.append(place)
                expected.add(value)
        assert found.add_new(hashes).tolist() == new
        assert found.holds(hashes).all()


def test_hash_set_keeps_few_runs() -> None:
    found, chance = HashSet(), np.random.default_rng(0)
    batches = [chance.integers(0, 2**64, 100, dtype=np.uint64) for _ in range(300)]
    for batch in batches:
        assert len(found.add_new(batch)) == 100
    assert found.holds(np.concatenate(batches)).all()
    assert len(found._runs) < 20
    assert sum(len(run) for run in found._runs) == 30_000
