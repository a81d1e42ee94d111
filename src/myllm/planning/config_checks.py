"""Checks of a config: all errors at once, before anything is downloaded or allocated."""

import math
import os
import re
import sys
from collections.abc import Callable

from myllm.config import EvalConfig, HubConfig, ModelConfig, RunConfig, TrainConfig
from myllm.errors import UserError, bullets

from .batch import batch_plan

_REPO = re.compile(r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?/[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?", re.ASCII)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")

VALID: dict[str, Callable[[float], bool]] = {
    "at least 1": lambda value: value >= 1,
    "at least 0": lambda value: value >= 0,
    "above 0": lambda value: value > 0,
    "above 0 and finite": lambda value: 0 < value < math.inf,
    "at least 0 and finite": lambda value: 0 <= value < math.inf,
    "at least 0 and below 1": lambda value: 0 <= value < 1,
    "between 0 and 1": lambda value: 0 <= value <= 1,
}
RANGES = (
    ("at least 1", 10_000, "model.n_layers"),
    ("at least 1", 10**6, "model.vocab_multiple model.d_model model.n_heads model.n_kv_heads model.head_dim"),
    ("at least 1", 10**7, "model.d_ff model.vocab_size"),
    ("at least 1", 10**8, "model.max_seq_len"),
    ("at least 1", 10**9, "train.micro_batch_size eval.sample_new_tokens"),
    ("at least 1", 10**12,
     "train.max_steps train.batch_tokens train.log_every_steps train.early_stop_patience eval.cloze_examples "
     "eval.hellaswag_examples eval.tasks_examples"),
    ("at least 1", 10**15,
     "data.val_tokens data.shard_tokens data.target_tokens data.max_documents eval.validation_tokens"),
    ("at least 0", 4_096, "data.workers"),
    ("at least 0", 10**12,
     "data.min_chars optim.warmup_steps optim.muon_momentum_warmup_steps train.save_every_steps train.keep_last "
     "train.keep_every_steps train.max_skipped_steps eval.validation_every_steps eval.cloze_every_steps "
     "eval.hellaswag_every_steps eval.tasks_every_steps eval.sample_every_steps"),
    ("at least 0", math.inf, "data.shuffle_seed train.seed eval.sample_top_k"),
    ("above 0", math.inf, "train.max_epochs"),
    ("above 0 and finite", 10**6, "train.epochs"),
    ("above 0 and finite", math.inf,
     "model.rope_theta model.norm_eps optim.max_lr optim.muon_lr optim.eps optim.max_grad_norm "
     "train.skip_spikes_sigma train.max_wall_s"),
    ("above 0 and finite", 10**9, "train.collective_timeout_s"),
    ("at least 0 and finite", math.inf, "optim.weight_decay eval.sample_temperature"),
    ("at least 0 and below 1", math.inf,
     "model.dropout_embedding model.dropout_attention_residual model.dropout_ffn optim.beta1 optim.beta2 "
     "optim.muon_momentum optim.muon_momentum_start"),
    ("between 0 and 1", math.inf, "optim.min_lr_ratio optim.decay_fraction"),
)  # fmt: skip
"""What is expected, an upper limit, and of which settings. None and "auto" are always valid. Only a typo explains
numbers above the limits: sizes beyond any memory, counts beyond 64 bits."""


def check_config(config: RunConfig, world_size: int) -> None:
    """
    Raises:
        UserError: the config cannot be trained; lists every error.
    """
    _raise(config_errors(config, world_size))


def check_name(name: str) -> None:
    """
    Raises:
        UserError: no name for a run's folder.
    """
    _raise(name_errors(name))


def check_data_config(config: RunConfig) -> None:
    """`check_config` for the data settings alone."""
    _raise([error for error in _out_of_range(config) if error.startswith("data.")])


def _raise(errors: list[str]) -> None:
    if errors:
        raise UserError(f"the config has {len(errors)} error{'s' * (len(errors) > 1)}:\n{bullets(errors)}")


def config_errors(config: RunConfig, world_size: int) -> list[str]:
    """One sentence per error: the value seen, what is expected, what to do."""
    errors = [
        *_out_of_range(config),
        *_model_errors(config.model),
        *_train_errors(config.train),
        *_eval_errors(config.eval, config.train, config.model),
        *hub_errors(config.hub, "hub."),
        *name_errors(config.name),
        *_text_errors(config),
    ]
    if config.model.residual_dtype == "bfloat16" and config.train.precision == "float16":
        errors.append(
            "model.residual_dtype is bfloat16, which train.precision float16 does not support; set "
            "model.residual_dtype to float32, or train.precision to bfloat16"
        )
    if config.init.keep_optimizer and config.init.source is None:
        errors.append("init.keep_optimizer needs a model to take the moments from: give --init.from")
    batch = batch_plan(config, world_size)
    if batch.batch_tokens > 0 and batch.micro_tokens > 0 and (error := batch.error()):
        errors.append(error)
    return errors


def name_errors(name: str) -> list[str]:
    """Why a run cannot have this name."""
    plain = name.isprintable() and name == name.strip(". ") and not set("/\\") & set(name)
    plain = plain and not name.startswith("-")  # every command would take it for an option
    if plain and 0 < len(name.encode(errors="surrogatepass")) <= 200:
        return []
    return [
        f"name {name!r} must be a plain folder name of at most 200 bytes that does not begin with '-', such as 'my-run'"
    ]


def _text_errors(config: RunConfig) -> list[str]:
    texts = {
        "data.source": config.data.source,
        "data.dataset": config.data.dataset or "",
        "data.tokenizer": config.data.tokenizer,
        "data.fallback": config.data.fallback or "",
        "checkpoint.mirror": config.checkpoint.mirror or "",
        "init.source": config.init.source or "",
        "eval.hellaswag_file": config.eval.hellaswag_file or "",
        **{f"eval.tasks[{i}]": task for i, task in enumerate(config.eval.tasks)},
        **{f"eval.validation_sets[{i}]": word for i, word in enumerate(config.eval.validation_sets)},
        **{f"eval.sample_prompts[{i}]": prompt for i, prompt in enumerate(config.eval.sample_prompts)},
    }
    # Bytes that the locale cannot decode arrive as lone surrogates, which none of the run's files can store.
    return [f"{key} {text!r} is not {_expected(text)}" for key, text in texts.items() if not _is_unicode(text)]


def hub_errors(hub: HubConfig, prefix: str) -> list[str]:
    """Errors in the settings for publishing. The Hub itself may refuse more.

    Args:
        prefix: of the settings' names, as the user typed them.

    Source: huggingface_hub 2.4, utils/_validators.py, validate_repo_id.
    """
    errors = []
    if hub.repo is None:
        unused = [f"{prefix}{name}" for name in ("private", "every_checkpoint", "license") if getattr(hub, name)]
        if unused:
            errors.append(f"{', '.join(unused)} without {prefix}repo: add {prefix}repo NAMESPACE/NAME")
    elif (
        not _REPO.fullmatch(hub.repo)
        or len(hub.repo) > 96
        or any(part in hub.repo for part in ("--", ".."))
        or hub.repo.endswith(".git")
    ):
        errors.append(
            f"{prefix}repo {hub.repo!r} is not a repository name: expected NAMESPACE/NAME, such as "
            "my-account/my-model, of letters, digits, '-', '_' and '.', at most 96 characters"
        )
    if hub.license is not None and not _LICENSE.fullmatch(hub.license):
        errors.append(f"{prefix}license {hub.license!r} is not one of the Hub's identifiers, such as mit or apache-2.0")
    return errors


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _expected(text: str) -> str:
    """What a text with lone surrogates should be, and what to do about it."""
    encoding = sys.getfilesystemencoding()
    try:
        os.fsencode(text).decode()
    except UnicodeError:
        return "UTF-8: rename the file or folder, or change the text"
    return f"text in this locale's encoding, {encoding}: set LC_ALL=C.UTF-8, or PYTHONUTF8=1"


def _out_of_range(config: RunConfig) -> list[str]:
    errors = []
    for expected, limit, names in RANGES:
        for name in names.split():
            part, _, setting = name.partition(".")
            value = getattr(getattr(config, part), setting)
            if not isinstance(value, int | float):  # None or "auto"
                continue
            if not VALID[expected](value):
                errors.append(f"{name} is {value}, but must be {expected}")
            elif limit < value < math.inf:
                errors.append(f"{name} is {_shown(int(value))}, but must be at most {limit:,}")
    tokens = config.train.max_steps * config.train.batch_tokens
    if not any(error.startswith("train.") for error in errors) and tokens >= 2**63:
        errors.append(
            f"train.max_steps {config.train.max_steps:,} x train.batch_tokens {config.train.batch_tokens:,} is "
            f"{_shown(tokens)} tokens, more than a run can count"
        )
    return errors


def _shown(value: int) -> str:
    return f"{value:,}" if value < 10**18 else f"about 10^{len(str(value)) - 1}" if value < 10**4_000 else "enormous"


def _model_errors(model: ModelConfig) -> list[str]:
    errors: list[str] = []
    if min(model.n_heads, model.kv_heads, model.d_model) < 1:
        return errors  # reported above, and the rest divides by them
    if model.n_heads % model.kv_heads:
        errors.append(f"model.n_heads {model.n_heads} is not a multiple of model.n_kv_heads {model.kv_heads}")
    if model.head_dim is None and model.d_model % model.n_heads:
        errors.append(
            f"model.d_model {model.d_model} is not a multiple of model.n_heads {model.n_heads}; "
            "change one, or set model.head_dim"
        )
    elif model.position == "rope" and model.head_size % 2:
        errors.append(
            f"model.head_dim is {model.head_size}, but rotary positions need an even value; "
            "set it, or change model.d_model or model.n_heads"
        )
    if model.rope_scaling and model.position != "rope":
        errors.append(f"model.rope_scaling needs rotary positions, but model.position is {model.position}; remove one")
    elif model.rope_scaling and not _is_llama3_scaling(*model.rope_scaling):
        errors.append(
            f"model.rope_scaling is {' '.join(map(str, model.rope_scaling))}, expected four numbers: factor (at least "
            "1), low_freq_factor (above 0), high_freq_factor (above that) and the context of pretraining (an integer "
            "from 1 to 100,000,000), such as 32 1 4 8192"
        )
    if model.embedding_norm and model.tie_embeddings:
        errors.append(
            "model.embedding_norm needs an untied head, because exports fold the norm into the embedding; set "
            "model.tie_embeddings to false, or model.embedding_norm to false"
        )
    return errors


def _is_llama3_scaling(factor: float = 0, low: float = 0, high: float = 0, context: float = 0, *more: float) -> bool:
    ordered = 1 <= factor < math.inf and 0 < low < high < math.inf
    return ordered and 1 <= context <= 10**8 and context % 1 == 0 and not more


def _train_errors(train: TrainConfig) -> list[str]:
    errors = []
    if train.seed >= 2**63:  # it seeds 64-bit generators
        errors.append(f"train.seed {train.seed} is too large: below 2**63")
    if train.deterministic and train.attention in ("cudnn", "efficient"):
        errors.append(
            f"train.attention is {train.attention}, whose backward pass is not deterministic; with "
            "train.deterministic, set it to auto, flash or math"
        )
    return errors


def _eval_errors(evals: EvalConfig, train: TrainConfig, model: ModelConfig) -> list[str]:
    errors = []
    if train.early_stop_on is not None and train.early_stop_patience is None:
        errors.append(
            f"train.early_stop_on is {train.early_stop_on}, but train.early_stop_patience is None: nothing stops; "
            "set both, or neither"
        )
    if train.early_stop_patience is not None and evals.validation_every_steps == 0:
        errors.append(
            f"train.early_stop_patience is {train.early_stop_patience}, but eval.validation_every_steps is 0: nothing "
            "is validated; set it above 0, or train.early_stop_patience to None"
        )
    if evals.validation_every_steps and evals.validation_tokens < model.max_seq_len:
        errors.append(
            f"eval.validation_tokens {evals.validation_tokens:,} is less than one sequence of "
            f"model.max_seq_len {model.max_seq_len:,}; raise it, or set eval.validation_every_steps to 0"
        )
    if evals.sample_every_steps and not all(evals.sample_prompts):
        errors.append("eval.sample_prompts has an empty prompt; remove it, or set eval.sample_every_steps to 0")
    return errors
