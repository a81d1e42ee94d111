"""report.html: one page with everything that is known about a run. It needs no other file, no script and no network.

The page is the template report.html with the styles of report.css; this module computes what they show.
"""

import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from myllm.files import write_text
from myllm.formatting import format_duration, format_number, format_percent, format_si
from myllm.paths import RunPaths
from myllm.runs.history import (
    TASK_TITLES,
    Metrics,
    Row,
    accuracy_key,
    as_float,
    centered_mean,
    chance_accuracy,
    flatten,
    read_config,
    read_json_or_empty,
    read_metrics,
    read_samples,
    section,
)

from .evaluations import eval_table, read_results, result_rows
from .page import embed_png, page_template
from .plots import PLOTS, save_figures
from .values import as_text, format_loss, format_perplexity, shorten_sample, value_text

SHAPE_WORDS = {"n_layers": "layers", "d_model": "wide", "n_heads": "heads"}
ACTIVITY_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999")
"""Longest activity first; the last color serves all that follow. Source: Okabe and Ito (2008), safe for color-blind
readers."""


class Card(NamedTuple):
    """One headline figure."""

    title: str
    value: str
    detail: str


def write_report(run: RunPaths) -> Path:
    """Draw the figures into plots/ and write report.html.

    Raises:
        UserError: the run or its metrics do not exist or hold no rows.
    """
    metrics, config = read_metrics(run.metrics), read_config(run.config)
    samples, environment = read_samples(run.samples), read_json_or_empty(run.environment)
    figures = save_figures(metrics, config, run.plots)
    command = _command(environment)
    page = page_template("myllm.runs.report", flatten=flatten, sample=shorten_sample, text=as_text).render(
        name=run.root.name,
        subtitle=_subtitle(config, environment),
        step=metrics.last_step,
        max_steps=as_float(section(config, "train").get("max_steps")),
        cards=_cards(metrics, config, environment),
        figures={name: embed_png(path.read_bytes()) for name, path in figures.items()},
        descriptions={name: plot.description for name, plot in PLOTS.items()},
        samples=samples,
        evals=eval_table(metrics),
        results=result_rows(read_results(run.evals)),
        activities=_activities(metrics),
        # --train.fresh would move this run aside instead of resuming it.
        resume_command=shlex.join(word for word in command if word != "--train.fresh"),
        sample_command=_sample_command(run.root.name, samples),
        config=_config_groups(config),
        environment=environment | ({"command": shlex.join(command)} if command else {}),
        n_rows=len(metrics.train) + sum(map(len, metrics.evals.values())),
        n_skipped=metrics.skipped,
    )
    write_text(run.report, page)  # atomic: a browser may reload the page while training continues
    return run.report


# -- the top ----------------------------------------------------------------------------------------------------------


def _subtitle(config: Row, environment: Row) -> str:
    device = as_text(environment.get("device_name") or environment.get("device"))
    world_size = as_float(environment.get("world_size"))
    parts = [
        as_text(environment.get("source") or section(config, "data").get("source")),
        f"{world_size:.0f} x {device}" if device and world_size > 1 else device,
        as_text(environment.get("started")).replace("T", " ")[:16],
    ]
    return " · ".join(filter(None, parts))


def _cards(metrics: Metrics, config: Row, environment: Row) -> list[Card]:
    """The newest value of each measurement; a measurement without a value has no card."""
    train, validation = metrics.last(), metrics.last("validation")
    at = f"at step {validation['step']:,}" if validation else ""
    mfu, model = as_float(train.get("mfu")), section(config, "model")
    shape = [f"{model[key]} {word}" for key, word in SHAPE_WORDS.items() if key in model]
    cards = [
        Card("Validation loss", value_text(validation, "loss", format_loss), at and f"nats per token, {at}"),
        Card("Perplexity", value_text(validation, "perplexity", format_perplexity), at),
        Card("Bits per byte", value_text(validation, "bits_per_byte", format_loss), at),
        _accuracy_card(metrics, "cloze", "Cloze accuracy"),
        _accuracy_card(metrics, "hellaswag", "HellaSwag accuracy"),
        _tasks_card(metrics),
        Card(
            "Training loss", "" if validation else value_text(train, "loss", format_loss), "nats per token, newest row"
        ),
        Card("Tokens seen", value_text(train, "tokens", format_si), _epochs(train, environment)),
        Card(
            "Tokens per second", value_text(train, "tokens_per_s", format_si), f"{format_percent(mfu)} MFU" * (mfu > 0)
        ),
        Card("Training time", format_duration(metrics.training_s()), "without evaluations"),
        Card("Parameters", value_text(environment, "parameters", format_si), ", ".join(shape)),
    ]
    return [card for card in cards if card.value]


def _accuracy_card(metrics: Metrics, name: str, title: str) -> Card:
    row = metrics.last(name)
    error, examples = as_float(row.get("acc_stderr")), as_float(row.get("n_examples"))
    details = [f"± {format_percent(error)}" if error > 0 else "", f"{examples:,.0f} examples" if examples > 0 else ""]
    if row and (chance := chance_accuracy(name, row)):
        details.append(f"chance {chance * 100:.0f}\N{NO-BREAK SPACE}%")
    if "acc_blind" in row:
        details.append(f"without the context {value_text(row, 'acc_blind', format_percent)}")
    return Card(
        title, value_text(row, accuracy_key(metrics.rows(name)), format_percent), ", ".join(filter(None, details))
    )


def _tasks_card(metrics: Metrics) -> Card:
    mean = centered_mean({name: metrics.last(name) for name in TASK_TITLES})
    if mean is None:
        return Card("", "", "")
    titles = ", ".join(TASK_TITLES[name] for name in mean.tasks)
    error = f"± {format_percent(mean.stderr)}"
    return Card("Mean above chance", format_percent(mean.value), f"{error}; 0 is guessing; {titles}")


def _epochs(train: Row, environment: Row) -> str:
    if "components" in environment:  # a mixture: each has its own, in the table of evaluations
        return ""
    epochs = as_float(train.get("tokens")) / (as_float(environment.get("train_tokens")) or np.nan)
    if epochs >= 1:
        return f"{format_number(epochs)} epochs"
    return f"{format_number(100 * epochs)}\N{NO-BREAK SPACE}% of the data" if epochs > 0 else ""


# -- tables -----------------------------------------------------------------------------------------------------------


def _activities(metrics: Metrics) -> list[dict[str, Any]]:
    """Where the run's time went, the longest activity first: name, seconds, fraction and color."""
    seconds = metrics.time_by_activity()
    total = sum(seconds.values())
    last = len(ACTIVITY_COLORS) - 1
    return [
        {"name": name, "seconds": value, "fraction": value / total, "color": ACTIVITY_COLORS[min(index, last)]}
        for index, (name, value) in enumerate(seconds.items())
    ]


def _command(environment: Row) -> list[str]:
    """The words of the command that started the run; earlier versions recorded them as one string."""
    words = environment.get("command") or ""
    return [str(word) for word in words] if isinstance(words, list) else str(words).split()


def _sample_command(run: str, samples: dict[str, list[Row]]) -> str:
    prompt = next((prompt.strip() for prompt in samples if "'" not in prompt), "Once upon a time")
    return f"myllm sample {shlex.quote(run)} --prompt {shlex.quote(prompt)}"


def _config_groups(config: Row) -> dict[str, Row]:
    groups = {"run": {key: value for key, value in config.items() if not isinstance(value, dict)}}
    groups |= {key: value for key, value in config.items() if isinstance(value, dict)}
    return {name: settings for name, settings in groups.items() if settings}
