"""Presets are what their names promise."""

import dataclasses
import json
import math
import random
import subprocess
import sys

import pytest
from conftest import ROOT, eval_rows

from myllm.config import RunConfig
from myllm.errors import UserError
from myllm.inference.load import load_model
from myllm.planning.batch import batch_plan
from myllm.planning.flops import n_parameters
from myllm.presets import PRESETS, describe_presets, get_preset


@pytest.mark.parametrize("name", PRESETS)
def test_preset_name_and_description(name):
    config = get_preset(name)
    assert isinstance(config, RunConfig)
    assert config.name == name
    assert PRESETS[name].__name__ == name.replace("-", "_")
    first = PRESETS[name].__doc__.splitlines()[0]
    assert first.endswith(".")
    assert f"{name} " in describe_presets()
    assert first in describe_presets()


def test_presets_are_reproducible():
    assert get_preset("debug") == get_preset("debug")


def test_unknown_preset_raises():
    with pytest.raises(UserError, match="unknown preset 'gpt2', did you mean 'gpt2-124m'"):
        get_preset("gpt2")
    with pytest.raises(UserError, match="known presets: debug, tinystories-laptop, small-50m"):
        get_preset("zzz")


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads", "context", "millions"),
    [
        ("small-50m", 8, 512, 8, 1_024, 51),
        ("dolma-75m", 10, 640, 10, 1_024, 82),
        ("gpt2-124m", 12, 768, 12, 1_024, 124),
        ("default-150m", 12, 768, 12, 2_048, 152),
        ("lf-llm-269m", 16, 1_024, 16, 2_048, 320),
    ],
)
def test_model_shapes(name, layers, width, heads, context, millions):
    model = get_preset(name).model
    assert (model.n_layers, model.d_model, model.n_heads, model.max_seq_len) == (layers, width, heads, context)
    assert model.vocab_size == 50_257
    assert round(n_parameters(model) / 1e6) == millions


def test_gpt2_124m():
    model = get_preset("gpt2-124m").model
    assert (model.norm, model.activation, model.position, model.bias) == ("layernorm", "gelu", "learned", True)
    assert {model.dropout_embedding, model.dropout_attention_residual, model.dropout_ffn} == {0.1}
    assert model.d_ff == 4 * 768
    assert model.tie_embeddings


def test_dolma_75m():
    config = get_preset("dolma-75m")
    assert (config.model.activation, config.model.position) == ("gelu", "learned")
    batch = batch_plan(config, world_size=1)
    assert (batch.micro_batch_size, batch.grad_accum_steps) == (12, 4)
    assert config.optim.max_lr == 5e-4
    assert config.data.target_tokens == 5_000_000_000
    assert config.train.max_steps * config.train.batch_tokens == pytest.approx(5e9, rel=1e-4)


def test_lf_llm_269m():
    """The reference run, to the letter."""
    config = get_preset("lf-llm-269m")
    model, optim, train = config.model, config.optim, config.train
    assert (model.norm, model.norm_eps, model.position, model.rope_theta) == ("rmsnorm", 1e-5, "rope", 10_000)
    assert (model.activation, model.d_ff, model.bias, model.tie_embeddings) == ("swiglu", 4_096, True, True)
    assert (model.qk_norm, model.kv_heads, model.head_size) == (False, 16, 64)
    assert (model.dropout_embedding, model.dropout_attention_residual, model.dropout_ffn) == (0.0, 0.1, 0.15)
    assert model.init == "reference"
    assert n_parameters(model) == 320_145_408
    assert (optim.max_lr, optim.warmup_steps, optim.schedule, optim.min_lr_ratio) == (0.0021, 226, "cosine", 0.1)
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay) == (0.9, 0.95, 1e-8, 0.1)
    assert optim.max_grad_norm == 1.0
    assert (train.max_steps, train.batch_tokens, train.micro_batch_size) == (19_073, 524_288, 16)
    assert batch_plan(config, world_size=8).grad_accum_steps == 2
    assert optim.warmup_steps == int(0.0119 * train.max_steps)
    assert config.data.source == "fineweb-edu-10bt"
    assert config.data.val_tokens >= config.eval.validation_tokens
    assert config.eval.validation_tokens == 30 * 262_144


def test_small_presets_scale_large_recipe():
    large = get_preset("lf-llm-269m-modern").optim
    for name, batch_tokens in (("small-50m", 131_072), ("default-150m", 524_288)):
        config = get_preset(name)
        tokens = config.train.max_steps * batch_tokens / (7_630 * 524_288)
        scale = (1_024 / config.model.d_model) ** 0.5 * tokens**-0.32 * (batch_tokens / 524_288) ** 0.5
        assert config.optim.muon_lr == pytest.approx(large.muon_lr * scale, rel=0.08)
        assert config.optim.max_lr == pytest.approx(large.max_lr * scale, rel=0.08)
        decay = large.muon_lr * large.weight_decay * 7_630 / (config.optim.muon_lr * config.train.max_steps)
        assert config.optim.weight_decay == pytest.approx(decay, rel=0.08)
        rates = {"muon_lr": large.muon_lr, "max_lr": large.max_lr, "weight_decay": large.weight_decay}
        assert dataclasses.replace(config.optim, **rates) == large
        assert config.model.init == "zero_residual"


def test_modern_presets_use_qk_norm_without_dropout():
    for name in ("small-50m", "default-150m", "debug", "tinystories-laptop"):
        model = get_preset(name).model
        assert model.dropout_embedding == model.dropout_attention_residual == model.dropout_ffn == 0
        assert (model.position, model.norm, model.activation, model.qk_norm) == ("rope", "rmsnorm", "swiglu", True)
        assert not model.bias


def test_debug_uses_cpu_and_local_data():
    config = get_preset("debug")
    assert config.data.source == "python-stdlib"
    assert config.train.device == "cpu"


def test_tinystories_laptop():
    config = get_preset("tinystories-laptop")
    model = config.model
    # Tied embedding; per layer q, k, v, o, three of the MLP, two norms and those of queries and keys; a last norm.
    layer = 4 * 192 * 192 + 3 * 192 * 512 + 2 * 192 + 2 * 32
    assert n_parameters(model) == 4_096 * 192 + 6 * layer + 192
    assert config.data.tokenizer == f"train:{model.vocab_size}"
    assert config.train.max_steps * config.train.batch_tokens <= config.data.target_tokens, "one epoch"


def test_tinystories_laptop_without_the_hub(tmp_path, temp_data):
    """From stories made here to samples: it trains its vocabulary, prepares the text and takes two steps."""
    chance = random.Random(0)
    words = ["".join(chance.choices("bdfglmnprst") + chance.choices("aeiou") + ["n"] * (i % 2)) for i in range(99)]
    stories = [" ".join("".join(chance.choices(words, k=3)) for _ in range(150)) for _ in range(400)]
    rows = [json.dumps({"text": f"Once upon a time, {story}."}) for story in stories]
    (tmp_path / "stories.jsonl").write_text("\n".join(rows))
    overrides = (
        "--data.workers 1 --train.device cpu --train.max-steps 2 --train.batch-tokens 1024 --train.micro-batch-size 4 "
        "--optim.warmup-steps 0 --eval.validation-tokens 1024 --eval.sample-new-tokens 8"
    )
    command = [sys.executable, str(ROOT / "pretrain.py"), "tinystories-laptop", *overrides.split()]
    command += ["--data.source", f"files:{tmp_path / 'stories.jsonl'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "training a tokenizer of 4,096 tokens" in done.stderr
    run = temp_data / "runs" / "tinystories-laptop"
    losses = [row["loss"] for row in eval_rows(run, "validation")]
    assert losses[0] == pytest.approx(math.log(4_096), abs=0.5)
    assert losses[-1] < losses[0]
    assert load_model(str(run)).tokenizer.vocab_size == 4_096
