"""`myllm tune PRESET --range-test`: one run whose rate rises, for a first guess of the largest useful one.

Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks" (arXiv 1506.01186), and its common form with
an exponential rise and a smoothed loss.
"""

import math
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from myllm.config import RunConfig
from myllm.errors import UserError
from myllm.files import json_safe, write_json
from myllm.migrations import TUNE
from myllm.paths import RunPaths, tune_dir

if TYPE_CHECKING:
    from myllm.data.dataset import Dataset
    from myllm.distributed.collectives import DistContext

LOWEST, HIGHEST = 1e-5, 1.0
STEPS = 200
SMOOTHING = 0.95
"""Decay rate of the moving average of the loss."""
DIVERGED = 1.5
"""The test ends when the average loss is this many times its lowest."""
SAFETY = 3.0
SCHEDULE_STEPS = 10**9
"""Length of a schedule that falls by a billionth each step. Its steps are taken in an order in which the rate rises."""
CAVEAT = (
    "It sees neither the decay of the rate nor that of the weights, so it is an upper guess for a search and no "
    "replacement of one."
)


@dataclass(frozen=True)
class RangeTest:
    """The steps of a range test. Shapes: (steps,)"""

    rates: np.ndarray
    losses: np.ndarray
    smooth: np.ndarray
    """Moving average of the losses."""

    @property
    def steepest(self) -> float:
        """The rate at which the average loss falls fastest, by the logarithm of the rate."""
        slope = np.gradient(self.smooth, np.log(self.rates))
        until = int(np.argmin(self.smooth)) + 1
        return float(self.rates[int(np.argmin(slope[:until]))])

    @property
    def guess(self) -> float:
        return self.steepest / SAFETY


def run_range_test(config: RunConfig, steps: int = STEPS) -> str:
    """Train with a rising rate on one device; write range_test.json and a figure, and return the result in words."""
    from myllm.data.prepare.background import prepare_in_background
    from myllm.distributed.collectives import process_group

    folder = tune_dir(config.name)
    with (
        prepare_in_background(config.data, True) as dataset,
        process_group(config.train.device) as dist,
        closing(train_rising(config, dataset, dist, steps)) as losses,
    ):
        test = measure(losses, rising_rates(steps))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "range_test.json", TUNE.stamp(json_safe({
        "rates": test.rates.tolist(), "losses": test.losses.tolist(), "smooth": test.smooth.tolist(),
        "steepest": test.steepest, "guess": test.guess,
    })))  # fmt: skip
    from myllm.runs.report.page import save_figure

    from .plots import draw_range_test

    figure = folder / "range_test.png"
    save_figure(draw_range_test(test), figure)
    lines = [
        f"the loss falls fastest at a rate of {test.steepest:.2g}; a third of that is an upper guess: optim.max_lr "
        f"{test.guess:.2g}"
    ]
    if config.optim.optimizer == "muon":
        both = test.guess * config.optim.muon_lr / config.optim.max_lr
        lines.append(f"with optim.muon_lr {both:.2g}: both rates rose together, in the ratio of the preset")
    return "\n".join([*lines, CAVEAT, f"plot  {figure}"])


def rising_rates(steps: int) -> np.ndarray:
    """Shapes: (steps,)"""
    return np.geomspace(LOWEST, HIGHEST, steps)


def step_with_rate(rate: float) -> int:
    """The step of the schedule, which falls from HIGHEST to 0, whose rate this is."""
    return round(SCHEDULE_STEPS * (1 - rate / HIGHEST))


def rising_config(config: RunConfig) -> RunConfig:
    """The config with a linear schedule from HIGHEST to 0, on which `step_with_rate` finds any rate."""
    optim = replace(
        config.optim, max_lr=HIGHEST, muon_lr=HIGHEST * config.optim.muon_lr / config.optim.max_lr, schedule="linear",
        min_lr_ratio=0.0, warmup_steps=0, muon_momentum_warmup_steps=0,
    )  # fmt: skip
    train = replace(config.train, max_steps=SCHEDULE_STEPS, epochs=None, max_epochs=math.inf)  # it ends long before
    return replace(config, optim=optim, train=train)


def train_rising(
    config: RunConfig, dataset: "Dataset", dist: "DistContext", steps: int
) -> Generator[float, None, None]:
    """The loss of each training step, whose rates are `rising_rates`."""
    from myllm.training.setup import RunContext, build, resolve_config
    from myllm.training.step import train_step

    config = resolve_config(rising_config(config), dataset, dist)
    paths = RunPaths(tune_dir(config.name) / "range-test")  # without a checkpoint, so that it begins at step 0
    with build(RunContext.create(config, dist, paths, log=lambda line: None), dataset) as (trainer, state):
        for rate in rising_rates(steps):
            trainer.guard.record(state)
            loss, _, _ = train_step(trainer, step_with_rate(float(rate)))
            trainer.guard.sync()
            yield loss.item()


def measure(losses: Iterable[float], rates: np.ndarray) -> RangeTest:
    """Follow the losses until they rise or are not finite.

    Raises:
        UserError: they did so at once.
    """
    seen: list[float] = []
    smooth: list[float] = []
    average = 0.0
    for loss in losses:
        if not math.isfinite(loss):
            break
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        seen.append(loss)
        smooth.append(average / (1 - SMOOTHING ** len(seen)))  # without the bias towards the first average, 0
        if smooth[-1] > DIVERGED * min(smooth):
            break
    if len(seen) < 10:
        raise UserError(
            f"the loss diverged after {len(seen)} steps of the range test, at a rate of {rates[len(seen)]:.2g}"
        )
    return RangeTest(rates[: len(seen)], np.array(seen), np.array(smooth))
