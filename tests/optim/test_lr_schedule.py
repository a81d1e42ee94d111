"""The learning rate against tables made by hand."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.config import OptimConfig
from myllm.optim.lr_schedule import learning_rate, rate_factor
from myllm.planning.forecast import Hardware, describe, parse_hardware, predict
from myllm.planning.length import decay_note, decay_start, warmup_note
from myllm.presets import get_preset

TEN = OptimConfig(max_lr=10.0, min_lr_ratio=0.1, warmup_steps=4, schedule="linear", decay_fraction=0.25)


def rates(config: OptimConfig, max_steps: int, steps: list[int]) -> list[float]:
    return [learning_rate(step, config, max_steps) for step in steps]


@pytest.mark.parametrize(
    ("changes", "table"),
    [
        # 4 steps of warm-up, then 16 of decay to 1.0 at step 20 and ever after.
        ({}, {0: 2.5, 1: 5.0, 2: 7.5, 3: 10.0, 4: 10.0, 8: 7.75, 12: 5.5, 16: 3.25, 19: 1.5625, 20: 1.0, 99: 1.0}),
        # cos(0), cos(60 degrees at a third)..., at a quarter of the way (1 + cos 45) / 2 = 0.853553.
        ({"schedule": "cosine"}, {3: 10.0, 4: 10.0, 8: 8.681981, 12: 5.5, 16: 2.318019, 20: 1.0, 99: 1.0}),
        # Level to step 15, then 5 steps down.
        ({"schedule": "wsd"}, {3: 10.0, 4: 10.0, 14: 10.0, 15: 10.0, 16: 8.2, 17: 6.4, 19: 2.8, 20: 1.0, 99: 1.0}),
        # 8 steps down from step 12: at 1/4, 1/2 and 3/4 of them (1 + cos) / 2 is 0.853553, 0.5 and 0.146447.
        (
            {"schedule": "wsd", "decay_fraction": 0.4, "decay_shape": "cosine"},
            {4: 10.0, 12: 10.0, 14: 8.681981, 16: 5.5, 18: 2.318019, 20: 1.0, 99: 1.0},
        ),
        # 1 - sqrt of 1/8, 1/4, 1/2, 9/16 and 1 of the way: 0.646447, 0.5, 0.292893, 0.25 and 0.
        (
            {"schedule": "wsd", "decay_fraction": 0.8, "decay_shape": "sqrt", "min_lr_ratio": 0.0},
            {3: 10.0, 4: 10.0, 6: 6.464466, 8: 5.0, 12: 2.928932, 13: 2.5, 20: 0.0, 99: 0.0},
        ),
        ({"schedule": "wsd", "decay_fraction": 0.0}, {4: 10.0, 19: 10.0, 20: 10.0, 99: 10.0}),
        # Decay over all steps begins where the warm-up ends, with no jump there.
        ({"schedule": "wsd", "decay_fraction": 1.0}, {3: 10.0, 4: 10.0, 12: 5.5, 20: 1.0, 99: 1.0}),
        ({"warmup_steps": 0}, {0: 10.0, 10: 5.5, 20: 1.0}),
        ({"warmup_steps": 1}, {0: 10.0, 1: 10.0, 20: 1.0}),
        ({"min_lr_ratio": 0.0}, {4: 10.0, 12: 5.0, 20: 0.0, 21: 0.0}),
        ({"min_lr_ratio": 1.0}, {0: 2.5, 4: 10.0, 12: 10.0, 20: 10.0}),
        # A warm-up as long as the run, or longer, is cut to a quarter of it: 5 steps up, then 15 down.
        ({"warmup_steps": 20}, {0: 2.0, 4: 10.0, 5: 10.0, 20: 1.0}),
        ({"warmup_steps": 40}, {0: 2.0, 4: 10.0, 5: 10.0, 20: 1.0}),
        ({"warmup_steps": 40, "schedule": "wsd"}, {0: 2.0, 4: 10.0, 14: 10.0, 15: 10.0, 20: 1.0}),
    ],
    ids=str,
)
def test_rates_match_tables(changes, table):
    config = replace(TEN, **changes)
    assert rates(config, 20, list(table)) == pytest.approx(list(table.values()), abs=1e-6)


@given(
    schedule=st.sampled_from(["cosine", "linear", "wsd"]),
    shape=st.sampled_from(["linear", "cosine", "sqrt"]),
    max_steps=st.integers(1, 300),
    warmup_steps=st.integers(0, 320),
    decay_fraction=st.floats(0, 1),
    min_lr_ratio=st.floats(0, 1),
)
def test_rate_rises_then_falls_within_bounds(schedule, shape, max_steps, warmup_steps, decay_fraction, min_lr_ratio):
    config = OptimConfig(
        max_lr=3e-3, schedule=schedule, warmup_steps=warmup_steps, decay_fraction=decay_fraction, decay_shape=shape,
        min_lr_ratio=min_lr_ratio,
    )  # fmt: skip
    assert_muon_follows(config, max_steps)
    start = decay_start(config, max_steps)
    assert all(rate == 3e-3 for rate in rates(config, max_steps, list(range(min(warmup_steps, max_steps // 4), start))))
    every = rates(config, max_steps, list(range(max_steps + 3)))
    warmup = min(warmup_steps, max_steps // 4)
    up, down = every[:warmup], every[warmup:]
    assert up == sorted(up)
    assert len(set(up)) == len(up)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(down))
    assert all(0 <= rate <= 3e-3 * (1 + 1e-12) for rate in every)
    if up:
        assert up[0] > 0
    if len(down) > 3 and schedule != "wsd":  # it ends where it should
        assert down[-1] == pytest.approx(3e-3 * min_lr_ratio, abs=1e-15)


def assert_muon_follows(config: OptimConfig, max_steps: int) -> None:
    for step in range(max_steps + 2):
        factor = rate_factor(step, config, max_steps)
        assert 0 <= factor <= 1
        assert learning_rate(step, config, max_steps) == config.max_lr * factor


@given(shape=st.sampled_from(["linear", "cosine"]), fraction=st.floats(0.1, 1), scale=st.integers(1, 20))
def test_decay_is_continuous(shape, fraction, scale):
    """Continuous: with more steps, the largest change between two is smaller. A cosine is at most pi / 2 as steep."""
    config = OptimConfig(max_lr=1.0, min_lr_ratio=0, warmup_steps=0, schedule="wsd", decay_shape=shape)
    config = replace(config, decay_fraction=fraction)
    every = rates(config, 100 * scale, list(range(100 * scale + 2)))
    steepest = max(before - after for before, after in pairwise(every))
    assert steepest <= 1.5708 / (fraction * 100 * scale) + 1e-9
    assert every[-1] == 0


@pytest.mark.parametrize("max_steps", [100, 10_000])
def test_sqrt_decay_is_steepest_first(max_steps):
    """Below the line everywhere; half of the rate is gone after a quarter of the decay."""
    sqrt, line = (
        rates(replace(TEN, schedule="wsd", decay_fraction=0.8, decay_shape=shape), max_steps, list(range(max_steps)))
        for shape in ("sqrt", "linear")
    )
    assert all(s <= x for s, x in zip(sqrt, line, strict=True))
    assert sqrt[max_steps * 4 // 10] == pytest.approx(5.5)  # 1 + 9 / 2
    changes = [before - after for before, after in pairwise(sqrt[max_steps // 5 :])]
    assert changes == sorted(changes, reverse=True)


@given(warmup_steps=st.integers(1, 50), schedule=st.sampled_from(["cosine", "linear", "wsd"]))
def test_warmup_end_is_continuous(warmup_steps, schedule):
    config = OptimConfig(max_lr=1.0, schedule=schedule, warmup_steps=warmup_steps, decay_fraction=1.0)
    assert rates(config, 200, [warmup_steps - 1, warmup_steps]) == [1.0, 1.0]


def test_reference_run_rates():
    """LF_LLM-269M: peak 0.0021 after 226 steps, 10 % of it at the end of 19,073."""
    config = get_preset("lf-llm-269m")
    every = rates(config.optim, config.train.max_steps, list(range(19_073)))
    assert len(every) == 19_073
    assert every[0] == pytest.approx(0.0021 / 226)
    assert max(every) == every[225] == pytest.approx(0.0021)
    assert every[-1] == pytest.approx(0.00021, rel=1e-6)
    halfway = 226 + (19_073 - 226) // 2
    assert every[halfway] == pytest.approx(0.0021 * 0.55, rel=1e-3)


def test_shortened_warmup_is_reported():
    config = get_preset("small-50m")
    assert warmup_note(config) is None
    short = replace(config, train=replace(config.train, max_steps=100))
    assert max(rates(short.optim, 100, list(range(100)))) == rates(short.optim, 100, [24])[0] == short.optim.max_lr
    note = "warm-up takes 25 steps instead of optim.warmup_steps 40: at most a quarter of train.max_steps 100"
    assert warmup_note(short) == note
    assert note in describe(predict(short, Hardware(1)))
    assert note in describe(predict(short, parse_hardware("H100")))


def test_wsd_decay_start_is_reported():
    config = get_preset("small-50m")
    assert decay_note(config) is None
    config = replace(config, optim=replace(config.optim, schedule="wsd", decay_fraction=0.4))
    note = (
        "the learning rate decays from step 12,000 on; until then --train.max-steps lengthens the run, later only from "
        "a checkpoint of that time"
    )
    assert decay_note(config) == f"{note} (--train.keep-every-steps 12000 keeps one)"
    assert note in describe(predict(config, Hardware(1)))
    for kept in ({"keep_last": 0}, {"keep_every_steps": 5_000}):
        assert decay_note(replace(config, train=replace(config.train, **kept))) == note
    assert decay_note(replace(config, optim=replace(config.optim, decay_fraction=0.0))) is None
