"""What a run is, as frozen dataclasses: `RunConfig` and its parts.

A config holds choices, never results: sizes that follow from others are properties, and the arithmetic over them is in
plan.py. `faults` in validate.py says what is wrong with one. Reading and writing JSON is here, so that a saved run can
be started again from its own config.json.
"""

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import UserError, did_you_mean
from .files import parse_json
from .migrations import CONFIG


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the Transformer and which part is used where."""

    vocab_size: int = 50_257
    """Tokens the tokenizer can produce."""
    vocab_multiple: int = 128
    """The embedding has rows up to the next multiple of this (1: no padding); padding rows are never predicted."""
    max_seq_len: int = 2_048
    """Context, in tokens."""
    d_model: int = 768
    """Width of the residual stream."""
    n_layers: int = 12
    """Transformer blocks."""
    n_heads: int = 12
    """Query heads of each attention."""
    n_kv_heads: int | None = None
    """Key and value heads; fewer than n_heads is grouped-query attention. None: as many as n_heads."""
    head_dim: int | None = None
    """Width of each head. None: d_model / n_heads."""
    d_ff: int = 3_072
    """Width inside the feed-forward part."""
    position: Literal["rope", "learned"] = "rope"
    """Rotary position embeddings, or a learned vector for each position."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalization before each attention and feed-forward part, and before the head."""
    norm_eps: float = 1e-5
    """Added to the variance in each norm."""
    activation: Literal["swiglu", "gelu", "relu2"] = "swiglu"
    """Of the feed-forward part; relu2 is the square of ReLU."""
    bias: bool = False
    """Biases on every linear but the head, and on LayerNorm."""
    tie_embeddings: bool = True
    """The head shares the embedding's weight."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before the rotation."""
    dropout_embedding: float = 0.0
    """On the embedded tokens."""
    dropout_attention_residual: float = 0.0
    """On the attention output, before it is added to the residual stream."""
    dropout_ffn: float = 0.0
    """On the activation inside the feed-forward part, before the down projection."""
    residual_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the residual stream in training. With bfloat16, less memory and memory traffic, and it is rounded at each sum;
    only where train.precision comes to bfloat16, in float32 it changes nothing. Norms compute in float32 either way."""
    init: Literal["gpt2", "reference"] = "gpt2"
    """Initial weights: gpt2 scales residual projections by 1 / sqrt(2 n_layers); reference is LF_LLM-269M's."""

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it is cut into shards. Same values, same bytes on disk."""

    source: str = "python-stdlib"
    """A known source (`myllm data list`), hub:NAMESPACE/NAME[:GLOB], or files:PATH for a file, folder or glob of one's
    own."""
    dataset: str | None = None
    """Train on this prepared data set (a name under temp_data/datasets, or a folder) instead of looking for the
    source's own."""
    tokenizer: str = "r50k_base"
    """GPT-2's vocabulary, or the path of a tokenizer.json."""
    text_column: str | None = None
    """Column or key that holds the text. None: the source's own, which is "text" where nothing else is known."""
    val_tokens: int = 10_000_000
    """Held out for validation: whole documents, at most this many tokens and at most a tenth of the text."""
    target_tokens: int | None = None
    """Stop after this many training tokens. None: all there are."""
    max_documents: int | None = None
    """Stop after this many documents. None: all there are."""
    shard_tokens: int = 100_000_000
    """Tokens a shard file."""
    shuffle_files: bool = True
    """Take the source's files, and the parts of a large one, in a seeded order."""
    shuffle_seed: int = 0
    """Seed of that order."""
    normalize_unicode: bool = False
    """Bring every text to Unicode's form NFC."""
    strip_control: bool = False
    """Remove control characters but tab, newline and carriage return."""
    min_chars: int = 0
    """Drop shorter documents."""
    dedup_exact: bool = False
    """Keep the first of several documents with the same tokens."""
    fallback: str | None = None
    """Take this source without asking if the other cannot be reached."""
    keep_downloads: bool = False
    """Keep downloaded files once their tokens are safe."""
    workers: int = 0
    """Processes that tokenise (0: one a core). Never changes the bytes."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate over the run."""

    max_lr: float = 6e-4
    """Learning rate after the warm-up."""
    min_lr_ratio: float = 0.1
    """The rate at the end, as a share of max_lr."""
    warmup_steps: int = 250
    """Updates of linear warm-up; at most a quarter of train.max_steps is used."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """Decay after the warm-up; wsd holds max_lr, then falls linearly over the last decay_fraction of the steps."""
    decay_fraction: float = 0.2
    """Fraction of the steps over which wsd decays."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    eps: float = 1e-8
    """AdamW's epsilon, added to the root of the second moment."""
    weight_decay: float = 0.1
    """On matrices, embeddings included; never on biases and norms."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, in what pieces, on what."""

    max_steps: int = 19_073
    """Optimizer updates."""
    epochs: float | None = None
    """Instead of max_steps: passes over the data, such as 3 or 0.5. Becomes max_steps, which the run's config.json has,
    once the data are prepared: training begins only then. None: max_steps."""
    batch_tokens: int = 524_288
    """Tokens a step over all ranks. The number of ranks never changes it."""
    micro_batch_size: int | Literal["auto"] = 16
    """Sequences a rank pushes through at once; accumulation makes up the rest of batch_tokens. auto: the most that the
    memory holds, tried out at the first start; the run's config.json has the number, and a resume takes it."""
    seed: int = 1_337
    """Seed of the weights, the order of the data and dropout."""
    log_every_steps: int = 10
    """Steps between two rows of metrics.jsonl and lines of the log."""
    save_every_steps: int = 500
    """Steps between two checkpoints (0: only where training ends or stops)."""
    keep_last: int = 3
    """Checkpoints kept (0: all)."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this are made too, and kept for ever beyond the newest (0: none)."""
    early_stop_patience: int | None = None
    """Stop after this many validations in a row without a new lowest loss, and keep the best checkpoint apart, in the
    run's best/. None: neither."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA if there is a GPU, else MPS on a Mac, else the CPU."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of matrix products, by autocast; weights are float32 in any case. auto: bfloat16 on CUDA, float16 with a loss
    scale on cards that have no bfloat16 (T4, V100), float32 elsewhere."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on CUDA, where Triton is installed and runs on the card."""
    compile_unit: Literal["block", "model"] = "block"
    """What torch.compile makes one graph of: a block, for all of them, and the loss; or the whole model, which takes
    several times as long to compile. FSDP and activation checkpointing always take blocks."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several ranks: ddp has all weights on each; fsdp a part of each matrix, its gradient and its moments, and
    the whole of one block at a time while it computes."""
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"
    """The kernel of attention in training that comes first; where it cannot do the shapes, the next one does. auto:
    cuDNN's on Hopper and data-centre Blackwell, else flash. math: no fused kernel, to compare with; it holds all T x T
    scores, which no estimate of memory counts. Evaluations and generation never use cuDNN's."""
    deterministic: bool = False
    """Steps that repeat themselves bit for bit on CUDA too, with slower kernels. A CPU's do in any case."""
    activation_checkpointing: bool = False
    """Keep only what goes into each block and compute the rest again for its gradient: less memory, a third more
    arithmetic, the same numbers."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """If a loss or a gradient is not finite: stop with an anomaly dump, or skip this update and continue."""
    skip_spikes_sigma: float | None = None
    """Leave out updates whose gradient norm is a spike: its logarithm so many standard deviations above the mean of
    about the last 128 steps. 6 is a careful choice. None: make them all."""
    max_skipped_steps: int = 10
    """Stop with an anomaly dump once more consecutive updates than this were skipped. 0: at the first."""
    max_wall_s: float | None = None
    """Save and stop before the process has run for so many seconds, with exit code 75. None: no limit."""
    collective_timeout_s: float = 300.0
    """End all ranks when one keeps the others waiting for so long in a step. The first step, evaluations and saves
    have half an hour."""
    fresh: bool = False
    """Start over: an older run of this name is moved aside, never deleted."""


@dataclass(frozen=True)
class EvalConfig:
    """What is measured along the way. Each is also done before the first step and after the last; 0 turns it off."""

    validation_every_steps: int = 250
    """Steps between two measurements of the loss on held-out text."""
    validation_tokens: int = 7_864_320
    """Of the held-out stream, from its start; the same tokens each time."""
    cloze_every_steps: int = 1_000
    """Steps between two cloze tests: pick the true continuation of held-out text out of four."""
    cloze_examples: int = 500
    """Examples of each cloze test."""
    hellaswag_every_steps: int = 1_000
    """Steps between two HellaSwag evaluations."""
    hellaswag_examples: int | None = None
    """The first so many of the validation split. None: all 10,042."""
    hellaswag_file: str | None = None
    """A .jsonl or .parquet file of HellaSwag's rows. None: the Hub's, downloaded once."""
    sample_every_steps: int = 1_000
    """Steps between two rounds of sample texts."""
    sample_prompts: tuple[str, ...] = ("Hello, I'm a language model,", "The meaning of life is", "Once upon a time")
    """Texts to continue."""
    sample_new_tokens: int = 64
    """Tokens of each sample."""
    sample_temperature: float = 0.8
    """0: always the most likely token. 1: the model's own distribution."""
    sample_top_k: int = 50
    """Draw among this many most likely tokens (0: all)."""


@dataclass(frozen=True)
class HubConfig:
    """Publishing on the Hugging Face Hub. It changes nothing about the run itself."""

    repo: str | None = None
    """Publish the model there, NAMESPACE/NAME, when training is over. None: nowhere."""
    private: bool = False
    """A repository that is made for it is private."""
    every_checkpoint: bool = False
    """Publish each checkpoint that is kept too, while training goes on."""
    license: str | None = None
    """Of the weights, by the Hub's short name for it, such as mit or apache-2.0."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    name: str = "default"
    """The run's folder is temp_data/runs/NAME. The same name resumes."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    hub: HubConfig = field(default_factory=HubConfig)


# -- JSON -------------------------------------------------------------------------------------------------------------


def to_dict(config: RunConfig) -> dict[str, Any]:
    """A config as plain JSON values, with the version of their keys."""
    return CONFIG.stamp(json.loads(json.dumps(dataclasses.asdict(config))))


def from_dict(values: Any, base: RunConfig, where: object = None) -> RunConfig:
    """`base` with the given values laid over it: those of today's version, or of an earlier one.

    Args:
        where: the file that they are from, for messages about its version.

    Raises:
        UserError: a later version; or names every unknown key (with the nearest known one) and every value of a wrong
            type at once.
    """
    faults: list[str] = []
    values = CONFIG.upgrade(values, where) if isinstance(values, dict) else values
    config = _overlay(values, base, "", faults)
    if faults:
        raise UserError("the config does not fit:\n" + "\n".join(f"  - {fault}" for fault in faults))
    return config


def load_config(path: Path, base: RunConfig) -> RunConfig:
    """The config in a JSON file, laid over `base`: a run's config.json, or a hand-written file with a few keys."""
    return from_dict(read_config_json(path), base, path)


def read_config_json(path: Path) -> Any:
    """What a JSON file says, to be laid over configs by `from_dict`."""
    try:
        if path.is_char_device():  # some never end
            raise UserError(f"cannot read the config {path}: it is a device, expected a file or a pipe")
        return parse_json(path.read_bytes(), f"the config {path}")
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None


def saved_config(values: Any, where: object) -> RunConfig:
    """A run's config as this program or an earlier version saved it. Settings that it did not know have their default.

    Raises:
        UserError: it says what this version does not know.
    """
    try:
        return from_dict(values, RunConfig(), where)
    except UserError as error:
        raise UserError(f"cannot use {where}: {error}") from None


def _overlay(values: Any, base: Any, prefix: str, faults: list[str]) -> Any:
    where = prefix.rstrip(".") or "the config"
    if not isinstance(values, dict):
        faults.append(f"{where}: expected an object of settings, found {values!r}")
        return base
    hints = typing.get_type_hints(type(base))
    changes = {}
    for key, value in values.items():
        if key not in hints:
            faults.append(f"{prefix}{key}: unknown key{did_you_mean(key, list(hints))}")
        elif dataclasses.is_dataclass(hints[key]):
            changes[key] = _overlay(value, getattr(base, key), f"{prefix}{key}.", faults)
        else:
            try:
                changes[key] = _convert(value, hints[key])
            except TypeError as error:
                faults.append(f"{prefix}{key}: expected {error}, found {value!r}")
    return dataclasses.replace(base, **changes)


def _convert(value: Any, hint: Any) -> Any:
    """A JSON value as the annotated type; TypeError says what was expected."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in choices:
            raise TypeError("one of " + ", ".join(map(str, choices)) if len(choices) > 1 else repr(choices[0]))
        return value
    if origin in (types.UnionType, typing.Union):  # `X | None`, or `int | Literal["auto"]`
        return _convert_to_one_of(value, choices)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError("a list")
        return tuple(_convert(item, choices[0]) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # JSON writes 1e9 as a float; a whole one is as good as an integer.
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError({int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[hint])
    return value


def _convert_to_one_of(value: Any, choices: tuple[Any, ...]) -> Any:
    """As `_convert`, to the first type of a union that takes the value; None is not named among what was expected."""
    if value is None and types.NoneType in choices:
        return None
    expected = []
    for choice in choices:
        if choice is not types.NoneType:
            try:
                return _convert(value, choice)
            except TypeError as error:
                expected.append(str(error))
    raise TypeError(" or ".join(expected))
