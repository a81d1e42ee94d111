"""Validation of a config: all errors at once, before anything is downloaded or allocated."""

import os
import re
import sys

from myllm.config import EvalConfig, HubConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from myllm.errors import UserError

from .batch import batch_plan

_REPO = re.compile(r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?/[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?", re.ASCII)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def check_config(config: RunConfig, world_size: int) -> None:
    """
    Raises:
        UserError: the config cannot be trained; lists every error.
    """
    _raise(config_errors(config, world_size))


def check_data_config(config: RunConfig) -> None:
    """`check_config` for the data settings alone."""
    _raise([error for error in _too_small(config) + _too_large(config) if error.startswith("data.")])


def _raise(errors: list[str]) -> None:
    if errors:
        lines = [f"the config has {len(errors)} error{'s' * (len(errors) > 1)}:", *(f"  - {error}" for error in errors)]
        raise UserError("\n".join(lines))


def config_errors(config: RunConfig, world_size: int) -> list[str]:
    """One sentence per error: the value seen, what is expected, what to do."""
    errors = [
        *_too_small(config),
        *_too_large(config),
        *_model_errors(config.model),
        *_optim_errors(config.optim),
        *_train_errors(config.train),
        *_eval_errors(config.eval, config.train, config.model),
        *hub_errors(config.hub, "hub."),
        *_name_errors(config.name),
        *_text_errors(config),
    ]
    if config.model.residual_dtype == "bfloat16" and config.train.precision == "float16":
        errors.append(
            "model.residual_dtype is bfloat16, which train.precision float16 does not support; set "
            "model.residual_dtype to float32, or train.precision to bfloat16"
        )
    batch = batch_plan(config, world_size)
    if batch.batch_tokens > 0 and batch.micro_tokens > 0 and (error := batch.error()):
        errors.append(error)
    return errors


def _name_errors(name: str) -> list[str]:
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
        "eval.hellaswag_file": config.eval.hellaswag_file or "",
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


def _too_small(config: RunConfig) -> list[str]:
    """Counts below their minimum."""
    positive = {
        "model": ("vocab_size", "vocab_multiple", "max_seq_len", "d_model", "n_layers", "n_heads", "d_ff"),
        "data": ("val_tokens", "shard_tokens"),
        "train": ("max_steps", "batch_tokens", "micro_batch_size", "log_every_steps"),
        "eval": ("validation_tokens", "cloze_examples", "sample_new_tokens"),
    }
    optional = {
        "model": ("n_kv_heads", "head_dim"),
        "data": ("target_tokens", "max_documents"),
        "train": ("early_stop_patience",),
        "eval": ("hellaswag_examples",),
    }
    not_negative = {
        "data": ("workers", "shuffle_seed", "min_chars"),
        "optim": ("warmup_steps",),
        "train": ("save_every_steps", "keep_last", "keep_every_steps", "seed", "max_skipped_steps"),
        "eval": (
            "validation_every_steps", "cloze_every_steps", "hellaswag_every_steps", "sample_every_steps",
            "sample_top_k",
        ),
    }  # fmt: skip
    errors = []
    for least, table in ((1, positive), (1, optional), (0, not_negative)):
        for part, names in table.items():
            for name in names:
                value = getattr(getattr(config, part), name)
                if isinstance(value, int) and value < least:  # neither None nor "auto"
                    errors.append(f"{part}.{name} is {value}, but must be at least {least}")
    return errors


def _too_large(config: RunConfig) -> list[str]:
    """Numbers that only a typo explains: sizes beyond any memory, counts beyond 64 bits."""
    limits = {
        "model": dict.fromkeys(("vocab_multiple", "d_model", "n_heads", "n_kv_heads", "head_dim"), 10 ** 6)
        | {"n_layers": 10_000, "d_ff": 10**7, "max_seq_len": 10**8},
        "data": {"workers": 4_096, "min_chars": 10**12}
        | dict.fromkeys(("val_tokens", "target_tokens", "max_documents", "shard_tokens"), 10**15),
        "optim": {"warmup_steps": 10**12},
        "train": {"batch_tokens": 10**12, "micro_batch_size": 10**9, "epochs": 10**6}
        | dict.fromkeys(
            (
                "max_steps", "log_every_steps", "save_every_steps", "keep_last", "keep_every_steps",
                "early_stop_patience", "max_skipped_steps",
            ),
            10**12,
        ),
        "eval": {"sample_new_tokens": 10**9, "validation_tokens": 10**15}
        | {name: 10**12 for name in vars(config.eval) if name.endswith(("_every_steps", "_examples"))},
    }  # fmt: skip
    errors = []
    for part, names in limits.items():
        for name, most in names.items():
            value = getattr(getattr(config, part), name)
            if isinstance(value, int | float) and most < value < float("inf"):
                errors.append(f"{part}.{name} is {_shown(int(value))}, but must be at most {most:,}")
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
    errors = []
    if model.vocab_size > 65_536:
        errors.append(f"model.vocab_size {model.vocab_size:,} does not fit in the shards' uint16: at most 65,536")
    for name in ("rope_theta", "norm_eps"):
        if not 0 < getattr(model, name) < float("inf"):
            errors.append(f"model.{name} is {getattr(model, name)}, but must be above 0 and finite")
    for name in ("dropout_embedding", "dropout_attention_residual", "dropout_ffn"):
        if not 0 <= getattr(model, name) < 1:
            errors.append(f"model.{name} is {getattr(model, name)}, but must be at least 0 and below 1")
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
    return errors


def _optim_errors(optim: OptimConfig) -> list[str]:
    errors = []
    for name in ("max_lr", "eps", "max_grad_norm"):
        if not 0 < getattr(optim, name) < float("inf"):
            errors.append(f"optim.{name} is {getattr(optim, name)}, but must be above 0 and finite")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optim, name) < 1:
            errors.append(f"optim.{name} is {getattr(optim, name)}, but must be at least 0 and below 1")
    for name in ("min_lr_ratio", "decay_fraction"):
        if not 0 <= getattr(optim, name) <= 1:
            errors.append(f"optim.{name} is {getattr(optim, name)}, but must be between 0 and 1")
    if not 0 <= optim.weight_decay < float("inf"):
        errors.append(f"optim.weight_decay is {optim.weight_decay}, but must be at least 0 and finite")
    return errors


def _train_errors(train: TrainConfig) -> list[str]:
    errors = []
    if train.seed >= 2**63:  # it seeds 64-bit generators
        errors.append(f"train.seed {train.seed} is too large: below 2**63")
    if train.skip_spikes_sigma is not None and not 0 < train.skip_spikes_sigma < float("inf"):
        errors.append(
            f"train.skip_spikes_sigma is {train.skip_spikes_sigma}, but must be above 0 and finite, such as 6, or None"
        )
    if train.deterministic and train.attention in ("cudnn", "efficient"):
        errors.append(
            f"train.attention is {train.attention}, whose backward pass is not deterministic; with "
            "train.deterministic, set it to auto, flash or math"
        )
    if train.epochs is not None and not 0 < train.epochs < float("inf"):
        errors.append(f"train.epochs is {train.epochs}, but must be above 0 and finite, such as 3")
    for name in ("max_wall_s", "collective_timeout_s"):
        value = getattr(train, name)
        if value is not None and not 0 < value < float("inf"):
            errors.append(f"train.{name} is {value}, but must be above 0 and finite, in seconds")
    return errors


def _eval_errors(evals: EvalConfig, train: TrainConfig, model: ModelConfig) -> list[str]:
    errors = []
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
    if not 0 <= evals.sample_temperature < float("inf"):
        errors.append(
            f"eval.sample_temperature is {evals.sample_temperature}, but must be at least 0 and finite (0: greedy)"
        )
    if evals.sample_every_steps and (not evals.sample_prompts or not all(evals.sample_prompts)):
        errors.append("eval.sample_prompts needs at least one prompt, none empty; or set eval.sample_every_steps to 0")
    return errors
