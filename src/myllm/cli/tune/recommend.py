"""What a search recommends: decided by fresh seeds only, and against the preset's own values."""

import shlex
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from myllm.config import RunConfig
from myllm.planning.transfer import transfer
from myllm.presets import nearest_preset

from .search import FRESH_SEEDS, TOP, Search, TunedRun
from .space import with_values


@dataclass(frozen=True)
class Recommendation:
    """The best finalist."""

    number: int
    """Of the sampled point; 0 is the preset's own values."""
    values: dict[str, float]
    loss: float
    """Mean over the fresh seeds."""
    gains: list[float]
    """Loss of the preset's own values minus that of these, by fresh seed, in nats; empty for the preset itself."""

    @property
    def is_better(self) -> bool:
        return bool(self.gains) and min(self.gains) > 0

    @property
    def is_doubtful(self) -> bool:
        return max(self.gains) - min(self.gains) > fmean(self.gains)

    def sentence(self) -> str:
        if not self.gains:
            return "Keep the preset's own values: on fresh seeds they are the best."
        gains = " and ".join(f"{gain:+.4f}" for gain in self.gains)
        if self.is_better:
            doubt = " The seeds differ by more than the gain: it may be noise." if self.is_doubtful else ""
            return f"Better than the preset's own values on every fresh seed, by {gains} nats.{doubt}"
        return f"Keep the preset's own values: against them the best finalist gains {gains} nats, which is noise."


def recommend(search: Search) -> Recommendation | None:
    """The finalist with the lowest mean loss over the fresh seeds; None until they are trained.

    The seed that a finalist was chosen by does not count: of many noisy losses, the lowest is too low by about two
    standard deviations.
    """
    runs = fresh_runs(search)
    if 0 not in runs or any(len(by_seed) < FRESH_SEEDS for by_seed in runs.values()):
        return None
    best = min(runs, key=lambda number: (mean_loss(runs[number]), number))
    gains = [] if best == 0 else [runs[0][seed].loss - runs[best][seed].loss for seed in sorted(runs[best])]
    return Recommendation(best, next(iter(runs[best].values())).values, mean_loss(runs[best]), gains)


def fresh_runs(search: Search) -> dict[int, dict[int, TunedRun]]:
    """The finalists' runs on fresh seeds, by the number of the point and by seed."""
    runs: dict[int, dict[int, TunedRun]] = defaultdict(dict)
    for run in search.runs:
        if run.rung == TOP and run.seed != search.plan.config.train.seed:
            runs[run.number][run.seed] = run
    return runs


def mean_loss(by_seed: Mapping[int, TunedRun]) -> float:
    return fmean(run.loss for run in by_seed.values())


def commands(search: Search, values: dict[str, float]) -> dict[str, str]:
    """Command lines that train with these values: for D tokens and, if that is another length, for the preset's own."""
    plan = search.plan
    config = with_values(plan.config, {name: float(f"{value:.3g}") for name, value in values.items()})
    found = {f"{config.train.max_steps * config.train.batch_tokens:,} tokens, as searched": command_line(config)}
    if plan.own_steps != config.train.max_steps:
        carried = transfer(with_values(plan.config, values).optim, plan.own_steps / config.train.max_steps)
        changed = ["max_lr", "weight_decay", *(["muon_lr"] if config.optim.optimizer == "muon" else [])]
        own = {name: float(f"{getattr(carried, name):.3g}") for name in changed}
        longer = with_values(replace(config, train=replace(config.train, max_steps=plan.own_steps)), own)
        tokens = plan.own_steps * config.train.batch_tokens
        found[f"{tokens:,} tokens, carried over by the rule"] = command_line(longer)
    return found


def command_line(config: RunConfig) -> str:
    """The shortest command of pretrain.py that trains this config: the nearest preset and what differs from it."""
    preset, changes = nearest_preset(config)
    options = [word for name, (_, value) in changes.items() for word in _option(name, value)]
    return shlex.join(["python", "pretrain.py", preset, *options, "--name", f"{config.name}-tuned"])


def _option(setting: str, value: Any) -> list[str]:
    section, _, name = setting.partition(".")
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{section}.{name}" if value else f"--{section}.no-{name}"]
    words = value if isinstance(value, tuple) else (value,)
    return [f"--{section}.{name}", *(f"{word:.6g}" if isinstance(word, float) else str(word) for word in words)]
