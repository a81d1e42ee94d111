"""Presets: named configs, one function each. Copy one to make your own.

`python pretrain.py PRESET --train.max-steps 100` changes a setting of one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from .config import DataConfig, EvalConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from .errors import UserError, did_you_mean


def lf_llm_269m() -> RunConfig:
    """The reference run: 320M parameters, 10B tokens of FineWeb-Edu; one night on 8 x A100.

    Source: LF_LLM-269M (Dec 2024), with all its model and training settings, so that its published curve can be
    compared: also dropout and the unscaled learning rate. 226 warmup steps are 0.0119 of the tokens.
    """
    return RunConfig(
        name="lf-llm-269m",
        model=ModelConfig(
            max_seq_len=2_048, d_model=1_024, n_layers=16, n_heads=16, d_ff=4_096, bias=True,
            dropout_attention_residual=0.1, dropout_ffn=0.15, init="reference",
        ),
        data=DataConfig(source="fineweb-edu-10bt"),
        optim=OptimConfig(max_lr=2.1e-3, min_lr_ratio=0.1, warmup_steps=226, schedule="cosine"),
        train=TrainConfig(max_steps=19_073, batch_tokens=524_288, micro_batch_size=16),
    )  # fmt: skip


def lf_llm_269m_modern() -> RunConfig:
    """The same shape with a modern recipe: Muon and QK-norm, 4B tokens.

    No biases, no dropout, residual projections that start at zero. docs/recipe.md has the sources. Exports as Qwen3.
    """
    return RunConfig(
        name="lf-llm-269m-modern",
        model=ModelConfig(
            max_seq_len=2_048, d_model=1_024, n_layers=16, n_heads=16, d_ff=4_096, qk_norm=True, init="zero_residual",
        ),
        data=DataConfig(source="fineweb-edu-10bt"),
        optim=OptimConfig(
            optimizer="muon", muon_lr=0.01, muon_scale="original", muon_momentum=0.95, muon_momentum_start=0.85,
            muon_momentum_warmup_steps=300, max_lr=2.4e-3, beta1=0.8, beta2=0.98, eps=1e-10, weight_decay=0.1,
            decay_embeddings=False, min_lr_ratio=0.0, warmup_steps=40, schedule="linear",
        ),
        train=TrainConfig(max_steps=7_630, batch_tokens=524_288, micro_batch_size=16),
    )  # fmt: skip


def lf_llm_269m_adamw() -> RunConfig:
    """The modern model and length with a tuned AdamW, as a control."""
    modern = lf_llm_269m_modern()
    return dataclasses.replace(
        modern,
        name="lf-llm-269m-adamw",
        optim=OptimConfig(
            max_lr=4e-3, beta1=0.9, beta2=0.98, eps=1e-10, weight_decay=0.1, decay_embeddings=False, min_lr_ratio=0.0,
            warmup_steps=2_000, schedule="linear",
        ),
    )  # fmt: skip


def _smaller_muon() -> OptimConfig:
    """The optimizer of lf-llm-269m-modern for the two smaller presets.

    Its rates follow width^-0.5, tokens^-0.32 and the square root of the batch, its decay keeps rate x decay x steps
    (docs/recipe.md): 0.0086 and 0.0021 with 0.047 for 150M, 0.0081 and 0.0019 with 0.047 for 50M, rounded.
    """
    return dataclasses.replace(lf_llm_269m_modern().optim, muon_lr=0.008, max_lr=2e-3, weight_decay=0.05)


def default_150m() -> RunConfig:
    """A modern 150M with the recipe of lf-llm-269m-modern, 10B tokens."""
    return RunConfig(
        name="default-150m",
        model=ModelConfig(
            max_seq_len=2_048, d_model=768, n_layers=12, n_heads=12, d_ff=3_072, qk_norm=True, init="zero_residual",
        ),
        data=DataConfig(source="fineweb-edu-10bt"),
        optim=_smaller_muon(),
        train=TrainConfig(max_steps=19_073, batch_tokens=524_288, micro_batch_size=16),
    )  # fmt: skip


def small_50m() -> RunConfig:
    """A modern 50M for one consumer GPU, with the same recipe: context 1,024, 2.6B tokens."""
    return RunConfig(
        name="small-50m",
        model=ModelConfig(
            max_seq_len=1_024, d_model=512, n_layers=8, n_heads=8, d_ff=1_408, qk_norm=True, init="zero_residual",
        ),
        data=DataConfig(source="fineweb-edu-10bt", target_tokens=2_700_000_000),
        optim=_smaller_muon(),
        train=TrainConfig(max_steps=20_000, batch_tokens=131_072, micro_batch_size=16),
        eval=EvalConfig(validation_tokens=2_097_152),
    )  # fmt: skip


def gpt2_124m() -> RunConfig:
    """GPT-2 124M: LayerNorm, GELU, learned positions, dropout 0.1, on 10B tokens of FineWeb.

    Source: shape from Radford et al. 2019; learning rate, warmup and batch size from build-nanogpt and GPT-3 Small
    (Brown et al. 2020, table 2.1). GPT-2's dropout on the attention weights has no counterpart here.
    """
    return RunConfig(
        name="gpt2-124m",
        model=ModelConfig(
            max_seq_len=1_024, d_model=768, n_layers=12, n_heads=12, d_ff=3_072, position="learned", norm="layernorm",
            activation="gelu", bias=True, dropout_embedding=0.1, dropout_attention_residual=0.1, dropout_ffn=0.1,
        ),
        data=DataConfig(source="fineweb-10bt"),
        optim=OptimConfig(max_lr=6e-4, min_lr_ratio=0.1, warmup_steps=715, schedule="cosine"),
        train=TrainConfig(max_steps=19_073, batch_tokens=524_288, micro_batch_size=32),
    )  # fmt: skip


def dolma_75m() -> RunConfig:
    """10 layers of 640, GELU and learned positions, 5B tokens of Dolma; fits one 12 GB GPU."""
    return RunConfig(
        name="dolma-75m",
        model=ModelConfig(
            max_seq_len=1_024, d_model=640, n_layers=10, n_heads=10, d_ff=2_560, position="learned", norm="layernorm",
            activation="gelu", bias=True,
        ),
        data=DataConfig(source="dolma-sample", target_tokens=5_000_000_000),
        optim=OptimConfig(max_lr=5e-4, min_lr_ratio=0.1, warmup_steps=1_000, schedule="cosine"),
        # 12 sequences x 4 accumulation steps x 1,024 tokens on one GPU; 101,725 steps are 5B tokens.
        train=TrainConfig(max_steps=101_725, batch_tokens=49_152, micro_batch_size=12, save_every_steps=2_000),
        eval=EvalConfig(
            validation_every_steps=1_000, validation_tokens=2_097_152, hellaswag_every_steps=5_000,
            sample_every_steps=5_000,
        ),
    )  # fmt: skip


def debug() -> RunConfig:
    """Everything in minutes on two CPU cores: a 7M model on the Python standard library."""
    return RunConfig(
        name="debug",
        # Untied, so that the loss at step 0 is about ln(50,257) = 10.8: the model knows nothing.
        model=ModelConfig(
            max_seq_len=256, d_model=64, n_layers=4, n_heads=4, d_ff=192, qk_norm=True, tie_embeddings=False
        ),
        data=DataConfig(source="python-stdlib"),
        optim=OptimConfig(max_lr=5e-3, min_lr_ratio=0.0, warmup_steps=40, schedule="linear"),
        train=TrainConfig(
            max_steps=600, batch_tokens=512, micro_batch_size=2, log_every_steps=5, save_every_steps=150, device="cpu"
        ),
        eval=EvalConfig(
            validation_every_steps=100, validation_tokens=16_384, cloze_every_steps=300, cloze_examples=300,
            # Prompts in mid-line, at temperature 1: so small a model continues a line start with spaces.
            hellaswag_every_steps=0, sample_every_steps=300, sample_new_tokens=32, sample_temperature=1.0,
            sample_prompts=("return self.", "raise ValueError(", "    if self._", "        self.assert"),
        ),
    )  # fmt: skip


def tinystories_laptop() -> RunConfig:
    """Short stories, on a Mac or 4 CPU cores in under an hour: a 3.4M model with a vocabulary of its own.

    TinyStories (Eldan and Li 2023, arXiv 2305.07759) shows that models this small write fluent stories in a child's
    words. GPT-2's 50,257 tokens would make a step three times as expensive; 4,096 are those of llama2.c's models.
    """
    return RunConfig(
        name="tinystories-laptop",
        model=ModelConfig(
            vocab_size=4_096, max_seq_len=256, d_model=192, n_layers=6, n_heads=6, d_ff=512, qk_norm=True
        ),
        data=DataConfig(source="tinystories", tokenizer="train:4096", val_tokens=1_000_000, target_tokens=28_000_000),
        optim=OptimConfig(max_lr=3e-3, min_lr_ratio=0.0, warmup_steps=100, schedule="linear"),
        # 28M tokens: eight for each parameter, what 4 cores compute in about 45 minutes.
        train=TrainConfig(max_steps=3_400, batch_tokens=8_192, micro_batch_size=16, save_every_steps=200),
        eval=EvalConfig(
            validation_every_steps=200, validation_tokens=65_536, cloze_every_steps=0, hellaswag_every_steps=0,
            sample_every_steps=400, sample_new_tokens=160, sample_prompts=(
                "Once upon a time, there was a little", "One day, a girl named Lily found", "Tom and his dog wanted to",
            ),
        ),
    )  # fmt: skip


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "debug": debug,
    "tinystories-laptop": tinystories_laptop,
    "small-50m": small_50m,
    "dolma-75m": dolma_75m,
    "gpt2-124m": gpt2_124m,
    "default-150m": default_150m,
    "lf-llm-269m": lf_llm_269m,
    "lf-llm-269m-modern": lf_llm_269m_modern,
    "lf-llm-269m-adamw": lf_llm_269m_adamw,
}


def get_preset(name: str) -> RunConfig:
    """Raises a UserError for an unknown preset."""
    if name not in PRESETS:
        guess = did_you_mean(name, list(PRESETS))
        raise UserError(f"unknown preset {name!r}{guess}; known presets: {', '.join(PRESETS)}")
    return PRESETS[name]()


def describe_settings(config: RunConfig) -> str:
    """The preset that a config is closest to, and the settings that differ, one per line."""
    name, changes = nearest_preset(config)
    if not changes:
        return f"settings     those of {name}; `python pretrain.py {name} --help` lists them"
    width = max(map(len, changes))
    lines = [f"  {setting:<{width}}  {old!r} -> {new!r}" for setting, (old, new) in changes.items()]
    return "\n".join([f"settings     those of {name} (`python pretrain.py {name} --help` lists them), but", *lines])


def nearest_preset(config: RunConfig) -> tuple[str, dict[str, tuple[Any, Any]]]:
    """The name of the preset that a config is closest to, and `diff_settings` from it."""
    changes = {name: diff_settings(make(), config) for name, make in PRESETS.items()}
    return min(changes.items(), key=lambda item: len(item[1]))


def diff_settings(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, by name, such as "train.max_steps". The names of the runs are ignored."""
    changes = {}
    for section in dataclasses.fields(old):
        before, after = getattr(old, section.name), getattr(new, section.name)
        for field in dataclasses.fields(before) if dataclasses.is_dataclass(before) else ():
            values = getattr(before, field.name), getattr(after, field.name)
            if values[0] != values[1]:
                changes[f"{section.name}.{field.name}"] = values
    if not new.eval.sample_prompts:  # they will be those of the text
        changes.pop("eval.sample_prompts", None)
    return changes


def describe_presets() -> str:
    """One line per preset, for help texts."""
    width = max(map(len, PRESETS))
    return "\n".join(f"  {name:<{width}}  {(make.__doc__ or '').splitlines()[0]}" for name, make in PRESETS.items())
