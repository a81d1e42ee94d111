"""The order of the data is a pure function: exhaustive, pinned, and the same on any number of ranks."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.data.sampler import (
    DataPosition,
    count_sequences,
    rank_rows,
    sequences_needed,
    step_sequences,
    window_order,
    window_sequences,
)

MASK = 2**64 - 1


def splitmix64(x: int) -> int:
    """The same scrambling in Python's own integers. Its first value from 0 is the published 0xE220A8397B1DCDAF."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def at(epoch: int, index: int, seed: int = 5) -> DataPosition:
    return DataPosition(epoch, index, seed, "hash")


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """All of an epoch in one window: what every epoch but the first is."""
    return window_order(0, n, seed, epoch)


@given(st.integers(1, 2_000), st.integers(0, 2**63 - 1), st.integers(0, 50))
def test_epoch_is_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(n, seed, epoch).tolist()) == list(range(n))


def test_epochs_and_seeds_differ() -> None:
    orders = {epoch_order(200, seed, epoch).tobytes() for seed in range(30) for epoch in range(30)}
    assert len(orders) == 900


def test_order_looks_random() -> None:
    """Neither neighbours nor halves stay together: a rank correlation and the share of kept neighbours near chance."""
    order = epoch_order(20_000, 1_337, 0)
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.03
    assert np.mean(np.diff(order) == 1) < 0.001
    assert abs(np.mean(order[:10_000] < 10_000) - 0.5) < 0.02


# A run that resumes under a later version must see the data it would have seen: these never change.
GOLDEN = {
    (10, 0, 0): [0, 9, 1, 6, 3, 5, 4, 2, 8, 7],
    (10, 0, 1): [4, 2, 5, 1, 0, 8, 6, 7, 3, 9],
    (10, 1, 0): [2, 5, 8, 9, 1, 4, 6, 0, 3, 7],
    (10, 1_337, 0): [4, 3, 5, 0, 8, 6, 9, 2, 1, 7],
    (1_000_003, 1_337, 3): [569_169, 457_044, 558_700, 979_894, 504_439, 751_920],
}


@pytest.mark.parametrize(("key", "expected"), GOLDEN.items())
def test_order_matches_golden_values(key: tuple[int, int, int], expected: list[int]) -> None:
    assert epoch_order(*key)[: len(expected)].tolist() == expected


@given(st.integers(1, 60), st.integers(0, 2**63 - 1), st.integers(0, 9))
def test_order_matches_splitmix64_reference(n: int, seed: int, epoch: int) -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    key = splitmix64((splitmix64(seed) + epoch) & MASK)
    assert epoch_order(n, seed, epoch).tolist() == sorted(range(n), key=lambda i: splitmix64(i ^ key))


def test_order_is_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(10, 0, 0)[0] = 1


def test_count_sequences() -> None:
    for tokens in range(50):
        for seq_len in range(1, 12):
            fits = [i for i in range(50) if (i + 1) * seq_len + 1 <= tokens]  # inputs, and one token ahead
            assert count_sequences(tokens, seq_len) == len(fits)


@given(st.integers(2, 400), st.integers(1, 40))
def test_windows_cover_every_token_once(tokens: int, seq_len: int) -> None:
    n = count_sequences(tokens, seq_len)
    inputs = [i * seq_len + j for i in range(n) for j in range(seq_len)]
    targets = [i + 1 for i in inputs]
    assert inputs == list(range(n * seq_len))
    assert targets == list(range(1, n * seq_len + 1))
    assert tokens - 1 - n * seq_len < seq_len, "a whole sequence is left over"
    assert n * seq_len < tokens, "reads past the end"


@given(st.integers(1, 30), st.integers(0, 4), st.data())
def test_advance_matches_single_steps(n: int, epoch: int, data: st.DataObject) -> None:
    index, count = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, 200))
    want_epoch, want_index = epoch, index
    for _ in range(count):
        want_index += 1
        if want_index == n:
            want_epoch, want_index = want_epoch + 1, 0
    assert at(epoch, index).advance(count, n) == at(want_epoch, want_index)


@given(st.integers(1, 20), st.integers(1, 70), st.integers(1, 6))
def test_steps_traverse_consecutive_epochs(n: int, count: int, steps: int) -> None:
    endless = [i for epoch in range(count * steps // n + 2) for i in epoch_order(n, 5, epoch).tolist()]
    position, seen = at(0, 0), []
    for _ in range(steps):
        seen += step_sequences(position, count, n, n).tolist()
        position = position.advance(count, n)
    assert seen == endless[: count * steps]


def shares(position: DataPosition, sequences: int, n: int, world_size: int, micro: int) -> list[list[int]]:
    """What each (micro-step, rank) takes of one step."""
    step = step_sequences(position, sequences, n, n)
    return [
        step[rank_rows(micro_step, rank, world_size, micro)].tolist()
        for micro_step in range(sequences // (world_size * micro))
        for rank in range(world_size)
    ]


def test_step_independent_of_ranks_and_accumulation() -> None:
    """16 sequences a step, every way to cut them over ranks and micro-steps; every sequence once an epoch."""
    n, sequences = 80, 16
    for world_size in (1, 2, 4):
        for micro in (1, 2, 4):
            position, epoch = at(0, 0), []
            for _ in range(n // sequences):
                parts = shares(position, sequences, n, world_size, micro)
                assert all(len(part) == micro for part in parts)
                step = [i for part in parts for i in part]
                assert step == step_sequences(position, sequences, n, n).tolist()
                epoch += step
                position = position.advance(sequences, n)
            assert position == at(1, 0)
            assert sorted(epoch) == list(range(n))


@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 8))
def test_rank_rows_tile_step(accumulation: int, world_size: int, micro: int) -> None:
    rows = [rank_rows(m, r, world_size, micro) for m in range(accumulation) for r in range(world_size)]
    assert rows[0].start == 0
    assert rows[-1].stop == accumulation * world_size * micro
    assert all(a.stop == b.start for a, b in pairwise(rows))


def by_hand(n: int, window: int, epochs: int) -> list[int]:
    """Epochs after one another: the first a window at a time, the others as a whole."""
    first = [i for start in range(0, n, window) for i in window_order(start, min(window, n - start), 5, 0).tolist()]
    return first + [i for epoch in range(1, epochs) for i in epoch_order(n, 5, epoch).tolist()]


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 70), st.integers(1, 6))
def test_windowed_order_independent_of_step_size(n: int, window: int, count: int, steps: int) -> None:
    endless = by_hand(n, window, count * steps // n + 2)
    position, seen = at(0, 0), []
    for _ in range(steps):
        seen += step_sequences(position, count, n, window).tolist()
        position = position.advance(count, n)
    assert seen == endless[: count * steps]


@given(st.integers(1, 200), st.integers(1, 60))
def test_windows_in_order_without_duplicates(n: int, window: int) -> None:
    first = step_sequences(at(0, 0), n, n, window)
    for start in range(0, n, window):
        assert sorted(first[start : start + window].tolist()) == list(range(start, min(start + window, n)))
    second = step_sequences(at(1, 0), n, n, window)
    assert sorted(second.tolist()) == list(range(n))


def test_first_epoch_shuffles_windows_later_epochs_globally() -> None:
    first = step_sequences(at(0, 0), 1_000, 1_000, 100).reshape(10, 100)
    assert len({(row % 100).tobytes() for row in first}) == 10
    assert all((np.diff(row) == 1).mean() < 0.1 for row in first)
    second = step_sequences(at(1, 0), 1_000, 1_000, 100)
    assert len(set((second[:100] // 100).tolist())) == 10, "all windows are met in the first tenth"


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 30), st.integers(0, 60))
def test_sequences_needed_determine_first_epoch_step(n: int, window: int, count: int, index: int) -> None:
    """As soon as there are `sequences_needed`, the rest of the stream does not change the step."""
    needed = sequences_needed(at(0, index), count, window)
    assert needed is not None
    assert needed % window == 0
    assert index + count <= needed < index + count + window
    if needed <= n:
        orders = {step_sequences(at(0, index), count, there, window).tobytes() for there in range(needed, n + 1)}
        assert len(orders) == 1
        assert at(0, index).advance(count, None) == at(0, index + count)


def test_later_epochs_need_complete_data() -> None:
    assert sequences_needed(at(1, 0), 1, 10) is None


@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 30))
def test_epoch_end_equals_next_epoch_start(n: int, window: int, count: int) -> None:
    """A run whose data were still growing when it took the last sequence says (0, n), another (1, 0)."""
    assert (step_sequences(at(0, n), count, n, window) == step_sequences(at(1, 0), count, n, window)).all()
    assert at(0, n).advance(count, n) == at(1, 0).advance(count, n)


def test_window_sequences() -> None:
    assert window_sequences(2_048) == 65_536
    assert window_sequences(1 << 30) == 1
