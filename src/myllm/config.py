"""Settings of a run, as frozen dataclasses: `RunConfig` and its parts, and their JSON form.

A config holds choices only. Sizes that follow from them are properties; planning/ does the arithmetic and
`planning.config_checks` checks the values.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import UserError, bullets
from .files import parse_json
from .migrations import CONFIG, dataclass_from_json


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of the Transformer."""

    vocab_size: int = 50_257
    """Number of tokens in the tokenizer."""
    vocab_multiple: int = 128
    """Round the rows of the embedding up to a multiple of this (1: no padding). Padding is never predicted."""
    max_seq_len: int = 2_048
    """Context length, in tokens."""
    d_model: int = 768
    """Width of the residual stream."""
    n_layers: int = 12
    """Number of Transformer blocks."""
    n_heads: int = 12
    """Query heads per attention layer."""
    n_kv_heads: int | None = None
    """Key and value heads; fewer than n_heads is grouped-query attention (default: n_heads)."""
    head_dim: int | None = None
    """Width of one attention head (default: d_model / n_heads)."""
    d_ff: int = 3_072
    """Hidden width of the feed-forward network."""
    position: Literal["rope", "learned"] = "rope"
    """Rotary position embeddings (RoPE), or one learned vector per position."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: tuple[float, ...] = ()
    """Lower the slow rotary frequencies as Llama 3.1 does: factor, low_freq_factor, high_freq_factor and context of
    pretraining, 32 1 4 8192 in Llama 3.2. Empty: unchanged."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalization before each attention and feed-forward layer, and before the head."""
    norm_eps: float = 1e-5
    """Epsilon added to the variance in each norm."""
    activation: Literal["swiglu", "gelu", "relu2"] = "swiglu"
    """Activation of the feed-forward network; relu2 is the square of ReLU."""
    bias: bool = False
    """Use biases in LayerNorm and in every linear layer except the head."""
    tie_embeddings: bool = True
    """Share one weight between the embedding and the head."""
    qk_norm: bool = False
    """Apply RMSNorm to each query and key head before the rotation."""
    embedding_norm: bool = False
    """Normalize the token embeddings too. Needs tie_embeddings false; exports fold the norm into the table."""
    residual_scales: bool = False
    """Multiply the residual stream by a learned number before each block; exports fold them into the projections."""
    dropout_embedding: float = 0.0
    """Dropout on the token embeddings."""
    dropout_attention_residual: float = 0.0
    """Dropout on the attention output, before it is added to the residual stream."""
    dropout_ffn: float = 0.0
    """Dropout on the activation of the feed-forward network, before the down projection."""
    residual_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the residual stream in training; bfloat16 saves memory if train.precision is bfloat16 too."""
    init: Literal["gpt2", "reference", "zero_residual"] = "gpt2"
    """Initial weights. gpt2 scales residual projections by 1 / sqrt(2 n_layers); reference is that of LF_LLM-269M;
    zero_residual is the same but for residual projections, which are 0: at first each block adds nothing."""

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
class InitConfig:
    """The weights that a new run begins with."""

    source: str | None = field(default=None, metadata={"option": "from"})
    """A run, a checkpoint, a transformers folder, or NAMESPACE/NAME[@REVISION] on the Hub (default: new weights)."""
    keep_optimizer: bool = False
    """Take over the optimizer's moments too, where the source has them."""


@dataclass(frozen=True)
class DataConfig:
    """The training text and how it is stored in shards. The same values always give the same bytes."""

    source: str = "python-stdlib"
    """A known source (`myllm data list`), hub:NAMESPACE/NAME[:GLOB], datasets:NAME[:CONFIG][:SPLIT], files:PATH, or a
    mixture such as "A:0.7 B:0.3"."""
    dataset: str | None = None
    """Train on this prepared data set (a name in temp_data/datasets, a folder, or a mixture) instead of the source."""
    tokenizer: str = "r50k_base"
    """GPT-2's tokenizer (r50k_base), the path of a tokenizer.json, or train:N: learn N tokens from the source first."""
    text_column: str | None = None
    """Column or key of the text, `a.b` for a nested one, or a template "{title}\\n{text}" (default: the source's)."""
    suffixes: tuple[str, ...] = field(default=(), metadata={"option": "suffix"})
    """Also read local files with these suffixes, such as .rst .html, as plain text."""
    val_tokens: int = 10_000_000
    """Hold out whole documents for validation: at most this many tokens and at most a tenth of the text."""
    target_tokens: int | None = None
    """Stop after this many training tokens (default: use all)."""
    max_documents: int | None = None
    """Stop after this many documents (default: use all)."""
    shard_tokens: int = 100_000_000
    """Tokens per shard file."""
    shuffle_files: bool = True
    """Read the files of the source, and the parts of large files, in a random but reproducible order."""
    shuffle_seed: int = 0
    """Seed of that order."""
    normalize_unicode: bool = False
    """Normalize the text to Unicode NFC."""
    strip_control: bool = False
    """Remove control characters except tab, newline and carriage return."""
    min_chars: int = 0
    """Drop documents with fewer characters."""
    dedup_exact: bool = False
    """Drop documents whose tokens are equal to those of an earlier document."""
    fallback: str | None = None
    """Use this source, without asking, if the other one cannot be reached."""
    keep_downloads: bool = False
    """Keep downloaded files after their tokens have been written."""
    workers: int = 0
    """Processes that tokenize (0: one per core). Does not change the bytes."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate schedule."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: AdamW for all parameters. muon: Muon for the matrices inside the blocks, AdamW for the rest."""
    max_lr: float = 6e-4
    """AdamW's peak learning rate, after the warmup."""
    min_lr_ratio: float = 0.1
    """Final learning rate, as a fraction of the peak."""
    warmup_steps: int = 250
    """Steps of linear warmup; at most a quarter of train.max_steps is used."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """Decay after the warmup. wsd holds the peak, then decays over the last decay_fraction of the steps."""
    decay_fraction: float = 0.8
    """Fraction of the steps over which wsd decays. In short runs a long decay is better: 0.2 instead of 0.8 costs
    0.05 nats at 300M parameters and 6B tokens."""
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of wsd's decay; sqrt is 1 - sqrt(progress), which falls fastest at first."""
    beta1: float = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: float = 0.95
    """AdamW's decay rate of the second moment."""
    eps: float = 1e-8
    """AdamW's epsilon, added to the square root of the second moment."""
    weight_decay: float = 0.1
    """Weight decay of matrices, AdamW's and Muon's, times the learning rate. Biases and norms have none."""
    decay_embeddings: bool = True
    """Apply weight_decay to the embedding, the head and learned positions too."""
    cautious_decay: bool = False
    """Decay only the weights that the update moves toward zero (Chen et al. 2025)."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this norm."""
    muon_lr: float = 0.01
    """Muon's peak learning rate. It follows the same schedule; its size depends on muon_scale."""
    muon_scale: Literal["original", "match_rms_adamw"] = "original"
    """Scale of Muon's update. original: sqrt(max(1, rows / columns)). match_rms_adamw: 0.2 sqrt(max(rows, columns)),
    so that muon_lr is of the size of AdamW's."""
    muon_momentum: float = 0.95
    """Muon's momentum (Nesterov), after its warmup."""
    muon_momentum_start: float = 0.85
    """Muon's momentum at the first step."""
    muon_momentum_warmup_steps: int = 300
    """Steps over which the momentum rises; at most a quarter of train.max_steps is used."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop: length, batches, checkpoints, precision and limits."""

    max_steps: int = 19_073
    """Number of optimizer steps."""
    epochs: float | None = None
    """Passes over the data, such as 3 or 0.5, instead of max_steps. Training starts once the data is prepared."""
    max_epochs: float = 4.0
    """Refuse to train on a mixture that repeats one of its data sets more often than this."""
    batch_tokens: int = 524_288
    """Tokens per step, over all ranks. The number of ranks does not change it."""
    micro_batch_size: int | Literal["auto"] = 16
    """Sequences per forward pass of one rank. auto: the largest that fits in memory at the first start, then saved."""
    seed: int = 1_337
    """Seed of the weights, the data order and dropout."""
    log_every_steps: int = 10
    """Log metrics every N steps."""
    save_every_steps: int = 500
    """Save a checkpoint every N steps (0: only when training ends or stops)."""
    keep_last: int = 3
    """Number of newest checkpoints to keep (0: all)."""
    keep_every_steps: int = 0
    """Also save a checkpoint every N steps and keep it forever (0: none)."""
    early_stop_patience: int | None = None
    """Stop after this many validations without a new lowest loss; keep the best checkpoint in best/ of the run."""
    early_stop_on: str | None = None
    """Count the losses of this validation set, or of this component of a mixture (default: of all held-out text)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA if available, else MPS on a Mac, else the CPU."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of matrix products; weights are float32. auto: bfloat16 on CUDA (T4, V100: scaled float16), else float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Use torch.compile. auto: on CUDA, if Triton is installed and works on the GPU."""
    compile_unit: Literal["block", "model"] = "block"
    """What torch.compile turns into one graph: a block (shared by all blocks) and the loss, or the whole model, which
    takes several times as long to compile. FSDP and activation checkpointing always use blocks."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several ranks share the work. ddp: each has all weights. fsdp: each has a slice of every matrix, its gradient
    and its moments, and gathers one block at a time to compute."""
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"
    """Preferred attention kernel in training; unsupported shapes use the next one. auto: cuDNN on Hopper and data
    center Blackwell, else flash. math: no fused kernel, for comparison; memory estimates ignore its T x T scores."""
    deterministic: bool = False
    """Make steps reproducible bit for bit on CUDA too, with slower kernels. On a CPU they always are."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, a third more computation, the same results."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """If a loss or a gradient is not finite: stop with an anomaly dump, or skip this update and continue."""
    skip_spikes_sigma: float | None = None
    """Skip updates whose gradient norm is a spike: its logarithm is more than this many standard deviations above the
    mean of about the last 128 steps. 6 is a careful choice (default: never skip)."""
    max_skipped_steps: int = 10
    """Stop with an anomaly dump after more consecutive skipped updates than this (0: at the first)."""
    max_wall_s: float | None = None
    """Save and stop before the process has run for this many seconds, with exit code 75 (default: no limit)."""
    collective_timeout_s: float = 300.0
    """Stop all ranks if one keeps the others waiting this many seconds in a step (elsewhere: half an hour)."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Send the metrics to these experiment trackers too (docs/trackers.md)."""
    fresh: bool = False
    """Start over. An older run of the same name is moved aside, never deleted."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluations during training. Each also runs before the first step and after the last; 0 turns it off."""

    validation_every_steps: int = 250
    """Measure the loss on held-out text every N steps."""
    validation_tokens: int = 7_864_320
    """Tokens to evaluate, from the start of the held-out text."""
    validation_sets: tuple[str, ...] = ()
    """Also measure it on other text: NAME=DATASET, of its held-out part, or NAME=SOURCE. Rows validation/NAME."""
    cloze_every_steps: int = 1_000
    """Run the cloze test every N steps: choose the true continuation of held-out text among four."""
    cloze_examples: int = 500
    """Number of cloze examples."""
    hellaswag_every_steps: int = 1_000
    """Evaluate on HellaSwag every N steps."""
    hellaswag_examples: int | None = None
    """Use only the first N examples of the validation split (default: all 10,042)."""
    hellaswag_file: str | None = None
    """A .jsonl or .parquet file with the HellaSwag data (default: download it once from the Hub)."""
    tasks: tuple[str, ...] = ()
    """More tasks, each NAME or NAME:FILE: arc-easy, arc-challenge, piqa, openbookqa, winogrande, lambada."""
    tasks_every_steps: int = 1_000
    """Evaluate on these tasks every N steps."""
    tasks_examples: int | None = None
    """Use only the first N examples of each of these tasks (default: all)."""
    sample_every_steps: int = 1_000
    """Generate sample texts every N steps."""
    sample_prompts: tuple[str, ...] = ("Hello, I'm a language model,", "The meaning of life is", "Once upon a time")
    """Prompts of the sample texts (empty, and by default if you choose the text: beginnings of held-out documents)."""
    sample_new_tokens: int = 64
    """Tokens to generate for each prompt."""
    sample_temperature: float = 0.8
    """0: greedy, always the most likely token. 1: the distribution of the model."""
    sample_top_k: int = 50
    """Sample from the k most likely tokens (0: all)."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Copies of checkpoints. Does not affect training."""

    mirror: str | None = None
    """Copy checkpoints to URL/NAME (s3://, gs://, hf://, a folder); another machine resumes from there."""


@dataclass(frozen=True)
class HubConfig:
    """Publishing to the Hugging Face Hub. Does not affect training."""

    repo: str | None = None
    """Publish the model to this repository, NAMESPACE/NAME, when training ends (default: do not publish)."""
    private: bool = False
    """Make the repository private if it is created."""
    every_checkpoint: bool = False
    """Also publish each checkpoint that is kept, during training."""
    license: str | None = None
    """License of the weights, by its identifier on the Hub, such as mit or apache-2.0."""


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run."""

    name: str = "default"
    """Name of the run; its folder is temp_data/runs/NAME. Using the same name resumes it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    hub: HubConfig = field(default_factory=HubConfig)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """A config as plain JSON values, with the version of the format."""
    return CONFIG.stamp(json.loads(json.dumps(dataclasses.asdict(config))))


def from_dict(values: Any, base: RunConfig, source: object = None) -> RunConfig:
    """`base` with the given values, which may be in an earlier version of the format. A UserError names their `source`
    and all unknown keys and values of the wrong type."""
    values = CONFIG.upgrade(values, source) if isinstance(values, dict) else values
    errors: list[str] = []
    config = dataclass_from_json(RunConfig, values, errors, base)
    if errors:
        shown = f"the config {source}" if source else "the config"
        raise UserError(f"{shown} does not fit:\n{bullets(errors)}")
    return config


def load_config(path: Path, base: RunConfig) -> RunConfig:
    """`base` with the values in a JSON file: config.json of a run, or a hand-written file with a few keys."""
    return from_dict(read_config_json(path), base, path)


def read_config_json(path: Path) -> Any:
    """The content of a JSON file, for `from_dict`."""
    try:
        if path.is_char_device():  # reading some never ends
            raise UserError(f"cannot read the config {path}: it is a device, expected a file or a pipe")
        return parse_json(path.read_bytes(), f"the config {path}")
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None


def saved_config(values: Any, source: object) -> RunConfig:
    """A config that this program, or an earlier version, saved. Missing settings have their defaults."""
    return from_dict(values, RunConfig(), source)
