"""The same weights give the same logits as transformers' Llama, Qwen3 and GPT-2, and as a float64 NumPy model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from model import reference
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from myllm.config import ModelConfig
from myllm.errors import UserError
from myllm.hub.architectures import LLAMA3_KEYS, select_architecture, transformers_config
from myllm.hub.export.fold import fold_weights
from myllm.hub.weights import export_weights
from myllm.model.rope import rotary_frequencies
from myllm.model.transformer import Transformer

TOLERANCE = 1e-5
SMALL = ModelConfig(
    vocab_size=101, vocab_multiple=16, max_seq_len=24, d_model=32, n_layers=3, n_heads=4, d_ff=48, rope_theta=500.0
)
GPT2 = replace(SMALL, position="learned", norm="layernorm", activation="gelu", bias=True)
MODERN = {"embedding_norm": True, "tie_embeddings": False, "residual_scales": True, "activation": "relu2"}
TOKENS = torch.randint(101, (2, 24), generator=torch.Generator().manual_seed(5))


def random_model(config: ModelConfig) -> Transformer:
    """A model none of whose parameters is at its starting value: norm weights are not 1, biases are not 0, residual
    scales are about 1."""
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                spread = 0.1 if name == "residual_scales" else 0.3  # their products stay positive
                parameter.copy_(spread * noise + (0 if name.endswith("bias") else 1))
    return model


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert ours.std() > 0.5
    assert ours.std(dim=1).min() > 0.1  # differs from one position to the next
    assert (ours - theirs).abs().max() < TOLERANCE


# -- transformers -----------------------------------------------------------------------------------------------------


def peer_of(model: Transformer) -> torch.nn.Module:
    """transformers' own model with our weights, by the tables that exports use."""
    config, weights = fold_weights(model.config, model.state_dict())
    kind = select_architecture(config)
    peer = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**transformers_config(config, 0, "float32")), attn_implementation="eager"
    )
    missing, unexpected = peer.load_state_dict(export_weights(kind, config, weights), strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if config.tie_embeddings else [])
    peer.tie_weights()
    return peer.eval()


def their_logits(model: Transformer) -> torch.Tensor:
    return peer_of(model)(TOKENS).logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": True},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1, "head_dim": 12, "bias": True},
        {"tie_embeddings": False},
        {"rope_theta": 10_000.0, "norm_eps": 1e-3},
        {"activation": "relu2"},
        {"residual_scales": True, "bias": True},
        MODERN | {"bias": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_llama(changes):
    model = random_model(replace(SMALL, **changes))
    assert type(peer_of(model)) is LlamaForCausalLM
    assert_same(model(TOKENS), their_logits(model))


@pytest.mark.parametrize("n_heads", [1, 2, 3, 4, 5, 6, 7])
@torch.no_grad()
def test_heads_that_do_not_divide_the_width(n_heads):
    """With a head_dim, any number of heads can be trained. What is exported must open."""
    config = replace(SMALL, n_heads=n_heads, n_kv_heads=1, head_dim=10)
    qwen = random_model(replace(config, qk_norm=True))
    assert_same(qwen(TOKENS), their_logits(qwen))
    llama = random_model(config)
    try:
        LlamaConfig(hidden_size=config.d_model, num_attention_heads=n_heads, num_key_value_heads=1, head_dim=10)
    except StrictDataclassError:  # its own check
        with pytest.raises(UserError, match=f"expected a multiple of model.n_heads .{n_heads}."):
            select_architecture(config)
    else:
        assert_same(llama(TOKENS), their_logits(llama))


LLAMA_3_2_1B = {"head_dim": 64, "theta": 500_000.0, "scaling": (32.0, 1.0, 4.0, 8_192.0)}
"""Source: config.json of meta-llama/Llama-3.2-1B, whose context is 131,072."""


def test_scaled_frequencies_of_llama_3_2():
    scaling = dict(zip(LLAMA3_KEYS, LLAMA_3_2_1B["scaling"], strict=True)) | {"rope_type": "llama3"}
    peer = LlamaConfig(
        hidden_size=2_048, num_attention_heads=32, max_position_embeddings=131_072, rope_theta=500_000.0,
        rope_scaling=scaling,
    )  # fmt: skip
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](peer)
    ours, plain = rotary_frequencies(**LLAMA_3_2_1B), rotary_frequencies(64, 500_000.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    ratio = plain / ours
    kept, divided = ratio == 1, (ratio - 32).abs() < 1e-4
    assert kept.any()
    assert divided.any()
    assert (~kept & ~divided).any()  # blended: all three cases


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "n_kv_heads": 1, "head_dim": 12}], ids=str)
@torch.no_grad()
def test_scaled_frequencies(changes):
    """On a context of three times that of pretraining; with plain frequencies the logits are others."""
    config = replace(SMALL, rope_scaling=(8.0, 0.5, 2.0, 8.0), **changes)
    model = random_model(config)
    peer = peer_of(model)
    assert peer.config.rope_parameters["rope_type"] == "llama3"
    assert_same(model(TOKENS), peer(TOKENS).logits)
    plain = Transformer(replace(config, rope_scaling=())).eval()
    plain.load_state_dict(model.state_dict())
    assert (plain(TOKENS) - model(TOKENS)).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def test_parity_notices_a_wrong_detail():
    """The comparison is sharp: one wrong number in the config is far outside the tolerance."""
    right = random_model(SMALL)
    for wrong in ({"rope_theta": 10_000.0}, {"norm_eps": 1e-2}):
        other = Transformer(replace(SMALL, **wrong)).eval()
        other.load_state_dict(right.state_dict())
        assert (other(TOKENS) - their_logits(right)).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    "changes", [{}, {"head_dim": 16}, {"n_kv_heads": 2, "head_dim": 6, "tie_embeddings": False}, MODERN], ids=str
)
@torch.no_grad()
def test_qwen3(changes):
    model = random_model(replace(SMALL, qk_norm=True, **changes))
    assert type(peer_of(model)) is Qwen3ForCausalLM
    assert_same(model(TOKENS), their_logits(model))


@pytest.mark.parametrize(
    "changes", [{}, {"bias": False}, {"tie_embeddings": False, "norm_eps": 1e-3, "d_ff": 40}, MODERN], ids=str
)
@torch.no_grad()
def test_gpt2(changes):
    model = random_model(replace(GPT2, **changes))
    assert type(peer_of(model)) is GPT2LMHeadModel
    assert_same(model(TOKENS), their_logits(model))


# -- float64 NumPy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "relu2", "qk_norm": True, "tie_embeddings": False},
        {"activation": "swiglu", "n_kv_heads": 2, "bias": True},
        {"activation": "relu2", "n_kv_heads": 1, "head_dim": 10},
        {"residual_scales": True},
        MODERN | {"qk_norm": True, "norm_eps": 1e-2},
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
