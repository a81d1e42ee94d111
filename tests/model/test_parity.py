"""The same weights give the same logits as transformers' Llama, Qwen3 and GPT-2, and as a float64 NumPy model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from model import reference
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from myllm.config import ModelConfig
from myllm.model import Transformer

TOLERANCE = 1e-5
SMALL = ModelConfig(
    vocab_size=101, vocab_multiple=16, max_seq_len=24, d_model=32, n_layers=3, n_heads=4, d_ff=48, rope_theta=500.0
)
TOKENS = torch.randint(101, (2, 24), generator=torch.Generator().manual_seed(5))


def random_model(config: ModelConfig) -> Transformer:
    """A model none of whose parameters is at its starting value: norm weights are not 1, biases are not 0."""
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise + (0 if name.endswith("bias") else 1))
    return model


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert ours.std() > 0.5
    assert ours.std(dim=1).min() > 0.1  # differs from one position to the next
    assert (ours - theirs).abs().max() < TOLERANCE


# -- transformers -----------------------------------------------------------------------------------------------------


def llama_weights(model: Transformer) -> dict[str, torch.Tensor]:
    """Our weights under the names that Llama and Qwen3 share."""
    config, ours = model.config, model.state_dict()
    q, kv = config.n_heads * config.head_size, config.kv_heads * config.head_size
    theirs = {
        "model.embed_tokens.weight": ours["embedding.weight"][: config.vocab_size],
        "model.norm.weight": ours["norm.weight"],
        "lm_head.weight": model.head_weight[: config.vocab_size],
    }
    for i in range(config.n_layers):
        mine, layer = f"blocks.{i}.", f"model.layers.{i}."
        theirs[f"{layer}input_layernorm.weight"] = ours[f"{mine}attention_norm.weight"]
        theirs[f"{layer}post_attention_layernorm.weight"] = ours[f"{mine}feed_forward_norm.weight"]
        for kind in ("weight", "bias") if config.bias else ("weight",):
            parts = ours[f"{mine}attention.qkv_proj.{kind}"].split((q, kv, kv))
            for name, part in zip("qkv", parts, strict=True):
                theirs[f"{layer}self_attn.{name}_proj.{kind}"] = part
            theirs[f"{layer}self_attn.o_proj.{kind}"] = ours[f"{mine}attention.out_proj.{kind}"]
            gate, up = ours[f"{mine}feed_forward.up_proj.{kind}"].split(config.d_ff)
            theirs[f"{layer}mlp.gate_proj.{kind}"] = gate
            theirs[f"{layer}mlp.up_proj.{kind}"] = up
            theirs[f"{layer}mlp.down_proj.{kind}"] = ours[f"{mine}feed_forward.down_proj.{kind}"]
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            theirs[f"{layer}self_attn.{name}.weight"] = ours[f"{mine}attention.{name}.weight"]
    return theirs


def shared_settings(config: ModelConfig) -> dict:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attn_implementation": "eager",
    }


@torch.no_grad()
def their_logits(peer: torch.nn.Module, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    peer.load_state_dict(weights, strict=True)
    return peer.eval()(TOKENS).logits


def llama_logits(model: Transformer) -> torch.Tensor:
    peer = LlamaForCausalLM(
        LlamaConfig(**shared_settings(model.config), attention_bias=model.config.bias, mlp_bias=model.config.bias)
    )
    return their_logits(peer, llama_weights(model))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": True},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1, "head_dim": 12, "bias": True},
        {"tie_embeddings": False},
        {"rope_theta": 10_000.0, "norm_eps": 1e-3},
    ],
    ids=str,
)
@torch.no_grad()
def test_llama(changes):
    model = random_model(replace(SMALL, **changes))
    assert_same(model(TOKENS), llama_logits(model))


@torch.no_grad()
def test_parity_notices_a_wrong_detail():
    """The comparison is sharp: one wrong number in the config is far outside the tolerance."""
    right = random_model(SMALL)
    for wrong in ({"rope_theta": 10_000.0}, {"norm_eps": 1e-2}):
        other = Transformer(replace(SMALL, **wrong)).eval()
        other.load_state_dict(right.state_dict())
        assert (other(TOKENS) - llama_logits(right)).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    "changes", [{}, {"head_dim": 16}, {"n_kv_heads": 2, "head_dim": 6, "tie_embeddings": False}], ids=str
)
@torch.no_grad()
def test_qwen3(changes):
    model = random_model(replace(SMALL, qk_norm=True, **changes))
    peer = Qwen3ForCausalLM(Qwen3Config(**shared_settings(model.config), attention_bias=False))
    assert_same(model(TOKENS), their_logits(peer, llama_weights(model)))


@torch.no_grad()
def test_gpt2():
    config = replace(SMALL, position="learned", norm="layernorm", activation="gelu", bias=True)
    model = random_model(config)
    ours = model.state_dict()
    theirs = {
        "transformer.wte.weight": ours["embedding.weight"][: config.vocab_size],
        "lm_head.weight": ours["embedding.weight"][: config.vocab_size],
        "transformer.wpe.weight": ours["positions.weight"],
        "transformer.ln_f.weight": ours["norm.weight"],
        "transformer.ln_f.bias": ours["norm.bias"],
    }
    names = {
        "ln_1": "attention_norm",
        "ln_2": "feed_forward_norm",
        "attn.c_attn": "attention.qkv_proj",
        "attn.c_proj": "attention.out_proj",
        "mlp.c_fc": "feed_forward.up_proj",
        "mlp.c_proj": "feed_forward.down_proj",
    }
    for i in range(config.n_layers):
        for their_name, name in names.items():
            weight = ours[f"blocks.{i}.{name}.weight"]
            theirs[f"transformer.h.{i}.{their_name}.weight"] = weight.t() if weight.ndim == 2 else weight
            theirs[f"transformer.h.{i}.{their_name}.bias"] = ours[f"blocks.{i}.{name}.bias"]
    peer = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_seq_len,
            n_embd=config.d_model,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_inner=config.d_ff,
            layer_norm_epsilon=config.norm_eps,
            attn_implementation="eager",
        )
    )
    assert_same(model(TOKENS), their_logits(peer, theirs))


# -- float64 NumPy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "relu2", "qk_norm": True, "tie_embeddings": False},
        {"activation": "swiglu", "n_kv_heads": 2, "bias": True},
        {"activation": "relu2", "n_kv_heads": 1, "head_dim": 10},
    ],
    ids=str,
)
@torch.no_grad()
def test_numpy_reference(changes):
    config = replace(SMALL, **changes)
    model = random_model(config)
    shape = {
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_size,
        "theta": config.rope_theta,
        "eps": config.norm_eps,
        "activation": config.activation,
    }
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    expected = np.stack([reference.logits(weights, row, shape)[:, : config.vocab_size] for row in TOKENS.tolist()])
    assert_same(model(TOKENS), torch.from_numpy(expected).float())
