"""The model card: a README.md in the Hub's format, for published runs and for exported folders.

    config.json, environment.json, metrics.jsonl, samples.jsonl ─▶ CardData ─▶ model_card.md, a template ─▶ README.md

A card depends on these files and on a step alone, so publishing again gives the same card. It names no local folder.
"""

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from myllm.config import RunConfig, saved_config
from myllm.data.sources.catalog import actual_source, find_corpus
from myllm.errors import UserError
from myllm.formatting import format_duration, format_number, format_percent, format_si
from myllm.paths import RunPaths
from myllm.planning.flops import n_parameters
from myllm.planning.length import warmup_steps
from myllm.runs.history import (
    Metrics,
    Row,
    as_float,
    chance_accuracy,
    get_text,
    read_json_or_empty,
    read_metrics,
    read_samples,
    section,
)

MAX_SAMPLE_CHARS = 600
METRIC_NAMES = {
    "loss": "loss, nats per token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "token_accuracy": "accuracy of the next token",
    "acc": "accuracy by total log-probability",
    "acc_norm": "accuracy by mean log-probability",
    "acc_blind": "accuracy without the context, by token frequency",
}
CLEANING = {
    "normalize_unicode": "Unicode normalization (NFC)",
    "strip_control": "control characters removed",
    "min_chars": "documents of at least {} characters",
    "dedup_exact": "exact duplicates removed",
}
_LOCAL_FOLDER = re.compile(r"(?:^|(?<=[:=]))(?:~|/(?!/))\S*/")


@dataclass(frozen=True)
class CardData:
    """What a card is made from: one checkpoint, and what its run wrote up to that step."""

    name: str
    config: RunConfig
    """With the source that the data really have, see `actual_source`."""
    step: int
    tokens_seen: int
    exported: Row
    """The config.json of the exported weights; and `tokenizer`, from `Tokenizer.describe`."""
    repo: str | None = None
    """None: an exported folder, not a published one."""
    license: str | None = None
    imported: str | None = None
    """Where imported weights came from; None: trained from scratch."""
    environment: Row = field(default_factory=dict)
    metrics: Metrics = field(default_factory=lambda: Metrics([], {}))
    samples: dict[str, list[Row]] = field(default_factory=dict)

    @property
    def untrained(self) -> bool:
        """Whether these are imported weights that were not trained here."""
        return self.imported is not None and self.step == 0


def read_card_data(run: RunPaths, step: int, repo: str, license: str | None, exported: Row) -> CardData:
    """Read what a run wrote up to `step`."""
    try:
        metrics = read_metrics(run.metrics).up_to(step)
    except UserError:
        metrics = Metrics([], {})
    samples = {
        prompt: until_step
        for prompt, rows in read_samples(run.samples).items()
        if (until_step := [row for row in rows if row["step"] <= step])
    }
    config, environment = saved_config(read_json_or_empty(run.config), run.config), read_json_or_empty(run.environment)
    source = actual_source(config.data.source, config.data.dataset, get_text(environment, "source"))
    return CardData(
        name=run.root.name,
        config=replace(config, data=replace(config.data, source=source)),
        step=step,
        tokens_seen=step * config.train.batch_tokens,
        exported=exported,
        repo=repo,
        license=license,
        imported=get_text(read_json_or_empty(run.imported), "source"),
        environment=environment,
        metrics=metrics,
        samples=samples,
    )


def render_model_card(data: CardData, curves: Mapping[str, str] | None = None) -> str:
    """The card as Markdown, with the Hub's metadata at the top.

    Args:
        curves: descriptions of the figures plots/NAME.png in the folder, by name.
    """
    # Not ModelCard.from_template: it leaves a blank line for every Jinja tag, which would break the tables.
    jinja = Environment(
        loader=PackageLoader(__package__, "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    jinja.filters |= {
        "as_float": as_float,
        "cell": lambda value: str(value).replace("|", "\\|").replace("\n", " "),
        "number": format_number,
        "metric": _format_metric,
        "public": strip_local_paths,
        "si": format_si,
        "standard_error": _standard_error,
        "thousands": "{:,.0f}".format,
    }
    config, environment, results = data.config, data.environment, _results(data)
    tokenizer = data.exported.get("tokenizer") or environment.get("tokenizer")
    command = environment.get("command")
    return jinja.get_template("model_card.md").render(
        data=data,
        environment=environment,
        curves=curves or {},
        metadata=_metadata(data),
        n_parameters=n_parameters(config.model),
        results=results,
        metric_names=METRIC_NAMES,
        chance={name: chance for name, _, row in results if (chance := chance_accuracy(name, row))},
        sample=_sample(data),
        tokenizer=tokenizer.get("name") if isinstance(tokenizer, dict) else strip_local_paths(config.data.tokenizer),
        corpus=find_corpus(config.data.source),
        dataset_repo=_dataset_repo(config.data.source),
        epochs=_component_epochs(data),
        cleaning=", ".join(
            text.format(value) for key, text in CLEANING.items() if (value := getattr(config.data, key))
        ),
        warmup_steps=warmup_steps(config.optim, config.train.max_steps),
        precision=_precision(data),
        command=shlex.join(strip_local_paths(str(word)) for word in command) if isinstance(command, list) else "",
        hardware=_hardware(data),
    )


def strip_local_paths(text: str) -> str:
    """Remove local folders: "files:/home/me/texts" becomes "files:texts"."""
    return _LOCAL_FOLDER.sub("", text)


def _metadata(data: CardData) -> str:
    """The YAML at the top of the card, which the Hub shows and searches."""
    dataset = None if data.untrained else _dataset_repo(data.config.data.source)
    base_model = (data.imported or "").partition("@")[0]
    evals = [
        EvalResult("text-generation", name, name, metric, row[metric])
        for name, metric, row in _results(data)
        if row["step"] == data.step and metric != "acc_blind" and math.isfinite(as_float(row[metric]))
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=data.license,
        datasets=[dataset] if dataset else None,
        base_model=base_model if "/" in base_model else None,
        tags=["myllm", "pretrained"],
        eval_results=evals or None,
        model_name=data.name if evals else None,
    ).to_yaml()


# -- figures ----------------------------------------------------------------------------------------------------------


def _results(data: CardData) -> list[tuple[str, str, Row]]:
    """Evaluation, metric and newest row of all that was measured."""
    newest = {name: data.metrics.last(name) for name in data.metrics.evals}
    return [(name, metric, row) for name, row in newest.items() for metric in row if metric in METRIC_NAMES]


def _component_epochs(data: CardData) -> str:
    """How often the run has read each component of a mixture; empty without one."""
    rows = {name.partition("/")[2]: data.metrics.last(name) for name in data.metrics.evals if "/" in name}
    return ", ".join(f"{name} {format_number(row['epochs'])}" for name, row in rows.items() if "epochs" in row)


def _format_metric(row: Row, metric: str) -> str:
    value = as_float(row[metric])
    if metric.startswith("acc") or metric == "token_accuracy":
        return format_percent(value)
    return f"{value:.4f}" if value < 100 else f"{value:,.0f}"


def _standard_error(row: Row, metric: str) -> str:
    """Of an accuracy over independent examples: measured, or sqrt(p (1 - p) / n); empty if unknown."""
    error, p, n = as_float(row.get(f"{metric}_stderr")), as_float(row.get(metric)), as_float(row.get("n_examples"))
    if not error > 0:
        error = math.sqrt(p * (1 - p) / n) if metric.startswith("acc") and n > 0 and 0 <= p <= 1 else 0
    return f"± {format_percent(error)}" if error else ""


def _sample(data: CardData) -> Row | None:
    """The newest sample of the first prompt, and a fence that the text cannot close."""
    if not data.samples:
        return None
    prompt, rows = next(iter(data.samples.items()))
    text = str(rows[-1]["text"])[:MAX_SAMPLE_CHARS]
    backticks = max(map(len, re.findall("`+", prompt + text)), default=0)
    return rows[-1] | {"prompt": prompt, "text": text, "fence": "`" * max(3, backticks + 1)}


def _precision(data: CardData) -> str:
    if data.config.train.precision != "auto":
        return data.config.train.precision
    # Earlier versions did not record it: they used bfloat16 on every GPU.
    usual = {"cuda": "bfloat16", "cpu": "float32"}.get(str(data.environment.get("device")), "")
    return str(data.environment.get("precision", usual))


def _hardware(data: CardData) -> dict[str, str]:
    environment, metrics = data.environment, data.metrics
    world_size, last = as_float(environment.get("world_size")), metrics.last()
    seconds, device_hours = metrics.training_s(), metrics.training_s() * world_size / 3_600
    evals_s = sum(as_float(row.get("seconds")) for rows in metrics.evals.values() for row in rows)
    tokens_per_s, mfu = as_float(last.get("tokens_per_s")), as_float(last.get("mfu"))
    versions = section(environment, "versions")
    commit = environment.get("git_commit")
    return {
        "devices": f"{world_size:.0f} x {environment.get('device_name')}" if world_size > 0 else "",
        "training": f"{format_duration(seconds)}, {device_hours:.3g} device hours" if device_hours > 0 else "",
        "evaluations": format_duration(evals_s) if evals_s > 0 else "",
        "throughput at the end": f"{tokens_per_s:,.0f} tokens/s" if tokens_per_s > 0 else "",
        "MFU at the end": format_percent(mfu) if mfu > 0 else "",
        "last started": environment.get("started", ""),
        "Python": environment.get("python", ""),
        "packages": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "code": f"commit `{commit}`{', changed' if environment.get('git_dirty') else ''}" if commit else "",
    }


def _dataset_repo(source: str) -> str | None:
    """The dataset repository on the Hub that a source names, if any."""
    kind, _, rest = source.partition(":")
    corpus = find_corpus(source)
    if corpus:
        return corpus.repo
    on_hub = kind == "hub" or (kind == "datasets" and not rest.startswith(("/", ".", "~")))
    return rest.partition(":")[0].partition("@")[0] if on_hub else None
