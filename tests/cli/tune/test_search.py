"""`myllm tune`: the search, with a loss from a formula in place of training."""

import html
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from myllm.cli import main as cli
from myllm.cli.trials import TrialResult
from myllm.cli.tune.fit import fit_parabolas
from myllm.cli.tune.recommend import commands, recommend
from myllm.cli.tune.search import Plan, Search, TunedRun
from myllm.cli.tune.space import Parameter, default_search, parse_search, spread_points
from myllm.config import RunConfig
from myllm.errors import UserError
from myllm.presets import get_preset

BEST_RATE, BEST_DECAY = 8e-3, 0.15
FULL = 900
"""Steps of the longest runs."""


def plan_of(trials: int = 12, low: float = 1e-3, high: float = 3e-2) -> Plan:
    debug = get_preset("debug")
    config = replace(debug, train=replace(debug.train, max_steps=FULL))
    parameters = [Parameter("max_lr", low, high), Parameter("weight_decay", 0.02, 0.5)]
    return Plan(config, parameters, trials, debug.train.max_steps)


def loss_of(config: RunConfig, noise: float = 0.0) -> float:
    """A valley whose bottom moves with the tokens by the published rule; rates that are too high diverge."""
    ratio = config.train.max_steps / FULL
    rate, decay = BEST_RATE * ratio**-0.32, BEST_DECAY / ratio**0.68
    if config.optim.max_lr > 3 * rate:
        return math.inf
    valley = (
        0.5 * math.log10(config.optim.max_lr / rate) ** 2 + 0.2 * math.log10(config.optim.weight_decay / decay) ** 2
    )
    return 4 + 0.2 * ratio**-0.4 + valley + random.Random(config.name).gauss(0, noise)


def in_place_of_training(
    monkeypatch: pytest.MonkeyPatch,
    noise: float = 0.0,
    killed_after: float = math.inf,
    finished: dict[str, TrialResult] | None = None,
) -> list[RunConfig]:
    """Replace training by `loss_of`; returns the list of trained configs. It raises after some of them.

    Args:
        finished: results of earlier starts, by name, as the run folders keep them.
    """
    trained: list[RunConfig] = []
    results = {} if finished is None else finished

    def run_trials(
        configs: Iterable[RunConfig], jobs: int, limit: Callable[[RunConfig, int], float]
    ) -> Iterator[TrialResult]:
        for config in configs:
            if config.name not in results:
                if len(trained) >= killed_after:
                    raise KeyboardInterrupt
                trained.append(config)
                assert limit(config, 1) == math.inf
                tokens = config.train.max_steps * config.train.batch_tokens
                results[config.name] = TrialResult(config.name, loss_of(config, noise), tokens, 1.0)
            yield results[config.name]

    monkeypatch.setattr("myllm.cli.tune.search.run_trials", run_trials)
    return trained


def test_search_finds_optimum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = in_place_of_training(monkeypatch, noise=0.002)
    search = Search(plan_of(trials=18), tmp_path)
    runs = list(search.run())
    assert len(runs) == len(trained) == len({config.name for config in trained})
    # 18 runs of D/9, 6 or 7 of D/3, 3 or 4 of D, then the finalists and the preset on two fresh seeds.
    assert [config.train.max_steps for config in trained[:18]] == [100] * 18
    counts = [len(search.of_rung(rung)) for rung in range(3)]
    assert counts[0] == 18
    assert counts[1] in (6, 7)
    assert counts[2] in (3, 4)
    fresh = [config for config in trained if config.train.seed != search.plan.config.train.seed]
    assert {config.train.seed for config in fresh} == {1338, 1339}
    assert {config.train.max_steps for config in fresh} == {FULL}
    # The first run has the preset's values, carried over to its tokens by the rule.
    assert trained[0].optim.max_lr == pytest.approx(5e-3 * 9**0.32)
    assert trained[0].optim.weight_decay == pytest.approx(0.1 * 9**0.68)
    assert any(run.loss == math.inf for run in runs), "the range should reach into divergence"

    best = recommend(search)
    assert best
    assert best.is_better
    assert best.values["max_lr"] == pytest.approx(BEST_RATE, rel=0.4)
    parabolas = fit_parabolas(search.runs, search.plan.parameters)
    for name, expected in (("max_lr", BEST_RATE), ("weight_decay", BEST_DECAY)):
        parabola = parabolas[name]
        assert parabola.optimum == pytest.approx(expected, rel=0.2)
        assert parabola.low < parabola.optimum < parabola.high
        assert "optimum" in parabola.verdict


def test_killed_search_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of_training(monkeypatch)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = [(run.name, run.values, run.loss) for run in Search(plan_of(), tmp_path / "whole").run()]
    names: list[str] = []
    finished: dict[str, TrialResult] = {}
    for _ in range(100):
        trained = in_place_of_training(monkeypatch, killed_after=5, finished=finished)
        try:
            runs = list(Search(plan_of(), tmp_path / "killed").run())
        except KeyboardInterrupt:
            names += [config.name for config in trained]
        else:
            break
    names += [config.name for config in trained]
    assert len(names) == len(set(names)) == len(whole), "each run is trained once"
    assert [(run.name, run.values, run.loss) for run in runs] == whole
    config = plan_of().config
    deeper = replace(plan_of(), config=replace(config, model=replace(config.model, n_layers=5)))
    with pytest.raises(UserError, match=r"(?s)other settings.*model.n_layers: 4 -> 5.*--name"):
        Search(deeper, tmp_path / "killed")
    with pytest.raises(UserError, match="--search"):
        Search(plan_of(high=0.1), tmp_path / "killed")


def runs_on(losses: Callable[[float], float], parameter: Parameter, count: int = 12) -> list[TunedRun]:
    low, high = parameter.bounds
    values = [parameter.value_at(low + (high - low) * index / (count - 1)) for index in range(count)]
    chance = random.Random(0)
    return [
        TunedRun(
            str(index),
            index,
            {parameter.name: value},
            0,
            0,
            losses(value) + chance.gauss(0, 0.01),
        )
        for index, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("best", "depth", "pattern"),
    [(3e-3, 1.0, "optimum 0.003"), (3e-3, 0.01, "flat: "), (1.0, 1.0, "at the edge of the range: .* towards 0.01")],
)
def test_verdicts(best: float, depth: float, pattern: str) -> None:
    parameter = Parameter("max_lr", 1e-3, 1e-2)
    runs = runs_on(lambda value: 3 + depth * math.log10(value / best) ** 2, parameter)
    (parabola,) = fit_parabolas(runs, [parameter]).values()
    assert re.match(pattern, parabola.verdict), parabola.verdict


def test_two_runs_fit_no_parabola() -> None:
    parameter = Parameter("max_lr", 1e-3, 1e-2)
    assert fit_parabolas(runs_on(lambda value: 3.0, parameter, count=2), [parameter]) == {}


def test_scales() -> None:
    beta, rate, offset = parse_search(("optim.beta2=0.9:0.999", "optim.max-lr=0.001:0.01", "optim.weight-decay=0:0.2"))
    assert beta.bounds == pytest.approx((-3, -1))
    assert beta.value_at(-2) == pytest.approx(0.99)
    assert rate.value_at(-2.5) == pytest.approx(10**-2.5)
    assert offset.bounds == (0.0, 0.2)
    assert [p.name for p in default_search(get_preset("lf-llm-269m-modern").optim)] == ["muon_lr", "max_lr"]
    assert [p.name for p in default_search(get_preset("debug").optim)] == ["max_lr", "weight_decay"]
    # Quasi-random: each quarter of each axis has two of eight points.
    points = spread_points(8, 2)
    for axis in range(2):
        quarters = [int(4 * point[axis]) for point in points]
        assert all(1 <= quarters.count(quarter) <= 3 for quarter in range(4))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["debug", "--search", "optim.max-rl=1:2"], "max_lr"),
        (["debug", "--search", "model.d-model=1:2"], "no number to search"),
        (["debug", "--search", "optim.max-lr=1"], "expected NAME=LOW:HIGH"),
        (["debug", "--search", "optim.max-lr=2:1"], "0 <= LOW < HIGH"),
        (["debug", "--search", "optim.beta2=0.9:1"], "below 1"),
        (["debug", "--trials", "0"], "--trials is 0"),
        (["debug", "--tokens", "1000"], "expected at least 180: give --tokens 92160 or more"),
        (["debug", "--data.source", "files:/tmp"], "--tokens"),
    ],
)
def test_invalid_arguments_rejected(
    words: list[str], message: str, temp_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["tune", *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (temp_data / "tune").exists()


def test_recommended_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from myllm.cli.launch import parse_args

    in_place_of_training(monkeypatch)
    search = Search(plan_of(trials=6), tmp_path)
    for _ in search.run():
        pass
    searched, carried = commands(search, {"max_lr": 8.1234e-3, "weight_decay": 0.15}).values()
    config = parse_args(searched.split()[2:]).config
    assert (config.optim.max_lr, config.optim.weight_decay, config.train.max_steps) == (8.12e-3, 0.15, FULL)
    config = parse_args(carried.split()[2:]).config
    assert config.train.max_steps == 600
    assert config.optim.max_lr == pytest.approx(8.1234e-3 * (2 / 3) ** -0.32, rel=1e-2)


def test_results_and_report(
    temp_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_place_of_training(monkeypatch)
    monkeypatch.setattr("myllm.cli.tune.command.seconds_per_token", lambda configs: [2e-4])
    cli.main(["tune", "debug", "--trials", "9", "--name", "valley"])
    output = capsys.readouterr().out
    # 9, 4 and 4 runs of 67, 200 and 600 steps, 8 on fresh seeds: 4.4M tokens, 5,000 a second.
    assert "at most 15 min of training with --jobs 1, by a run of 20 steps" in output
    assert "tune-valley-000-d9" in output
    results = json.loads((temp_data / "tune/valley/tune.json").read_text())
    assert {run["rung"] for run in results["runs"]} == {"d9", "d3", "d"}
    assert results["recommended"]["values"]["max_lr"] > 0
    assert set(results["parabolas"]) == {"max_lr", "weight_decay"}
    page = (temp_data / "tune/valley/report.html").read_text()
    assert page.count("data:image/png") == 2
    assert results["commands"]
    assert all(html.escape(line) in page for line in results["commands"].values())
    assert "src=http" not in page
    assert "<script" not in page
