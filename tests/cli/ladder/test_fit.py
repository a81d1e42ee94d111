"""The fits of a ladder: a law that is fed to them comes back, with noise within its band."""

from typing import Any

import numpy as np
import pytest
from support.synthetic_ladder import LAW, LENGTHS, MIDDLE, SAVED, SIZES, SLOPES, TARGET, exact, ladder, law

from myllm.cli.ladder.analysis import analyze
from myllm.cli.ladder.fit import (
    Losses,
    bands,
    fit_joint,
    fit_sizes,
    hold_out,
    size_multipliers,
    tokens_to_reach,
)
from myllm.cli.ladder.report import describe_analysis


def test_joint_fit_recovers_law_without_largest_rung() -> None:
    found = fit_joint(hold_out(exact()), SIZES, LENGTHS)
    assert found.constants == pytest.approx(LAW, rel=1e-5)
    assert found.multipliers(MIDDLE) == pytest.approx(SAVED, rel=1e-6)
    assert found.size_exponents == pytest.approx(SLOPES, abs=1e-6)
    for recipe in range(3):
        far = found.losses(np.array([3e8]), np.array([1e10]))
        assert far[recipe, 0, 0] == pytest.approx(law(recipe, 3e8, 1e10), rel=1e-5)


def test_per_size_fit_recovers_law() -> None:
    found = fit_sizes(exact(), LENGTHS)
    assert found.exponent == pytest.approx(LAW["b"], rel=1e-3)
    assert found.irreducible == pytest.approx(LAW["E"] + LAW["A"] * SIZES ** -LAW["a"], rel=1e-3)
    assert found.equal_tokens(exact())[0] == pytest.approx(np.tile(LENGTHS, (3, 1)), rel=1e-4)
    expected = [[SAVED[r] * (size / MIDDLE) ** SLOPES[r] for size in SIZES] for r in range(3)]
    assert size_multipliers(found, exact(), LENGTHS) == pytest.approx(np.array(expected), rel=1e-3)


def test_joint_fit_robust_to_outlier() -> None:
    losses = exact()
    losses[0, 0, 0] += 0.3
    found = fit_joint(losses, SIZES, LENGTHS)
    assert found.multipliers(MIDDLE)[1:] == pytest.approx(SAVED[1:], rel=0.03)


def test_noisy_fit_bands_cover_truth() -> None:
    per_size, joint, inside = [], [], []
    for seed in range(3):
        found = analyze(ladder(0.004, seed=seed), np.ones((3, 3, 3, 2)), TARGET)
        truth = SAVED[2] / SAVED[0] * (SIZES[1] / MIDDLE) ** SLOPES[2]
        assert found["pairs"][1] == ["reference", "modern"]
        for law_of, hits in ((found["per_size"], per_size), (found["joint"], joint)):
            band = law_of["multipliers"][1][1]
            assert band["value"] == pytest.approx(truth, rel=0.15)
            hits.append(band["low"] <= truth <= band["high"])
        inside += [row["inside"] for row in found["joint"]["held_out"]]
        assert max(abs(row["error"]["value"]) for row in found["joint"]["held_out"]) < 0.05
    assert sum(per_size) >= 2
    assert sum(joint) >= 2
    assert np.mean(inside) >= 0.7


def test_pairing_seeds_narrows_bands() -> None:
    paired = ladder(0.004, seeds=3)
    values = paired.values.copy()
    values[2] = np.roll(values[2], 1, axis=-1)  # the same losses, paired with other seeds
    unpaired = Losses(paired.recipes, SIZES, LENGTHS, values)

    def difference(means: np.ndarray) -> dict[str, np.ndarray]:
        return {"difference": means[0] - means[2]}

    def width(losses: Losses) -> float:
        return float(np.mean([band["high"] - band["low"] for band in bands(losses, difference)["difference"].flat]))

    assert width(unpaired) > 2 * width(paired)


def test_single_seed_cell_borrows_spread() -> None:
    whole = ladder(0.004, seed=1)
    values = whole.values.copy()
    values[:, 2, :, 1] = np.nan  # the largest size has one seed
    partial = Losses(whole.recipes, SIZES, LENGTHS, values)
    assert partial.spreads().shape == (3, 12)
    assert partial.means[:, 2] == pytest.approx(values[:, 2, :, 0])
    assert np.isnan(partial.standard_errors[:, 2]).all()
    assert partial.standard_errors[0, 0, 0] == pytest.approx(values[0, 0, 0].std(ddof=1) / 2**0.5)

    def width(losses: Losses) -> float:
        found = bands(losses, lambda means: {"largest": means[:, 2]}, drop_sizes=False)["largest"]
        return float(np.mean([band["high"] - band["low"] for band in found.flat]))

    assert width(partial) > 1.2 * width(whole)  # one seed is less certain than the mean of two


def test_diverged_seed_makes_mean_nan() -> None:
    whole = ladder(0.004)
    values = whole.values.copy()
    values[1, 0, 0, 1] = np.inf
    losses = Losses(whole.recipes, SIZES, LENGTHS, values)
    assert np.isnan(losses.means[1, 0, 0])
    assert np.isfinite(losses.means).sum() == losses.means.size - 1
    assert np.isfinite(losses.spreads()).all()


def test_tokens_to_reach_interpolates_in_log_tokens() -> None:
    tokens, losses = np.array([1e6, 4e6, 16e6]), np.array([5.0, 4.0, 3.5])
    assert tokens_to_reach(4.5, tokens, losses) == pytest.approx(2e6)
    assert tokens_to_reach(3.75, tokens, losses) == pytest.approx(8e6)
    assert tokens_to_reach(5.0, tokens, losses) == 1e6
    assert tokens_to_reach(5.1, tokens, losses) == 0
    assert tokens_to_reach(3.4, tokens, losses) == np.inf
    assert np.isnan(tokens_to_reach(np.nan, tokens, losses))
    without_last = np.array([5.0, 4.0, np.nan])
    assert tokens_to_reach(4.5, tokens, without_last) == pytest.approx(2e6)
    assert np.isnan(tokens_to_reach(3.75, tokens, without_last))


def test_small_ladder_reports_missing_sizes_and_lengths() -> None:
    whole = ladder(0.0, seeds=1)
    two = Losses(whole.recipes, SIZES[:2], LENGTHS[:2], whole.values[:, :2, :2])
    found = analyze(two, np.ones((3, 2, 2, 1)), TARGET)
    text = describe_analysis(found)
    assert "needs 3 lengths, there are 2" in text
    assert "needs 3 sizes and 3 lengths, there are 2 and 2" in text
    assert "EXTRAPOLATION" not in text
    row = next(r for r in found["matches"] if (r["second"], r["tokens"], r["parameters"]) == ("modern", 1.6e6, 0.35e6))
    assert 1.4 < row["token_ratio"]["value"] < 1.7
    assert np.isnan(row["token_ratio"]["low"])  # one seed


def test_law_of_two_losses_not_counted() -> None:
    """Any exponent fits them, so that rounding would choose one."""
    whole = ladder(0.004)
    assert np.isnan(fit_sizes(whole.means[:, :1, :2], LENGTHS[:2]).amplitude).all()
    assert np.isfinite(fit_sizes(whole.means[:, :1], LENGTHS).amplitude).all()

    def laws(sizes: int, unit: float) -> dict[str, Any]:
        few = Losses(whole.recipes, SIZES[:sizes], LENGTHS / unit, whole.values[:, :sizes])
        return analyze(few, np.ones(few.values.shape), TARGET)["per_size"]

    # Without the first of two sizes, two losses of the second are left beside the held-out one.
    plain, in_thousands = (
        np.array([[list(band.values()) for band in pair] for pair in laws(2, unit)["multipliers"]])
        for unit in (1, 1000)
    )
    assert plain == pytest.approx(in_thousands, rel=1e-6)
    assert "needs 3 lengths, there are 2 (the largest rung is held out)" in laws(1, 1)["missing"]


def test_extrapolation_reports_distance() -> None:
    text = describe_analysis(analyze(ladder(0.002), np.ones((3, 3, 3, 2)), TARGET))
    assert "EXTRAPOLATION to lf-llm-269m, 320 times the largest N and 3.03k times the longest D" in text
    assert "published for Muon against a tuned AdamW at 300M: 1.2 to 1.3" in text
    assert "Not shown by a ladder" in text


def test_time_ratio_accounts_for_slower_recipe() -> None:
    seconds = np.ones((3, 3, 3, 2)) * LENGTHS[:, None]
    seconds[2] *= 1.25
    rows = analyze(ladder(0.0), seconds, TARGET)["matches"]
    for row in rows:
        slower = 1.25 if row["second"] == "modern" else 1.0
        assert row["time_ratio"]["value"] == pytest.approx(row["token_ratio"]["value"] / slower)


def test_band_limits_nan_without_seeds_and_sizes() -> None:
    one = Losses(("a", "b"), SIZES[:1], LENGTHS, exact()[:2, :1, :, None])
    (band,) = bands(one, lambda means: {"loss": means[0, 0, :1]})["loss"]
    assert np.isnan([band["low"], band["high"]]).all()
