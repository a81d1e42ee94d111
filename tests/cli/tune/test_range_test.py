"""`myllm tune --range-test`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_corpora

from myllm.cli.tune.range_test import (
    HIGHEST,
    SCHEDULE_STEPS,
    measure,
    rising_config,
    rising_rates,
    run_range_test,
    step_with_rate,
)
from myllm.config import RunConfig
from myllm.files import read_json
from myllm.optim.lr_schedule import learning_rate, rate_factor
from myllm.presets import get_preset


def test_measure_finds_steepest_descent() -> None:
    rates = rising_rates(400)
    # A loss that falls along a logistic curve around 1e-3 and explodes at 0.1.
    losses = 10 - 5 / (1 + (1e-3 / rates) ** 2) + np.where(rates > 0.1, (rates / 0.1) ** 3, 0)
    test = measure(losses, rates)
    assert 1e-3 < test.steepest < 2.5e-3  # the average lags behind
    assert test.guess == pytest.approx(test.steepest / 3)
    assert 0.1 < test.rates[-1] < 1, "it ends when the loss has risen"
    assert measure([5.0] * 50 + [float("nan")], rates).rates.shape == (50,)


def test_step_with_rate_matches_learning_rate() -> None:
    """Of both optimizers, in the ratio of the preset."""
    muon = get_preset("lf-llm-269m-modern")
    optim = rising_config(muon).optim
    for rate in (1e-5, 3e-3, HIGHEST):
        step = step_with_rate(rate)
        assert learning_rate(step, optim, SCHEDULE_STEPS) == pytest.approx(rate, rel=1e-3)
        both = optim.muon_lr * rate_factor(step, optim, SCHEDULE_STEPS)
        assert both / rate == pytest.approx(muon.optim.muon_lr / muon.optim.max_lr, rel=1e-3)


@pytest.mark.usefixtures("prepared_data")
def test_range_test_run(tiny: RunConfig, temp_data: Path) -> None:
    summary = run_range_test(replace(tiny, name="rising"), steps=60)
    assert "upper guess: optim.max_lr" in summary
    saved = read_json(temp_data / "tune/rising/range_test.json")
    assert saved["rates"][0] == pytest.approx(1e-5)
    assert min(saved["smooth"]) < saved["losses"][0] - 0.1
    assert (temp_data / "tune/rising/range_test.png").stat().st_size > 10_000
    assert not (temp_data / "runs").exists()


def test_range_test_on_mixture(tiny: RunConfig, tmp_path: Path) -> None:
    """Its length is that of the test, not of the schedule, which would read the text thousands of times."""
    a, b = write_corpora(tmp_path / "corpora", a=12, b=12)
    data = replace(tiny.data, source=f"{a}:0.5 {b}:0.5", val_tokens=300)
    assert "upper guess: optim.max_lr" in run_range_test(replace(tiny, name="mixed", data=data), steps=20)
