"""The command `myllm tune PRESET [overrides]`: its arguments, the plan, and what it prints."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from myllm import paths
from myllm.cli.launch import RunArgs, parse_run_args
from myllm.cli.trials import MEASURED_STEPS, seconds_per_token
from myllm.distributed import launcher as ranks
from myllm.errors import UserError
from myllm.files import file_lock
from myllm.formatting import format_duration, format_si, format_table
from myllm.planning.transfer import describe_transfer, transfer
from myllm.runs.history import read_json_or_empty

from .search import ETA, SPREAD, TOP, Plan, Search, TunedRun
from .space import default_search, own_values, parse_search

DRAW_EVERY_S = 60.0
MIN_STEPS = 20
"""Of the shortest runs."""


@dataclass(frozen=True)
class TuneArgs(RunArgs):
    """Search for the learning rate and other settings of the optimizer, with whole runs of D/9, D/3 and D tokens. The
    same command continues an interrupted search; --name names it. docs/tune.md explains what it does.
    """

    search: tuple[str, ...] = ()
    """Up to four numbers of optim and their ranges, NAME=LOW:HIGH, such as optim.max-lr=0.001:0.01 (default: the rates
    of muon; the rate and the weight decay of adamw)."""
    tokens: int | None = None
    """Tokens of the longest runs, D (default: those of the preset)."""
    trials: int = 30
    """Runs of D/9 tokens; a third of them is repeated with D/3, and a third of those with D."""
    jobs: int = 1
    """Runs at a time, each with its share of the cores or GPUs."""
    budget: bool = False
    """Print the plan and stop."""
    range_test: bool = False
    """One run whose rate rises from 1e-5 to 1, instead of a search."""


def tune(words: list[str]) -> None:
    """Search for the learning rate and other settings of a preset."""
    args = parse_run_args(TuneArgs, words, "myllm tune")
    if ranks.is_launched():
        raise UserError("`myllm tune` starts its own ranks; run it without torchrun")
    if args.range_test:
        from .range_test import run_range_test

        print(run_range_test(args.config))
        return
    plan = make_plan(args)
    folder = paths.tune_dir(plan.config.name)
    print(describe_plan(plan, folder), flush=True)
    print(describe_time(plan, folder, args.jobs), flush=True)
    if args.budget:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / ".lock", wait=False):
            run_search(Search(plan, folder, args.jobs))
    except BlockingIOError:
        raise UserError(f"another process searches in {folder}; wait for it, or give another --name") from None


def run_search(search: Search) -> None:
    """Train what is left, and print every run and then the result."""
    from .report import write_results

    drawn = time.monotonic()
    for run in search.run():
        print(describe_run(run), flush=True)
        if time.monotonic() - drawn > DRAW_EVERY_S:
            write_results(search)
            drawn = time.monotonic()
    print(f"\n{write_results(search)}")


def make_plan(args: TuneArgs) -> Plan:
    """Raises a UserError if a number is too small, or the length is not known."""
    config = args.config
    if args.tokens is None and (args.own_text or config.train.epochs is not None):
        raise UserError("how long the longest runs are depends on the text; say it with --tokens, such as --tokens 50M")
    steps = round(args.tokens / config.train.batch_tokens) if args.tokens is not None else config.train.max_steps
    for name, value, least in (("trials", args.trials, 1), ("jobs", args.jobs, 1)):
        if value < least:
            raise UserError(f"--{name} is {value}, expected at least {least}")
    fewest = MIN_STEPS * ETA**TOP
    if steps < fewest:
        raise UserError(
            f"the longest runs have {steps:,} steps of {config.train.batch_tokens:,} tokens, and the shortest a ninth "
            f"of that; expected at least {fewest:,}: give --tokens {fewest * config.train.batch_tokens} or more, or "
            "lower train.batch_tokens"
        )
    config = replace(config, train=replace(config.train, max_steps=steps, epochs=None))
    parameters = parse_search(args.search) if args.search else default_search(config.optim)
    return Plan(config, parameters, args.trials, args.config.train.max_steps)


def describe_plan(plan: Plan, folder: Path) -> str:
    """The ranges, the runs and tokens of each rung, and the rule that carries values from one to the next."""
    config, batch = plan.config, plan.config.train.batch_tokens
    own = own_values(config, plan.parameters)
    ranges = [("setting", "from", "to", "scale", "first run")]
    for p in plan.parameters:
        scale = "linear" if not p.is_log else f"log of {p.label}"
        ranges.append((f"optim.{p.name}", f"{p.low:.3g}", f"{p.high:.3g}", scale, f"{own[p.name]:.3g}"))
    rows = [("runs", "steps", "tokens a run", "tokens")]
    rungs = [*zip(plan.counts, plan.steps, strict=True), (plan.final_runs, plan.steps[TOP])]
    for count, steps in rungs:
        rows.append((f"{count}", f"{steps:,}", format_si(steps * batch), format_si(count * steps * batch)))
    shorter = transfer(config.optim, plan.steps[0] / plan.steps[TOP])
    return "\n".join(
        [
            f"search {config.name}, in {folder}",
            format_table(ranges),
            "",
            format_table(rows, right=range(4)),
            f"the last row is the best runs on fresh seeds; together at most {format_si(plan.tokens)} tokens",
            f"first the preset's own values, then {SPREAD} points spread over the ranges, then Optuna's TPE",
            f"from D to D/{ETA**TOP} tokens: {describe_transfer(config.optim, shorter)}",
        ]
    )


def describe_time(plan: Plan, folder: Path, jobs: int) -> str:
    """Hours of training for the whole plan, from the runs so far or else from a run of a few steps."""
    runs = read_json_or_empty(folder / "tune.json").get("runs", [])
    tokens, seconds = sum(run["tokens"] for run in runs), sum(run["seconds"] for run in runs)
    source = f"the speed of {len(runs)} runs so far"
    if not seconds:
        (seconds,) = seconds_per_token([replace(plan.config, name=f"tune-{plan.config.name}")])
        tokens, source = 1, f"a run of {MEASURED_STEPS} steps"
    expected = plan.tokens * seconds / tokens / jobs
    return f"at most {format_duration(expected)} of training with --jobs {jobs}, by {source}"


def describe_run(run: TunedRun) -> str:
    values = ", ".join(f"{name} {value:.3g}" for name, value in run.values.items())
    loss = f"loss {run.loss:.4f}" if math.isfinite(run.loss) else "diverged or was given up"
    return f"{run.name}: {values}: {loss} ({format_si(run.tokens)} tokens in {format_duration(run.seconds)})"
