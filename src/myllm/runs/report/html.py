"""report.html: everything found out about one run on one page that needs no other file and no network."""

import base64
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from myllm.formatting import format_duration, format_number, format_percent, format_si
from myllm.runs.history import Metrics, Row, accuracy_key, as_float, chance_is_a_quarter

from .css import PAGE, STYLE
from .plots import PLOTS
from .times import times_section

TABLE_ROWS = 25
SAMPLE_CHARACTERS = 3_000


@dataclass(frozen=True)
class ReportData:
    """What the page shows. Everything but the name and the metrics may be empty."""

    name: str
    metrics: Metrics
    samples: dict[str, list[Row]]
    config: Row
    environment: Row
    figures: dict[str, bytes]
    """PNG by the figure's name."""


def render_page(run: ReportData) -> str:
    sections = (
        _heading(run),
        _cards(run),
        _figures(run.figures),
        _samples(run.samples),
        _evaluations(run.metrics),
        times_section(run.metrics.seconds()),
        _commands(run),
        _config(run.config),
        _environment(run.environment),
        _footer(run),
    )
    return PAGE.substitute(title=escape(f"{run.name} - MyLLM"), style=STYLE, body="\n".join(filter(None, sections)))


# -- the top ----------------------------------------------------------------------------------------------------------


def _heading(run: ReportData) -> str:
    step = run.metrics.last_step
    planned = as_float(_section(run.config, "train").get("max_steps"))
    facts = [
        _text(run.environment.get("source") or _section(run.config, "data").get("source")),
        _devices(run.environment),
        _text(run.environment.get("started")).replace("T", " ")[:16],
    ]
    progress = f"<span>step {step:,}</span>"
    if planned > 0:
        done = min(100.0, 100 * step / planned)
        progress = f'<div class="bar"><span style="width: {done:.1f}%"></span></div>'
        progress += f"<span>step {step:,} of {planned:,.0f}</span>"
    return (
        f'<header><p class="kicker">MyLLM pretraining run</p><h1>{escape(run.name)}</h1>'
        f'<p class="soft">{escape(" · ".join(filter(None, facts)))}</p><div class="progress">{progress}</div></header>'
    )


def _devices(environment: Row) -> str:
    name = _text(environment.get("device_name") or environment.get("device"))
    world_size = as_float(environment.get("world_size"))
    return f"{world_size:.0f} x {name}" if name and world_size > 1 else name


def headline(run: ReportData) -> list[tuple[str, str, str]]:
    """The cards: what is measured, its newest value, and a remark. What was never measured has no card."""
    metrics, train, validation = run.metrics, run.metrics.last(), run.metrics.last("validation")
    at = f"at step {validation['step']:,}" if validation else ""
    cards = [
        ("Validation loss", _value(validation, "loss", _fixed), at and f"nats per token, {at}"),
        ("Perplexity", _value(validation, "perplexity", _perplexity), at),
        ("Bits per byte", _value(validation, "bits_per_byte", _fixed), at),
        *(_accuracy_card(metrics, name, title) for name, title in (("cloze", "Cloze"), ("hellaswag", "HellaSwag"))),
        ("Training loss", "" if validation else _value(train, "loss", _fixed), "nats per token, newest row"),
        ("Tokens seen", _value(train, "tokens", format_si), _passes(train, run.environment)),
        ("Tokens per second", _value(train, "tokens_per_s", format_si), _mfu(train)),
        ("Training time", format_duration(metrics.training_s()), "without evaluations"),
        ("Parameters", _value(run.environment, "parameters", format_si), _shape(_section(run.config, "model"))),
    ]
    return [card for card in cards if card[1]]


def _accuracy_card(metrics: Metrics, name: str, title: str) -> tuple[str, str, str]:
    row = metrics.last(name)
    key = accuracy_key(metrics.rows(name))
    error, examples = as_float(row.get("acc_stderr")), as_float(row.get("n_examples"))
    remarks = [f"± {format_percent(error)}" if error > 0 else "", f"{examples:,.0f} examples" if examples > 0 else ""]
    remarks += ["chance 25\N{NO-BREAK SPACE}%"] if chance_is_a_quarter(name, row) else []
    if "acc_blind" in row:
        remarks.append(f"without the context {_value(row, 'acc_blind', format_percent)}")
    return f"{title} accuracy", _value(row, key, format_percent), ", ".join(filter(None, remarks))


def _passes(train: Row, environment: Row) -> str:
    passes = as_float(train.get("tokens")) / (as_float(environment.get("train_tokens")) or np.nan)
    if passes >= 1:
        return f"{format_number(passes)} passes over the data"
    return f"{format_number(100 * passes)}\N{NO-BREAK SPACE}% of the data" if passes > 0 else ""


def _mfu(train: Row) -> str:
    mfu = as_float(train.get("mfu"))
    return f"{format_percent(mfu)} MFU" if mfu > 0 else ""


def _shape(model: Row) -> str:
    names = {"n_layers": "layers", "d_model": "wide", "n_heads": "heads"}
    return ", ".join(f"{model[key]} {name}" for key, name in names.items() if key in model)


def _cards(run: ReportData) -> str:
    shown = headline(run)
    columns = next((columns for columns in (4, 3) if len(shown) % columns == 0), 4)
    cards = (
        f'<div><dt>{escape(title)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="detail">{escape(remark)}</dd></div>'
        for title, value, remark in shown
    )
    return f'<dl class="cards columns-{columns}">{"".join(cards)}</dl>'


# -- figures and samples ----------------------------------------------------------------------------------------------


def _figures(figures: dict[str, bytes]) -> str:
    parts = []
    if "loss" in figures:
        narrow = _data_url(figures["loss_compact"])
        parts.append(
            f'<figure class="wide"><picture><source media="(max-width: 760px)" srcset="{narrow}">'
            f"{_image('loss', figures['loss'])}</picture></figure>"
        )
    others = [name for name in figures if name not in ("loss", "loss_compact")]
    # An odd figure would leave a hole: the last three share a row instead.
    parts.append(f'<div class="grid figures{" odd" if len(others) % 2 and len(others) > 1 else ""}">')
    parts += [f"<figure>{_image(name, figures[name])}</figure>" for name in others]
    return "".join([*parts, "</div>"])


def _image(name: str, png: bytes) -> str:
    return f'<img alt="{escape(PLOTS[name].description)}" src="{_data_url(png)}">'


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _samples(samples: dict[str, list[Row]]) -> str:
    if not samples:
        return ""
    blocks = []
    for prompt, rows in samples.items():
        columns = [_sample(rows[0], "")] if len(rows) > 1 else []
        columns.append(_sample(rows[-1], "last"))
        blocks.append(
            f'<div class="card sample"><p class="prompt">{escape(prompt)}</p>'
            f'<div class="grid">{"".join(columns)}</div></div>'
        )
    return f"<h2>How it continues a text</h2>{''.join(blocks)}"


def _sample(row: Row, style: str) -> str:
    text = str(row["text"]).removeprefix(" ")
    text = text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS] + " ..."
    return f'<div><h3 class="{style}">step {row["step"]:,}</h3><p class="text">{escape(text)}</p></div>'


# -- tables -----------------------------------------------------------------------------------------------------------


def _evaluations(metrics: Metrics) -> str:
    columns = (
        ("Validation<br>loss", "validation", "loss", _fixed),
        ("<br>perplexity", "validation", "perplexity", _perplexity),
        ("<br>bits per byte", "validation", "bits_per_byte", _fixed),
        ("<br>token accuracy", "validation", "token_accuracy", format_percent),
        ("Cloze<br>accuracy", "cloze", accuracy_key(metrics.rows("cloze")), format_percent),
        ("HellaSwag<br>accuracy", "hellaswag", accuracy_key(metrics.rows("hellaswag")), format_percent),
    )
    columns = [column for column in columns if metrics.rows(column[1])]
    if not columns:
        return ""
    by_step = {name: {row["step"]: row for row in rows} for name, rows in metrics.evals.items()}
    steps = sorted(set().union(*(by_step[name] for _, name, _, _ in columns)))
    shown = steps
    if len(steps) > TABLE_ROWS:
        shown = [steps[index] for index in np.linspace(0, len(steps) - 1, TABLE_ROWS).round().astype(int)]
    lines = ["<tr><th>Step</th><th>Tokens</th>" + "".join(f"<th>{title}</th>" for title, *_ in columns) + "</tr>"]
    for step, tokens in zip(shown, metrics.tokens_at(shown), strict=True):
        cells = [f"{step:,}", format_si(tokens) if tokens >= 0 else ""]
        cells += [_value(by_step[name].get(step, {}), key, write) for _, name, key, write in columns]
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    note = f'<p class="note">{len(shown)} of {len(steps)} evaluated steps; metrics.jsonl has all of them.</p>'
    table = f'<div class="card scroll"><table>{"".join(lines)}</table></div>'
    return f"<h2>Evaluations</h2>{table}{note if shown is not steps else ''}"


def _commands(run: ReportData) -> str:
    words = run.environment.get("command") or ""
    words = [str(word) for word in words] if isinstance(words, list) else str(words).split()
    # Asking for a fresh start again would move this run aside instead of going on with it.
    resume = shlex.join(word for word in words if word != "--train.fresh")
    prompt = next((prompt.strip() for prompt in run.samples if "'" not in prompt), "Once upon a time")
    sample = f"myllm sample {shlex.quote(run.name)} --prompt {shlex.quote(prompt)}"
    finished = as_float(_section(run.config, "train").get("max_steps")) <= run.metrics.last_step
    parts = [("Resume training", "" if finished else resume), ("Generate text", sample)]
    blocks = "".join(f"<p>{title}</p><pre>{escape(command)}</pre>" for title, command in parts if command)
    return f'<h2>Commands</h2><div class="card commands">{blocks}</div>'


def _config(config: Row) -> str:
    if not config:
        return ""
    groups = {"run": {key: value for key, value in config.items() if not isinstance(value, dict)}}
    groups |= {key: value for key, value in config.items() if isinstance(value, dict)}
    blocks = (
        f'<details><summary>{escape(name)} <span class="soft">{len(values)} '
        f"setting{'s' * (len(values) != 1)}</span></summary>{_facts(values)}</details>"
        for name, values in groups.items()
        if values
    )
    return f"<h2>Config</h2>{''.join(blocks)}"


def _environment(environment: Row) -> str:
    command = environment.get("command")
    if isinstance(command, list):
        environment = environment | {"command": shlex.join(map(str, command))}
    return f'<h2>Environment</h2><div class="card">{_facts(environment)}</div>' if environment else ""


def _facts(values: Row) -> str:
    lines = (f"<tr><th>{escape(key)}</th><td>{escape(_text(value))}</td></tr>" for key, value in _flat(values))
    return f'<table class="facts">{"".join(lines)}</table>'


def _footer(run: ReportData) -> str:
    metrics = run.metrics
    rows = len(metrics.train) + sum(map(len, metrics.evals.values()))
    skipped = f"; {metrics.skipped} unreadable lines left out" if metrics.skipped else ""
    return f"<footer>Made from {rows:,} rows of metrics.jsonl{skipped}.</footer>"


# -- values as text ---------------------------------------------------------------------------------------------------


def _value(row: Row, key: str, write=format_number) -> str:
    """A row's number as text; empty if it has none."""
    value = row.get(key)
    return write(as_float(value)) if isinstance(value, int | float) else ""


def _fixed(value: float) -> str:
    return f"{value:.4f}" if np.isfinite(value) else format_number(value)


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1_000 else format_si(value)


def _section(config: Row, name: str) -> Row:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _flat(values: Row, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}" if abs(value) >= 10_000 else str(value)
        case list():
            return " | ".join(map(_text, value))
        case _:
            return str(value)
