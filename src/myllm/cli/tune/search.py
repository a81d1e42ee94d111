"""The search: whole, decayed runs on three rungs, of which only finished ones are compared.

    sampled      runs of D/9 tokens: the preset's own values, points spread over the ranges, then Optuna's TPE
    promoted     the better third of them again with D/3 tokens, and the better third of those with D
    finalists    the best three of D once more on two fresh seeds

The preset's own values take part in every rung. A run is never stopped because of its loss in the middle: rankings
change while the rate decays. Values always mean those of a run of D tokens; `planning.transfer` carries them to a
shorter one.

Optuna's study, an SQLite file, keeps the points; the folders of the runs keep their results.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from myllm.cli.trials import recent_loss, run_trials
from myllm.config import RunConfig, to_dict
from myllm.errors import UserError, bullets, require
from myllm.paths import RunPaths
from myllm.planning.transfer import transfer
from myllm.presets import diff_settings

from .space import Parameter, own_values, spread_points, with_values

if TYPE_CHECKING:
    import optuna

ETA = 3
"""Each rung has this many times as many tokens as the one below, and a fraction 1 / ETA of its runs."""
RUNGS = ("d9", "d3", "d")
"""Ends of the names of runs, from D/9 to D tokens."""
TOP = len(RUNGS) - 1
SPREAD = 8
"""Sampled points that don't depend on earlier results, after the preset's own values."""
FINALISTS, FRESH_SEEDS = 3, 2
GIVE_UP_ABOVE = 0.5
"""A run is given up in its second half if its training loss is this much, in nats, above that of every finished run of
its rung after the same steps."""
GIVE_UP_FROM = 5
"""Finished runs of the rung that this needs."""


@dataclass(frozen=True)
class Plan:
    """What is searched, and how much of it."""

    config: RunConfig
    """Of the preset's own values, with D tokens."""
    parameters: list[Parameter]
    trials: int
    """Sampled points."""
    own_steps: int
    """The preset's own length."""

    @property
    def steps(self) -> list[int]:
        """Steps of a run, by rung."""
        full = self.config.train.max_steps
        return [max(round(full / ETA ** (TOP - rung)), 1) for rung in range(TOP + 1)]

    @property
    def counts(self) -> list[int]:
        """Runs by rung, without the finalists' fresh seeds."""
        counts = [self.trials]
        for _ in range(TOP):
            counts.append(promoted(counts[-1]))
        # The preset's own values come along, unless they are among the promoted.
        return [counts[0], *(min(count + 1, counts[0]) for count in counts[1:])]

    @property
    def final_runs(self) -> int:
        """Runs on fresh seeds, at most."""
        return FRESH_SEEDS * min(FINALISTS + 1, self.counts[TOP])

    @property
    def tokens(self) -> int:
        """Of all runs together, at most."""
        runs = sum(count * steps for count, steps in zip(self.counts, self.steps, strict=True))
        return (runs + self.final_runs * self.steps[TOP]) * self.config.train.batch_tokens


def promoted(count: int) -> int:
    """How many of a rung's runs are repeated on the next one: a third, but enough for the finalists."""
    return min(max(-(-count // ETA), FINALISTS), count)


@dataclass(frozen=True)
class TunedRun:
    """A run of the search, before its training or after it."""

    name: str
    number: int
    """Of the sampled point; 0 is the preset's own values."""
    values: dict[str, float]
    rung: int
    seed: int
    loss: float = math.inf
    """Final validation loss, in nats per token; infinite if the run diverged, was given up, or is not trained."""
    tokens: int = 0
    seconds: float = 0.0

    @property
    def group(self) -> tuple[int, int]:
        """Runs of one rung and one seed are compared."""
        return self.rung, self.seed


class Search:
    """Asks Optuna for points, and trains them."""

    def __init__(self, plan: Plan, folder: Path, jobs: int = 1) -> None:
        self.plan, self.folder, self.jobs = plan, folder, jobs
        self.study = open_study(plan, folder)
        self.runs: list[TunedRun] = []
        """Finished ones, in the order in which they ended."""
        self._seed = plan.config.train.seed

    def run(self) -> Iterator[TunedRun]:
        """Train what is left of the search; yields every run as it finishes, those of earlier starts too."""
        yield from self._train(self._sample())
        for rung in range(1, TOP + 1):
            below = self.of_rung(rung - 1)
            numbers = [run.number for run in ranked(below)][: promoted(len(below))]
            yield from self._train(self._point(number, rung, self._seed) for number in sorted({0, *numbers}))
        numbers = [run.number for run in ranked(self.of_rung(TOP))][:FINALISTS]
        seeds = [self._seed + 1 + index for index in range(FRESH_SEEDS)]
        yield from self._train(self._point(number, TOP, seed) for seed in seeds for number in sorted({0, *numbers}))

    def of_rung(self, rung: int) -> list[TunedRun]:
        """The finished runs of a rung, without those on fresh seeds."""
        return [run for run in self.runs if run.rung == rung and run.seed == self._seed]

    def config_of(self, run: TunedRun) -> RunConfig:
        """The run's own config: with its rung's tokens, and its values carried over to them."""
        config, steps = with_values(self.plan.config, run.values), self.plan.steps[run.rung]
        ratio = steps / self.plan.steps[TOP]
        optim = config.optim if run.rung == TOP else transfer(config.optim, ratio)
        train = replace(config.train, max_steps=steps, seed=run.seed)
        return replace(config, name=run.name, optim=optim, train=train)

    def _sample(self) -> Iterator[TunedRun]:
        """Points that were begun, then new ones."""
        import optuna

        waiting = optuna.trial.TrialState.WAITING
        begun = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state != waiting]
        for trial in begun[: self.plan.trials]:
            yield self._point(trial.number, 0, self._seed)
        ranges: dict[str, Any] = {
            p.name: optuna.distributions.FloatDistribution(*p.bounds) for p in self.plan.parameters
        }
        for index in range(len(begun), self.plan.trials):
            # A new one for each point, with a seed of its own, so that a restart does not draw the same numbers again.
            self.study.sampler = optuna.samplers.TPESampler(
                multivariate=True, n_startup_trials=1, constant_liar=self.jobs > 1, seed=self._seed + index
            )
            trial_number = self.study.ask(ranges).number
            yield self._point(trial_number, 0, self._seed)

    def _point(self, number: int, rung: int, seed: int) -> TunedRun:
        at = self.study.get_trials(deepcopy=False)[number].params
        values = {parameter.name: parameter.value_at(at[parameter.name]) for parameter in self.plan.parameters}
        again = "" if seed == self._seed else f"-seed{seed}"
        name = f"tune-{self.plan.config.name}-{number:03d}-{RUNGS[rung]}{again}"
        return TunedRun(name, number, values, rung, seed)

    def _train(self, runs: Iterable[TunedRun]) -> Iterator[TunedRun]:
        by_name: dict[str, TunedRun] = {}

        def configs() -> Iterator[RunConfig]:
            for run in runs:
                by_name[run.name] = run
                yield self.config_of(run)

        with closing(run_trials(configs(), self.jobs, self._give_up_above)) as results:
            for result in results:
                run = replace(by_name[result.name], loss=result.loss, tokens=result.tokens, seconds=result.seconds)
                self.runs.append(run)
                if run.rung == 0:
                    # To the sampler, a run that diverged knows nothing: the loss of guessing.
                    loss = run.loss if math.isfinite(run.loss) else math.log(self.plan.config.model.vocab_size)
                    self.study.tell(run.number, loss, skip_if_finished=True)
                yield run

    def _give_up_above(self, config: RunConfig, step: int) -> float:
        rung = self.plan.steps.index(config.train.max_steps)
        finished = [run for run in self.runs if run.rung == rung and math.isfinite(run.loss)]
        if len(finished) < GIVE_UP_FROM:
            return math.inf
        losses = [recent_loss(RunPaths.of(run.name), step)[1] for run in finished]
        return max(filter(math.isfinite, losses), default=math.inf) + GIVE_UP_ABOVE


def ranked(runs: Iterable[TunedRun]) -> list[TunedRun]:
    """Best first."""
    return sorted(runs, key=lambda run: (run.loss, run.number))


def open_study(plan: Plan, folder: Path) -> "optuna.Study":
    """The study in a folder, or a new one whose first points are enqueued.

    Raises:
        UserError: it has other settings, or Optuna is not installed.
    """
    optuna = require("`myllm tune`", "tune", "optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'study.db'}")
    study = optuna.create_study(storage=storage, study_name=plan.config.name, load_if_exists=True)
    described = {"config": to_dict(plan.config), "search": [asdict(parameter) for parameter in plan.parameters]}
    if "plan" in study.user_attrs:
        _check_same(study.user_attrs["plan"], described, folder)
        return study
    own = own_values(plan.config, plan.parameters)
    study.enqueue_trial({p.name: p.coordinate(own[p.name]) for p in plan.parameters}, skip_if_exists=True)
    for shares in spread_points(SPREAD, len(plan.parameters)):
        point = zip(plan.parameters, shares, strict=True)
        at = {p.name: p.bounds[0] + share * (p.bounds[1] - p.bounds[0]) for p, share in point}
        study.enqueue_trial(at, skip_if_exists=True)
    study.set_user_attr("plan", described)
    return study


def _check_same(saved: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    from myllm.config import saved_config

    different = diff_settings(*(saved_config(plan["config"], folder) for plan in (saved, wanted)))
    changes = [f"{name}: {old} -> {new}" for name, (old, new) in different.items()]
    if saved["search"] != wanted["search"]:
        changes.append(f"--search: {saved['search']} -> {wanted['search']}")
    if changes:
        raise UserError(
            f"the search in {folder} has other settings:\n{bullets(changes)}\n"
            "give the same ones to continue it, or another --name to begin one"
        )
