"""The gradient guard: which updates are skipped, by running statistics of the gradient norm."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from myllm.checkpoint.state import SkipStats, TrainState
from myllm.config import RunConfig, TrainConfig
from myllm.data.sampler import DataPosition
from myllm.distributed.collectives import process_group
from myllm.planning.batch import batch_plan
from myllm.training import gradient_guard as guard
from myllm.training.gradient_guard import GradientGuard
from myllm.training.step import accumulate_gradients

CPU = torch.device("cpu")


def judged(config: TrainConfig, norms: list[float], skips: SkipStats | None = None) -> tuple[list[int], SkipStats]:
    watch, state = GradientGuard(config, CPU, skips), TrainState(0, 0, DataPosition(0, 0, 0, ""))
    verdicts = []
    for norm in norms:
        watch.record(state)
        verdicts.append(int(watch.check(torch.tensor(norm))))
    return verdicts, watch.sync()


def by_hand(norms: list[float], sigma: float) -> tuple[list[int], float, float]:
    """The same rule in plain float64: mean and variance of what was seen, old steps fading."""
    mean = variance = 0.0
    verdicts, n = [], 0
    for norm in norms:
        if not math.isfinite(norm):
            verdicts.append(1)
            continue
        value = math.log(norm)
        ceiling = mean + sigma * max(math.sqrt(variance), guard.MIN_DEVIATION)
        spike = n >= guard.WARMUP_STEPS and value > ceiling
        verdicts.append(int(spike))
        value = ceiling if spike else value
        share = max(1 / (n + 1), 1 / guard.MEMORY_STEPS)
        # Variance of the mixture of the old distribution and the new point.
        new = (1 - share) * mean + share * value
        variance = (1 - share) * (variance + (mean - new) ** 2) + share * (value - new) ** 2
        mean, n = new, n + 1
    return verdicts, mean, variance


def test_spike_detection_matches_reference_statistics() -> None:
    chance = np.random.default_rng(3)
    norms = np.exp(chance.normal(0.0, 0.15, 600) + np.linspace(2.0, 0.0, 600)).tolist()
    norms[20] *= 3  # in the warm-up
    for place in (200, 201, 450):
        norms[place] *= 30
    norms[300], norms[301] = math.nan, math.inf
    config = TrainConfig(on_nonfinite="skip", skip_spikes_sigma=6.0)
    verdicts, skips = judged(config, norms)
    expected, mean, variance = by_hand(norms, 6.0)
    assert verdicts == expected
    assert [place for place, verdict in enumerate(verdicts) if verdict] == [200, 201, 300, 301, 450]
    assert (skips.spikes, skips.nonfinite, skips.consecutive, skips.norm_count) == (3, 2, 0, 598)
    assert skips.log_norm_mean == pytest.approx(mean, rel=1e-4)
    assert skips.log_norm_variance == pytest.approx(variance, rel=1e-3)
    first, middle = judged(config, norms[:251])  # a restart changes nothing, to the last bit
    second, end = judged(config, norms[251:], middle)
    assert (first + second, end) == (verdicts, skips)
    assert judged(TrainConfig(), norms[:300])[0] == [0] * 300  # off


def test_persistent_norm_increase_is_accepted_eventually() -> None:
    """Were spikes kept out of the statistics, every later update would be skipped."""
    verdicts, _ = judged(TrainConfig(skip_spikes_sigma=6.0, max_skipped_steps=100), [1.0] * 100 + [3.0] * 100)
    assert verdicts[100] == 1
    assert verdicts[-50:] == [0] * 50


def test_updates_after_divergence_are_skipped() -> None:
    verdicts, skips = judged(TrainConfig(), [1.0, math.nan, 1.0, math.inf, 1.0])
    assert verdicts == [0, 1, 1, 1, 1]
    assert (skips.nonfinite, skips.norm_count) == (1, 1)


@pytest.mark.parametrize(
    ("norm", "scale", "changed"),
    [
        (1.0, 4.0, {"norm_count": 101, "consecutive": 0}),
        (9.0, 4.0, {"norm_count": 101, "spikes": 1, "consecutive": 3}),
        (math.nan, 4.0, {"overflows": 1}),
        (math.inf, 1.0, {"nonfinite": 1, "consecutive": 3}),
    ],
)
def test_counts_follow_the_table_of_verdicts(norm: float, scale: float, changed: dict[str, int]) -> None:
    """The docstring of `check`, row by row; once the run is stopped, no norm changes anything."""
    config = TrainConfig(precision="float16", on_nonfinite="skip", skip_spikes_sigma=6.0, max_skipped_steps=2)
    start = SkipStats(consecutive=2, norm_count=100, loss_scale=scale)
    verdicts, skips = judged(config, [norm], start)
    names = ("nonfinite", "spikes", "consecutive", "norm_count", "overflows")
    assert {name: getattr(skips, name) for name in names if getattr(skips, name) != getattr(start, name)} == changed
    assert verdicts == [int(norm != 1.0)]
    if changed.get("consecutive") == 3:
        for after in (1.0, 9.0, math.nan):
            assert judged(config, [norm, after], start) == ([1, 1], skips)


def test_nonfinite_loss_makes_gradients_nan(tiny: RunConfig) -> None:
    """Minus infinity as the logit of a target gives an infinite loss with a gradient that looks sound."""

    class Infinite(nn.Linear):
        def forward(self, tokens: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens).sum() + math.inf

    class Batches:
        def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.ones(1, 3), torch.ones(1, 3)

    layer = Infinite(3, 1)
    with process_group("cpu") as process:
        loss = accumulate_gradients(layer, Batches(), batch_plan(tiny, 1), tiny, process.device)
    assert loss == math.inf
    assert layer.weight.grad.isnan().all()
