"""The card of a published model: a README.md in the Hub's format, made from what the run wrote about itself.

    config.json, environment.json, metrics.jsonl, samples.jsonl ─▶ About ─▶ model_card ─▶ Markdown

A card is a function of these files and of a step alone: nothing of the clock, of the account or of this machine's
folders goes into it.
"""

import math
import re
import shlex
from dataclasses import dataclass, replace
from typing import Any

from myllm.config import RunConfig, saved_config
from myllm.data.sources.catalog import actual_source, find_corpus
from myllm.errors import UserError
from myllm.formatting import format_duration, format_number, format_percent, format_si
from myllm.paths import RunPaths
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
)

SAMPLE_CHARACTERS = 600
NAMES = {
    "loss": "loss, nats per token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "token_accuracy": "accuracy of the next token",
    "acc": "accuracy, by the sum of log-probabilities",
    "acc_norm": "accuracy, by their mean",
    "acc_blind": "accuracy without the context, by how frequent each token is",
}
_LOCAL_FOLDER = re.compile(r"(?:^|(?<=[:=]))(?:~|/(?!/))\S*/")


@dataclass(frozen=True)
class CardData:
    """What a card says, up to one step."""

    name: str
    repo: str
    step: int
    license: str | None
    config: RunConfig
    environment: Row
    metrics: Metrics | None
    samples: dict[str, list[Row]]
    exported: Row
    """The config.json that goes with the weights, and `tokenizer`, what their vocabulary says of itself."""
    imported: str | None = None
    """Where the weights that training began with came from; None: from nothing."""


def read_card_data(run: RunPaths, step: int, repo: str, license: str | None, exported: Row) -> CardData:
    """Everything a run wrote up to `step`; what is missing is left out of the card."""
    try:
        metrics = truncate_metrics(read_metrics(run.metrics), step)
    except UserError:
        metrics = None
    samples = read_samples(run.samples) if run.samples.is_file() else {}
    samples = {prompt: kept for prompt, rows in samples.items() if (kept := [r for r in rows if r["step"] <= step])}
    config, environment = saved_config(read_json_or_empty(run.config), run.config), read_json_or_empty(run.environment)
    source = actual_source(config.data.source, config.data.dataset, get_text(environment, "source"))
    config = replace(config, data=replace(config.data, source=source))
    return CardData(
        run.root.name, repo, step, license, config, environment, metrics, samples, exported,
        get_text(read_json_or_empty(run.imported), "source"),
    )  # fmt: skip


def truncate_metrics(metrics: Metrics, step: int) -> Metrics | None:
    """The rows of the first `step` steps; None if there are none."""
    evals = {name: [row for row in rows if row["step"] <= step] for name, rows in metrics.evals.items()}
    evals = {name: rows for name, rows in evals.items() if rows}
    train = [row for row in metrics.train if row["step"] <= step]
    return Metrics(train, evals) if train or evals else None


def render_model_card(about: CardData, curves: list[str]) -> str:
    """The card as Markdown, with the Hub's front matter.

    Args:
        curves: the plots that lie in plots/ beside it, by name.
    """
    sections = (
        _heading(about),
        _curve("loss") if "loss" in curves else "",
        _loading(about),
        _results(about),
        _sample(about),
        _model(about),
        _data(about),
        _recipe(about),
        _curves([name for name in curves if name != "loss"]),
        _machine(about),
        LIMITATIONS,
        _license(about),
        FILES,
    )
    return f"---\n{_front_matter(about)}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def strip_local_paths(text: str) -> str:
    """ "files:/home/me/texts" as "files:texts": where things lie on somebody's disk is nobody else's business."""
    return _LOCAL_FOLDER.sub("", text)


LIMITATIONS = """## Limitations

- A base model: it goes on with a text. It was not taught to answer, to follow instructions or to refuse.
- What it writes may be false, biased or offensive, as text it was trained on may be; nothing was filtered from its
  output, and nobody tested it for harm. It knows nothing that its data do not say.
- The figures above are of this project's own evaluations; other harnesses ask in other ways and find other numbers."""

FILES = """## Files

The weights, `config.json` and the tokenizer are in `transformers`' format. `training/` has what the run wrote:
`config.json` (every setting), `environment.json` and `metrics.jsonl` (every number, up to this step). Revisions
`step-N` are checkpoints after N steps."""


def _front_matter(about: CardData) -> str:
    from huggingface_hub import ModelCardData

    repo = None if about.imported and about.step == 0 else _dataset_repo(about.config.data.source)
    datasets, source = [repo] if repo else None, (about.imported or "").partition("@")[0]
    return ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", license=about.license, datasets=datasets,
        base_model=source if "/" in source else None,
        tags=["myllm", "pretrained"],
    ).to_yaml()  # fmt: skip


def _heading(about: CardData) -> str:
    parameters = as_float(about.environment.get("parameters"))
    size = f" of {format_si(parameters)} parameters" if parameters > 0 else ""
    source = about.imported and f"the weights of {about.imported}"
    origin = f"trained further with MyLLM from {source}" if source else "trained from nothing with MyLLM"
    if source and about.step == 0:
        origin = f"{source}, imported with MyLLM and not trained further"
    text = f"# {about.name}\n\nA language model{size}: {origin}. It continues text" + (
        "." if source else "; it was not taught to follow instructions."
    )
    if about.imported and about.step == 0:
        return text
    planned = about.config.train.max_steps
    if about.step < planned:
        text += f" This revision is step {about.step:,} of {planned:,}: training was not over."
    return text


def _curve(name: str) -> str:
    from myllm.runs.report.plots import PLOTS  # brings Matplotlib

    return f"![{PLOTS[name].description}](plots/{name}.png)"


def _curves(names: list[str]) -> str:
    if not names:
        return ""
    cells = [*map(_curve, names), ""][: len(names) + len(names) % 2]  # two beside each other
    rows = [f"| {left} | {right} |" for left, right in zip(cells[::2], cells[1::2], strict=True)]
    return "\n".join(["## Curves", "", "| | |", "|---|---|", *rows])


def _loading(about: CardData) -> str:
    return f"""## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{about.repo}"
tokenizer = AutoTokenizer.from_pretrained(name, revision="step-{about.step}")
model = AutoModelForCausalLM.from_pretrained(name, revision="step-{about.step}")
ids = tokenizer("Once upon a time", return_tensors="pt")
made = model.generate(**ids, max_new_tokens=50)
print(tokenizer.decode(made[0], skip_special_tokens=True))
```"""


# -- figures ----------------------------------------------------------------------------------------------------------


def _results(about: CardData) -> str:
    if about.metrics is None or not about.metrics.evals:
        return ""
    lines = ["| evaluation | figure | value | standard error | measured on |", "|---|---|---:|---:|---|"]
    for name in about.metrics.evals:
        lines += _figures(name, about.metrics.last(name), about.step)
    note = "No standard error is given where the single measurements (tokens of one text) are not independent."
    if any(chance_accuracy(name, about.metrics.last(name)) for name in about.metrics.evals):
        note += " Chance in a choice of four is 25 %."
    return "\n".join(["## Results", "", *lines, "", note])


def _figures(name: str, row: Row, step: int) -> list[str]:
    """Lines of the table for one evaluation's newest row."""
    keys = [key for key in row if key in NAMES]
    examples, tokens = as_float(row.get("n_examples")), as_float(row.get("n_tokens"))
    on = f"{examples:,.0f} examples" if examples > 0 else f"{tokens:,.0f} held-out tokens" if tokens > 0 else ""
    if row["step"] != step:
        on = ", ".join(filter(None, [on, f"at step {row['step']:,}"]))
    lines = []
    for key in keys:
        value, is_share = as_float(row[key]), key.startswith("acc") or key.endswith("accuracy")
        shown = format_percent(value) if is_share else f"{value:.4f}" if value < 100 else f"{value:,.0f}"
        error = _standard_error(row, key)
        lines.append(f"| {name} | {NAMES[key]} | {shown} | {f'± {format_percent(error)}' if error else ''} | {on} |")
    return lines


def _standard_error(row: Row, key: str) -> float:
    """Of a share of independent examples: measured, or sqrt(p (1 - p) / n). 0 where it is unknown."""
    measured, share, n = as_float(row.get(f"{key}_stderr")), as_float(row.get(key)), as_float(row.get("n_examples"))
    if measured > 0:
        return measured
    return math.sqrt(share * (1 - share) / n) if key.startswith("acc") and n > 0 and 0 <= share <= 1 else 0.0


def _sample(about: CardData) -> str:
    if not about.samples:
        return ""
    prompt, rows = next(iter(about.samples.items()))
    text = str(rows[-1]["text"])[:SAMPLE_CHARACTERS]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", prompt + text)), default=0))
    seed = f" (seed {rows[-1]['seed']}, the first that came)" if "seed" in rows[-1] else ""
    prompted = f"What it makes of the prompt `{' '.join(prompt.split())}` at step {rows[-1]['step']:,}{seed}:"
    return f"## A sample\n\n{prompted}\n\n{fence}text\n{prompt}{text}\n{fence}"


# -- tables -----------------------------------------------------------------------------------------------------------


def _table(title: str, facts: dict[str, Any]) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in facts.items() if value not in (None, "")]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _model(about: CardData) -> str:
    model = about.config.model
    heads = f"{model.n_heads} of {model.head_size}"
    if model.kv_heads != model.n_heads:
        heads += f", {model.kv_heads} for keys and values"
    norm = "RMSNorm" if model.norm == "rmsnorm" else "LayerNorm"
    return _table(
        "Model",
        {
            "architecture": ", ".join(map(str, about.exported.get("architectures") or [])),
            "parameters": _count(about.environment.get("parameters")),
            "stored as": about.exported.get("dtype") or about.exported.get("torch_dtype"),
            "layers": f"{model.n_layers} of {model.d_model}, feed-forward {model.d_ff:,} ({model.activation})",
            "attention heads": heads + (", queries and keys normalized" if model.qk_norm else ""),
            "normalisation": f"{norm}, eps {model.norm_eps:g}",
            "positions": f"rotary, theta {model.rope_theta:,.0f}" if model.position == "rope" else "learned",
            "context": f"{model.max_seq_len:,} tokens",
            "vocabulary": f"{model.vocab_size:,} tokens, {_tokenizer(about)}",
            "embedding and head": "shared" if model.tie_embeddings else "separate",
        },
    )


def _tokenizer(about: CardData) -> str:
    """By the vocabulary that goes with the weights; a run's config need not name it."""
    said = about.exported.get("tokenizer") or about.environment.get("tokenizer")
    name = said.get("name") if isinstance(said, dict) else strip_local_paths(about.config.data.tokenizer)
    return "GPT-2's (r50k_base)" if name == "r50k_base" else f"its own ({name})"


def _data(about: CardData) -> str:
    if about.imported and about.step == 0:
        return ""  # nothing of ours: the config's settings have never been used
    data, corpus, environment = about.config.data, find_corpus(about.config.data.source), about.environment
    have = as_float(environment.get("train_tokens"))
    seen = about.step * about.config.train.batch_tokens
    cleaning = {
        "Unicode's form NFC": data.normalize_unicode,
        "control characters removed": data.strip_control,
        f"documents of at least {data.min_chars} characters": data.min_chars > 0,
        "exact copies removed": data.dedup_exact,
    }
    repo = _dataset_repo(data.source)
    link = f"[{repo}](https://huggingface.co/datasets/{repo})" if repo else ""
    return _table(
        "Data",
        {
            "source": ", ".join(filter(None, [strip_local_paths(str(environment.get("source") or data.source)), link])),
            "what it is": corpus and corpus.description,
            "its license": corpus and corpus.license,
            "tokens seen": f"{seen:,}"
            + (f", {format_number(seen / have)} passes over {have:,.0f}" if have > 0 else ""),
            "held out for validation": _count(environment.get("val_tokens"), " tokens"),
            "cleaning": ", ".join(name for name, on in cleaning.items() if on) or "none",
            "prepared data set": environment.get("dataset") and f"`{environment['dataset']}`",
            "sha256 of what made it": environment.get("dataset_hash") and f"`{environment['dataset_hash']}`",
        },
    )


def _recipe(about: CardData) -> str:
    if about.imported and about.step == 0:
        return ""
    optim, train, model = about.config.optim, about.config.train, about.config.model
    dropouts = (model.dropout_embedding, model.dropout_attention_residual, model.dropout_ffn)
    precision = train.precision
    if precision == "auto":
        # Runs from before it was written down computed in bfloat16 on every GPU.
        usual = "bfloat16" if about.environment.get("device") == "cuda" else "float32"
        precision = str(about.environment.get("precision", usual))
    warmup = warmup_steps(optim, train.max_steps)
    schedule = f"{optim.schedule}, {warmup:,} steps of warm-up, ends at {optim.min_lr_ratio:g} of the peak"
    table = _table(
        "Recipe",
        {
            "steps": f"{about.step:,} of {train.max_steps:,}",
            "batch": f"{train.batch_tokens:,} tokens a step, in sequences of {model.max_seq_len:,}",
            "optimizer": f"AdamW, betas {optim.beta1:g} and {optim.beta2:g}, eps {optim.eps:g}",
            "weight decay": f"{optim.weight_decay:g}, on matrices and embeddings",
            "learning rate": f"peak {optim.max_lr:g}; {schedule}",
            "gradient clipping": f"norm {optim.max_grad_norm:g}",
            "dropout": " / ".join(f"{p:g}" for p in dropouts) if any(dropouts) else "none",
            "precision": precision if precision == "float32" else f"{precision} autocast, float32 weights",
            "seed": train.seed,
        },
    )
    command = about.environment.get("command")
    words = [strip_local_paths(str(word)) for word in command] if isinstance(command, list) else []
    return f"{table}\n\n```sh\n{shlex.join(words)}\n```" if words else table


def _machine(about: CardData) -> str:
    environment, metrics = about.environment, about.metrics
    world_size = as_float(environment.get("world_size"))
    seconds = metrics.training_s() if metrics and metrics.train else math.nan
    last = metrics.last() if metrics else {}
    device_hours = seconds * world_size / 3_600
    hours = f"{format_duration(seconds)}, {device_hours:.3g} device hours" if math.isfinite(device_hours) else ""
    evals_s = sum(as_float(row.get("seconds")) for rows in metrics.evals.values() for row in rows) if metrics else 0
    versions = environment.get("versions")
    commit = environment.get("git_commit")
    return _table(
        "Hardware, hours, environment",
        {
            "devices": f"{world_size:.0f} x {environment.get('device_name')}" if world_size > 0 else None,
            "training": hours,
            "evaluations": format_duration(evals_s) if evals_s > 0 else None,
            "speed, at the end": _count(last.get("tokens_per_s"), " tokens/s")
            + (f", {format_percent(as_float(last['mfu']))} MFU" if as_float(last.get("mfu")) > 0 else ""),
            "last started": environment.get("started"),
            "Python": environment.get("python"),
            "packages": ", ".join(f"{k} {v}" for k, v in versions.items() if v) if isinstance(versions, dict) else None,
            "code": commit and f"commit `{commit}`" + (", changed" if environment.get("git_dirty") else ""),
        },
    )


def _license(about: CardData) -> str:
    mine = f"These weights are under `{about.license}`." if about.license else "None was given to these weights."
    corpus = find_corpus(about.config.data.source)
    untrained = about.imported and about.step == 0
    data = f" The data they were trained on are under {corpus.license}." if corpus and not untrained else ""
    if about.imported:
        data += f" What {about.imported} was published under holds too."
    return f"## License\n\n{mine}{data} The code that trained them is under MIT."


def _dataset_repo(source: str) -> str | None:
    """The Hub's data set that a source names."""
    kind, _, rest = source.partition(":")
    corpus = find_corpus(source)
    return corpus.repo if corpus else rest.partition(":")[0].partition("@")[0] if kind == "hub" else None


def _count(value: Any, unit: str = "") -> str:
    return f"{as_float(value):,.0f}{unit}" if as_float(value) > 0 else ""
