"""The order of a mixture against counts by hand: exact blocks, near shares in every prefix, the same from anywhere."""

import hashlib
import itertools
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest

from myllm.data.mixture import interleaving
from myllm.data.mixture.interleaving import Interleaving, fit_weights
from myllm.data.mixture.spec import Stage, parse_mixture

SMALL = [
    tuple(Fraction(part, total) for part in parts)
    for total in range(1, 8)
    for size in (1, 2, 3, 4)
    for parts in itertools.product(range(1, total + 1), repeat=size)
    if sum(parts) == total
]


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A block is one common denominator: many blocks in few sequences."""
    monkeypatch.setattr(interleaving, "MIN_BLOCK", 1)
    interleaving._block.cache_clear()
    yield
    interleaving._block.cache_clear()


def stages(text: str) -> tuple[Stage, ...]:
    mixture = parse_mixture(text)
    assert mixture is not None
    return mixture.stages


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("seed", [0, 1, 1337])
def test_prefix_shares_match_small_weights(seed: int) -> None:
    """Every way to write sevenths and larger parts as weights of up to four components, in exact fractions."""
    assert len(SMALL) > 60
    for weights in SMALL:
        order = Interleaving((Stage(0, weights),), 1, seed)
        denominator = np.lcm.reduce([weight.denominator for weight in weights])
        components = order.components(0, 5 * int(denominator)).tolist()
        counts = [0] * len(weights)
        for n, component in enumerate([*components, None]):
            for weight, count in zip(weights, counts, strict=True):
                assert abs(count - weight * n) <= 1 + weight * (len(weights) - 2)
                assert n % denominator or count == weight * n, "a block has each exactly"
            assert order.counts(n).tolist() == counts
            if component is not None:
                counts[component] += 1


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("text", ["A:0.5 B:0.3 C:0.2", "A:0.5 B:0.5 @3 A:0.1 C:0.9 @4 B:1/3 C:1/3 A:1/3"])
def test_slices_match_whole_order(text: str) -> None:
    order = Interleaving(stages(text), 4, 3)
    whole = order.components(0, 60)
    for first, end in itertools.combinations(range(61), 2):
        assert (order.components(first, end - first) == whole[first:end]).all()
        between = order.counts(end) - order.counts(first)
        assert (between == np.bincount(whole[first:end], minlength=3)).all()


@pytest.mark.parametrize(
    "text", ["A:0.7 B:0.2 C:0.1", "A:0.512345 B:0.487655", "A:1/3 B:1/7 C:11/21", "A:0.999 B:0.001"]
)
def test_million_sequence_windows_match_weights(text: str) -> None:
    (stage,) = stages(text)
    size, total = 1_000_000, 2_500_000
    components = Interleaving((stage,), 512, 7).components(0, total)
    for component, weight in enumerate(stage.weights):
        before = np.concatenate(([0], np.cumsum(components == component)))
        shares = (before[size:] - before[:-size]) / size
        assert np.abs(shares - float(weight)).max() < 1e-5  # 0.1 % was promised


def test_weights_change_at_stage_step() -> None:
    order = Interleaving(stages("A:0.75 B:0.25 @1000 B:0.1 C:0.9"), 512, 1)
    assert order.counts(1_000 * 512).tolist() == [384_000, 128_000, 0]
    later = order.components(1_000 * 512, 409_600)
    assert np.bincount(later).tolist() == [0, 40_960, 368_640]
    assert set(order.components(1_000 * 512 - 50, 50).tolist()) == {0, 1}
    far = 10**13
    assert abs(order.counts(far)[2] - 0.9 * (far - 512_000)) < 2, "at once, however far"


def test_blocks_differ_and_depend_on_seed() -> None:
    order = Interleaving(stages("A:0.5 B:0.5"), 8, 1)
    blocks = order.components(0, 10 * 4_096).reshape(10, -1)
    assert len({block.tobytes() for block in blocks}) == 10
    assert not (blocks[0] == Interleaving(stages("A:0.5 B:0.5"), 8, 2).components(0, 4_096)).all()
    pairs = blocks.reshape(-1, 2)
    assert 0.3 < (pairs[1:] == pairs[:-1]).all(axis=1).mean() < 0.7, "neighboring pairs differ as often as not"


def test_order_stable_across_versions() -> None:
    """Checkpoints rely on it."""
    components = Interleaving(stages("A:0.7 B:0.2 C:0.1 @50 A:1/3 C:2/3"), 100, 1337).components(0, 20_000)
    digest = hashlib.sha256(components.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "0c423deebc949916"


def test_fit_weights_respects_capacities() -> None:
    fitted = fit_weights(np.array([0.7, 0.2, 0.1]), np.array([0.5, 2.0, 0.05]))
    assert fitted is not None
    assert fitted.tolist() == [0.5, 0.45, 0.05]
    fitted = fit_weights(np.array([0.5, 0.3, 0.2]), np.array([0.12345, 9, 9]))
    assert fitted is not None
    assert fitted.sum() == pytest.approx(1)
    assert fitted[0] == 0.1234
    assert fitted[1] / fitted[2] == pytest.approx(1.5, abs=1e-3)
    assert fit_weights(np.array([0.5, 0.5]), np.array([0.4, 0.5])) is None
