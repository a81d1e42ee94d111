"""Every error of a config is found before anything is allocated, and all of them at once."""

import re
from dataclasses import fields, is_dataclass, replace
from math import inf, nan
from typing import get_args, get_origin

import pytest

from myllm.config import ModelConfig, RunConfig, TrainConfig
from myllm.errors import UserError
from myllm.planning.batch import batch_plan
from myllm.planning.config_checks import check_config, check_data_config, config_errors
from myllm.planning.disk import disk_estimate_bytes
from myllm.planning.forecast import Hardware, describe, predict
from myllm.presets import PRESETS, get_preset
from myllm.training.profiler import choose_window

GOOD = RunConfig(
    name="good",
    model=ModelConfig(max_seq_len=256, d_model=128, n_layers=4, n_heads=4, d_ff=384),
    train=TrainConfig(max_steps=200, batch_tokens=2_048, micro_batch_size=8),
)


def changed(config: RunConfig, **changes: object) -> RunConfig:
    """`model__d_model=3` sets model.d_model."""
    for key, value in changes.items():
        part, _, name = key.partition("__")
        config = replace(config, **{part: replace(getattr(config, part), **{name: value}) if name else value})
    return config


WORLD_SIZES = {
    "debug": [1],  # one micro-batch is the whole batch
    "small-50m": [1, 2, 4, 8],
    "tinystories-laptop": [1, 2],
    "dolma-75m": [1, 2, 4],
    "gpt2-124m": [1, 2, 4, 8, 16],
    "default-150m": [1, 2, 4, 8, 16],
    "lf-llm-269m": [1, 2, 4, 8, 16],
    "lf-llm-269m-modern": [1, 2, 4, 8, 16],
    "lf-llm-269m-adamw": [1, 2, 4, 8, 16],
}


def test_every_number_has_a_range():
    """Also that of a new setting. A limit that is not a number would never be exceeded."""
    names = [
        (part.name, setting.name)
        for part in fields(RunConfig)
        if is_dataclass(part.type)
        for setting in fields(part.type)
        if get_origin(setting.type) is not tuple and {int, float} & {setting.type, *get_args(setting.type)}
    ]
    assert len(names) > 60
    for part, name in names:
        assert any(
            f"{part}.{name} is nan" in error for error in config_errors(changed(GOOD, **{f"{part}__{name}": nan}), 1)
        )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    for world_size in WORLD_SIZES[name]:
        assert config_errors(get_preset(name), world_size) == []


ZERO_IS_TOO_SMALL = [
    "model.vocab_size", "model.vocab_multiple", "model.max_seq_len", "model.d_model", "model.n_layers",
    "model.n_heads", "model.n_kv_heads", "model.head_dim", "model.d_ff", "data.val_tokens", "data.target_tokens",
    "data.shard_tokens", "train.max_steps", "train.batch_tokens", "train.early_stop_patience",
    "train.micro_batch_size", "train.log_every_steps", "train.skip_spikes_sigma",
    "eval.validation_tokens", "eval.cloze_examples", "eval.hellaswag_examples", "eval.tasks_examples",
    "eval.sample_new_tokens",
    "optim.max_lr", "optim.eps", "optim.max_grad_norm", "model.rope_theta", "model.norm_eps",
]  # fmt: skip
NEGATIVE_IS_TOO_SMALL = [
    "data.workers", "data.shuffle_seed", "optim.warmup_steps", "train.save_every_steps", "train.keep_last",
    "train.seed", "train.max_skipped_steps",
    "eval.validation_every_steps", "eval.cloze_every_steps", "eval.sample_every_steps",
    "eval.hellaswag_every_steps",
    "eval.tasks_every_steps",
    "eval.sample_top_k", "eval.sample_temperature", "optim.weight_decay", "optim.beta1", "optim.beta2",
    "optim.min_lr_ratio", "optim.decay_fraction", "model.dropout_embedding", "model.dropout_attention_residual",
    "model.dropout_ffn",
]  # fmt: skip
NOT_FINITE = [
    "train.skip_spikes_sigma",
    "optim.max_lr", "optim.eps", "optim.max_grad_norm", "optim.weight_decay", "optim.beta1", "optim.beta2",
    "optim.min_lr_ratio", "optim.decay_fraction", "model.rope_theta", "model.norm_eps", "model.dropout_embedding",
    "model.dropout_attention_residual", "model.dropout_ffn", "eval.sample_temperature",
]  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *((name, 0) for name in ZERO_IS_TOO_SMALL),
        *((name, -1) for name in ZERO_IS_TOO_SMALL + NEGATIVE_IS_TOO_SMALL),
        *((name, value) for name in NOT_FINITE for value in (inf, nan)),
        *((f"model.dropout_{name}", 1.0) for name in ("embedding", "attention_residual", "ffn")),
        *((f"optim.{name}", 1.0) for name in ("beta1", "beta2")),
        *((f"optim.{name}", 1.1) for name in ("min_lr_ratio", "decay_fraction")),
        ("model.head_dim", 33),
        ("train.seed", 2**63),
    ],
)
def test_error_names_setting_and_value(setting, value):
    errors = config_errors(changed(GOOD, **{setting.replace(".", "__"): value}), 1)
    assert any(error.startswith(f"{setting} ") and f"{value}" in error for error in errors), errors


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"model__d_model": 130}, ["model.d_model 130", "model.n_heads 4", "model.head_dim"]),
        ({"model__n_kv_heads": 3}, ["model.n_heads 4", "model.n_kv_heads 3"]),
        ({"model__n_kv_heads": 8}, ["model.n_heads 4", "model.n_kv_heads 8"]),
        ({"model__d_model": 12}, ["model.head_dim is 3", "model.d_model", "model.n_heads"]),
        ({"model__rope_scaling": (8.0, 1.0, 4.0)}, ["model.rope_scaling is 8.0 1.0 4.0, expected four numbers"]),
        ({"model__rope_scaling": (8.0, 1.0, 4.0, 8_192.0, 1.0)}, ["8192.0 1.0, expected four numbers"]),
        ({"model__rope_scaling": (0.5, 1.0, 4.0, 8_192.0)}, ["is 0.5 1.0", "factor (at least 1)"]),
        ({"model__rope_scaling": (8.0, 4.0, 4.0, 8_192.0)}, ["is 8.0 4.0 4.0", "high_freq_factor (above that)"]),
        ({"model__rope_scaling": (8.0, 1.0, nan, 8_192.0)}, ["is 8.0 1.0 nan"]),
        ({"model__rope_scaling": (8.0, 1.0, 4.0, 0.5)}, ["4.0 0.5, expected", "integer"]),
        (
            {"model__rope_scaling": (8.0, 1.0, 4.0, 8_192.0), "model__position": "learned"},
            ["model.rope_scaling needs rotary positions, but model.position is learned"],
        ),
        ({"train__batch_tokens": 3_000}, ["train.batch_tokens 3,000", "2,048 or 4,096"]),
        ({"eval__validation_tokens": 255}, ["eval.validation_tokens 255", "model.max_seq_len 256"]),
        ({"eval__sample_prompts": ("a", "")}, ["eval.sample_prompts", "empty prompt"]),
    ],
    ids=str,
)
def test_inconsistent_settings(changes, fragments):
    (error,) = config_errors(changed(GOOD, **changes), 1)
    for words in fragments:
        assert words in error


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", " a", "a ", "../up", "/abs"])
def test_invalid_run_names(name):
    (error,) = config_errors(changed(GOOD, name=name), 1)
    assert repr(name) in error


@pytest.mark.parametrize("name", ["a", "my-run", "run.2", "Größe", "with space"])
def test_valid_run_names(name):
    assert config_errors(changed(GOOD, name=name), 1) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"model__d_model": 130, "model__head_dim": 32},
        {"model__d_model": 12, "model__position": "learned"},  # an odd head dimension is no matter without rotation
        {"eval__sample_prompts": ()},
        {"eval__sample_prompts": ("",), "eval__sample_every_steps": 0},
        {"optim__warmup_steps": 10_000},
        {"optim__weight_decay": 0.0, "optim__min_lr_ratio": 1.0, "optim__decay_fraction": 0.0},
        {"eval__sample_temperature": 0.0, "eval__sample_top_k": 0},
        {"train__save_every_steps": 0, "train__keep_last": 0},
    ],
    ids=str,
)
def test_valid_edge_cases(changes):
    assert config_errors(changed(GOOD, **changes), 1) == []


def test_batch_check_depends_on_world_size():
    assert config_errors(GOOD, 1) == []
    (error,) = config_errors(GOOD, 3)
    assert "3 rank(s)" in error


def test_all_errors_are_listed():
    config = changed(
        GOOD, name="a/b", model__d_ff=0, optim__max_lr=-1.0, train__batch_tokens=100, eval__cloze_examples=0
    )
    with pytest.raises(UserError) as caught:
        check_config(config, 1)
    lines = str(caught.value).split("\n")
    assert lines[0] == "the config has 5 errors:"
    assert len(lines) == 6
    for name in ("name", "model.d_ff", "optim.max_lr", "train.batch_tokens", "eval.cloze_examples"):
        assert sum(line.startswith(f"  - {name} ") for line in lines) == 1
    with pytest.raises(UserError, match="the config has 1 error:"):
        check_config(changed(GOOD, name=""), 1)
    check_config(GOOD, 1)


def test_all_zero_settings_report_errors():
    """Nothing divides by a value that another error is about."""
    zeros = {name.replace(".", "__"): 0 for name in ZERO_IS_TOO_SMALL}
    assert len(config_errors(changed(GOOD, **zeros), 1)) >= len(ZERO_IS_TOO_SMALL)


def test_check_data_config_ignores_other_settings():
    check_data_config(changed(GOOD, model__d_model=0))
    with pytest.raises(UserError, match=r"data\.shard_tokens is 0"):
        check_data_config(changed(GOOD, data__shard_tokens=0, model__d_model=0))


def test_early_stopping_requires_validation():
    config = changed(GOOD, train__early_stop_patience=3)
    assert config_errors(config, 1) == []
    (error,) = config_errors(changed(config, eval__validation_every_steps=0), 1)
    assert error.startswith("train.early_stop_patience is 3, but eval.validation_every_steps is 0")


def test_bfloat16_residual_stream_rejects_float16_precision():
    for precision in ("auto", "bfloat16", "float32"):
        assert config_errors(changed(GOOD, model__residual_dtype="bfloat16", train__precision=precision), 1) == []
    (error,) = config_errors(changed(GOOD, model__residual_dtype="bfloat16", train__precision="float16"), 1)
    assert error.startswith("model.residual_dtype is bfloat16, which train.precision float16 does not support; set")


def test_deterministic_rejects_cudnn_attention():
    for attention in ("auto", "flash", "math"):
        assert config_errors(changed(GOOD, train__deterministic=True, train__attention=attention), 1) == []
    (error,) = config_errors(changed(GOOD, train__deterministic=True, train__attention="cudnn"), 1)
    assert error.startswith("train.attention is cudnn, whose backward pass is not deterministic")


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("train", "max_steps", 10**30), ("train", "keep_last", 10**18), ("train", "batch_tokens", 10**15),
        ("train", "save_every_steps", 10**400), ("eval", "cloze_every_steps", 10**30), ("model", "n_layers", 10**9),
        ("model", "max_seq_len", 10**12), ("data", "workers", 10**6), ("data", "target_tokens", 10**30),
        ("optim", "warmup_steps", 10**30), ("train", "epochs", 1e300),
        ("train", "collective_timeout_s", 1e300),
    ],
)  # fmt: skip
def test_excessive_values_are_rejected(part: str, name: str, value: int) -> None:
    """Said in a sentence, and as fast as any other error."""
    config = RunConfig()
    wrong = replace(config, **{part: replace(getattr(config, part), **{name: value})})
    pattern = rf"{part}\.{name} is .*, but must be at most [\d,]+$"
    assert any(re.match(pattern, error) for error in config_errors(wrong, 1))


def test_very_long_run_is_planned_quickly() -> None:
    """Nothing on the way to it goes through its steps one by one."""
    long = replace(TrainConfig(), max_steps=10**10, save_every_steps=1, keep_every_steps=3, log_every_steps=10**10)
    config = replace(RunConfig(), train=long)
    assert not config_errors(config, 1)
    assert "tokens" in describe(predict(config, Hardware(1)))
    assert len(choose_window(config, 0)) == 5
    assert sum(disk_estimate_bytes(config).values()) > 0
    tokens = replace(long, batch_tokens=10**12 // 2_048 * 2_048, micro_batch_size=1)
    many = replace(config, train=tokens)
    assert any("tokens, more than a run can count" in error for error in config_errors(many, 1))
    assert len(batch_plan(many, 1).micro_batch_sizes()) > 1
