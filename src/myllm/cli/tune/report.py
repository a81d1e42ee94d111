"""tune.json and report.html of a search."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from statistics import fmean

from myllm.config import to_dict
from myllm.files import json_safe, write_json, write_text
from myllm.formatting import format_duration, format_si
from myllm.migrations import TUNE
from myllm.planning.transfer import describe_transfer, transfer

from .fit import BEST_FRACTION, Parabola, fit_parabolas
from .recommend import Recommendation, commands, fresh_runs, mean_loss, recommend
from .search import RUNGS, TOP, Search, TunedRun, ranked

TOO_FEW = "too few runs for a parabola"
UNFINISHED = "The search is not finished: run the same command to continue it."


def write_results(search: Search) -> str:
    """Write tune.json and report.html, and return what they say in a few lines."""
    folder, parabolas, best = search.folder, fit_parabolas(search.runs, search.plan.parameters), recommend(search)
    lines = commands(search, best.values) if best and best.is_better else {}
    write_json(folder / "tune.json", TUNE.stamp(json_safe({
        "name": search.plan.config.name,
        "config": to_dict(search.plan.config),
        "search": [asdict(parameter) for parameter in search.plan.parameters],
        "steps": search.plan.steps,
        "runs": [_row(run) for run in search.runs],
        "parabolas": {name: asdict(parabola) for name, parabola in parabolas.items()},
        "recommended": asdict(best) if best else None,
        "commands": lines,
    })))  # fmt: skip
    write_text(folder / "report.html", _page(search, parabolas, best, lines))
    result = [f"optim.{p.name}: {_verdict(parabolas, p.name)}" for p in search.plan.parameters]
    result += ["", best.sentence() if best else UNFINISHED]
    result += [f"\n{length}:\n  {line}" for length, line in lines.items()]
    return "\n".join([*result, "", f"report       {folder / 'report.html'}", f"numbers      {folder / 'tune.json'}"])


def _page(
    search: Search, parabolas: Mapping[str, Parabola], best: Recommendation | None, lines: Mapping[str, str]
) -> str:
    from myllm.runs.report.page import embed_figure, page_template  # Matplotlib takes a second

    from .plots import draw_setting

    plan, fresh = search.plan, fresh_runs(search)
    shortest = transfer(plan.config.optim, plan.steps[0] / plan.steps[TOP])
    lengths = ", ".join(format_si(steps * plan.config.train.batch_tokens) for steps in plan.steps)
    data = plan.config.data.dataset or plan.config.data.source
    figures = [
        {
            "name": p.name, "verdict": _verdict(parabolas, p.name),
            "image": embed_figure(draw_setting(p, search.runs, parabolas.get(p.name))),
        }
        for p in plan.parameters
    ]  # fmt: skip
    return page_template("myllm.cli.tune", si=format_si).render(
        name=plan.config.name,
        subtitle=f"{data} · runs of {lengths} tokens · {plan.config.optim.optimizer}",
        done=len(search.runs),
        total=len(search.runs) if best else max(sum(plan.counts) + plan.final_runs, len(search.runs)),
        complete=best is not None,
        cards=_cards(search, best),
        sentence=best.sentence() if best else UNFINISHED,
        commands=lines,
        settings=[p.name for p in plan.parameters],
        seeds=sorted({seed for by_seed in fresh.values() for seed in by_seed}),
        finalists=sorted(((mean_loss(by_seed), by_seed) for by_seed in fresh.values()), key=lambda row: row[0]),
        figures=figures,
        best_fraction=f"{BEST_FRACTION:.0%}",
        rule=f"Carried from D to D/9 tokens: {describe_transfer(plan.config.optim, shortest)}.",
        runs=sorted(ranked(search.runs), key=lambda run: -run.rung),
        command=f"The same command continues the search in {search.folder}.",
    )


def _cards(search: Search, best: Recommendation | None) -> list[tuple[str, str, str]]:
    tokens, seconds = sum(run.tokens for run in search.runs), sum(run.seconds for run in search.runs)
    cards = [("Tokens", format_si(tokens), "of all runs"), ("Training time", format_duration(seconds), "of all runs")]
    if best:
        gain = f"{fmean(best.gains):+.4f}" if best.gains else "0"
        cards = [
            ("Validation loss", f"{best.loss:.4f}", "best finalist, mean of fresh seeds"),
            ("Gain", gain, "nats against the preset's own values"),
            *cards,
        ]
    return cards


def _row(run: TunedRun) -> dict[str, object]:
    """As in tune.json."""
    return {
        "run": run.name, "number": run.number, "rung": RUNGS[run.rung], "seed": run.seed, "values": run.values,
        "loss": run.loss if math.isfinite(run.loss) else None, "tokens": run.tokens, "seconds": round(run.seconds, 2),
    }  # fmt: skip


def _verdict(parabolas: Mapping[str, Parabola], name: str) -> str:
    return parabolas[name].verdict if name in parabolas else TOO_FEW
