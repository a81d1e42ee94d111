"""The whole model: its loss, causality, starting weights, parameter counts, dropout and saved names."""

import copy
import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from support.kinds import MODEL_KINDS, WITHOUT_PARTS, by_model_kind

from myllm.config import ModelConfig
from myllm.model import attention
from myllm.model.kv_cache import KVCache
from myllm.model.transformer import Transformer
from myllm.planning.flops import n_parameters, parameters_by_part
from myllm.presets import PRESETS

SMALL = ModelConfig(vocab_size=61, vocab_multiple=16, max_seq_len=16, d_model=24, n_layers=2, n_heads=4, d_ff=40)


def tokens_of(config: ModelConfig, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, config.max_seq_len), generator=generator)


def lively(config: ModelConfig) -> Transformer:
    """A model whose predictions depend on every part: starting weights alone are nearly uniform."""
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def test_every_part_is_tested():
    parts = {field.name for field in fields(ModelConfig)} - WITHOUT_PARTS
    untested = parts.difference(*MODEL_KINDS.values())
    assert not untested, "tests/support/kinds.py: add a kind that has it, or name it in WITHOUT_PARTS"


@by_model_kind
def test_loss_and_scores_match_logits(kind):
    config = replace(SMALL, **kind)
    model, tokens, targets = lively(config), tokens_of(config), tokens_of(config, seed=1)
    logits = model(tokens)
    assert logits.shape == (2, 16, 61)
    torch.testing.assert_close(model(tokens, targets), F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    targets[0, :5] = -1
    log_probs, ranks, confidence = model.evaluate(tokens, targets)
    expected = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    torch.testing.assert_close(log_probs, expected.view(2, 16))
    no_prefix = torch.zeros(1, 0, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    torch.testing.assert_close(model.score_continuations(*no_prefix, tokens, targets), log_probs)
    with_target = targets != -1
    assert torch.equal((ranks == 0) & with_target, logits.argmax(dim=-1) == targets)
    torch.testing.assert_close(confidence, logits.softmax(dim=-1).amax(dim=-1) * with_target)


def test_gradients_match_logits():
    """Through the whole model, the tied embedding's two uses included."""
    model, tokens, targets = lively(SMALL), tokens_of(SMALL), tokens_of(SMALL, seed=1)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = torch.autograd.grad(model(tokens, targets), parameters)
    plain = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    for name, mine, expected in zip(names, ours, torch.autograd.grad(plain, parameters), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert expected.any()


@by_model_kind
@torch.no_grad()
def test_causal(kind):
    config = replace(SMALL, **kind)
    model, tokens = lively(config), tokens_of(config)
    before = model(tokens)
    for changed in (1, 7, 15):
        other = tokens.clone()
        other[:, changed] = (other[:, changed] + 1) % config.vocab_size
        after = model(other)
        assert torch.equal(after[:, :changed], before[:, :changed])
        assert not torch.isclose(after[:, changed:], before[:, changed:]).all(dim=-1).any()


class OnMPS:
    """A tensor that says that it is on a device that is not here."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.device, self.dtype, self.new_ones = torch.device("mps"), tensor.dtype, tensor.new_ones


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mps_gets_mask_in_half_precision(dtype):
    """Its own one leaks later tokens there."""
    values = torch.randn(2, 3, 9, 4, dtype=dtype)
    assert attention._causal_mask(9, 9, values) == {"is_causal": True}
    arguments = attention._causal_mask(9, 9, OnMPS(values))
    assert ("is_causal" in arguments) == (dtype is torch.float32)
    assert attention._causal_mask(1, 1, OnMPS(values)) in ({}, {"is_causal": True})
    attend = F.scaled_dot_product_attention
    torch.testing.assert_close(attend(values, values, values, **arguments), attend(*[values] * 3, is_causal=True))


@torch.no_grad()
def test_grouped_query_attention_matches_repeated_heads():
    """Grouped queries are multi-head attention in which neighbouring heads have equal keys and values."""
    grouped = lively(replace(SMALL, n_kv_heads=2, bias=True))
    full = Transformer(replace(SMALL, bias=True)).eval()
    weights = grouped.state_dict()
    for name in [name for name in weights if ".qkv_proj." in name]:
        q, k, v = weights[name].split((24, 12, 12))  # rows of 4, 2 and 2 heads of 6
        k, v = (part.unflatten(0, (2, 6)).repeat_interleave(2, dim=0).flatten(0, 1) for part in (k, v))
        weights[name] = torch.cat((q, k, v))
    full.load_state_dict(weights)
    torch.testing.assert_close(full(tokens_of(SMALL)), grouped(tokens_of(SMALL)), rtol=1e-5, atol=1e-5)


def test_exceeding_context_raises():
    model = Transformer(SMALL)
    with pytest.raises(AssertionError, match="17 tokens exceed the context of 16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    cache = KVCache(SMALL, 1, 32, "cpu", torch.float32)
    model(torch.zeros(1, 10, dtype=torch.long), cache=cache)
    with pytest.raises(AssertionError, match="17 tokens exceed the context of 16"):
        model(torch.zeros(1, 7, dtype=torch.long), cache=cache)


# -- starting weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["gpt2", "reference"])
def test_init_statistics(init):
    config = ModelConfig(
        vocab_size=1_000, max_seq_len=200, d_model=128, n_layers=4, n_heads=4, d_ff=256, bias=True, qk_norm=True,
        position="learned", norm="layernorm", tie_embeddings=False, init=init,
    )  # fmt: skip
    residual = {"gpt2": 0.02 / math.sqrt(8), "reference": 1 / (math.sqrt(128) * 4)}[init]
    other = {"gpt2": 0.02, "reference": math.sqrt(2 / (5 * 128))}[init]
    seen = set()
    for name, parameter in Transformer(config).state_dict().items():
        kind = name.rpartition(".")[0].rpartition(".")[2]
        seen.add(kind)
        if name in ("embedding.weight", "head.weight"):
            assert parameter.shape[0] == 1_024
            assert not parameter[1_000:].any()
            assert parameter[:1_000].any(dim=1).all()
            parameter = parameter[:1_000]
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in kind:
            assert (parameter == 1).all(), name
        else:
            expected = residual if kind in ("out_proj", "down_proj") else other
            # The standard error of a standard deviation is a share 1 / sqrt(2 n) of it.
            tolerance = 5 / math.sqrt(2 * parameter.numel())
            assert parameter.std() == pytest.approx(expected, rel=tolerance), name
            assert abs(parameter.mean()) < 5 * expected / math.sqrt(parameter.numel()), name
    assert seen == {
        "embedding", "positions", "attention_norm", "qkv_proj", "q_norm", "k_norm", "out_proj", "feed_forward_norm",
        "up_proj", "down_proj", "norm", "head",
    }  # fmt: skip


@torch.no_grad()
def test_zero_residual_init():
    """Blocks add nothing at first, and an untied head is so small that the loss is ln V."""
    config = replace(SMALL, vocab_size=1_000, d_model=64, tie_embeddings=False, bias=True, init="zero_residual")
    model, tokens = Transformer(config), tokens_of(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "down_proj.weight")):
            assert not parameter.any(), name
        elif parameter.ndim == 2 and name != "head.weight":
            assert parameter[:1_000].std() == pytest.approx(math.sqrt(2 / (5 * 64)), rel=0.1), name
    assert model.head.weight[:1_000].std() == pytest.approx(0.001, rel=0.1)
    assert torch.equal(model.hidden(tokens), model.norm(model.embedding(tokens)))
    assert model(tokens, tokens.roll(1)).item() == pytest.approx(math.log(1_000), abs=1e-3)


def test_init_depends_only_on_seed():
    torch.manual_seed(1)
    one = Transformer(SMALL, seed=7).state_dict()
    torch.manual_seed(2)  # the global generator has no say
    same, other = Transformer(SMALL, seed=7).state_dict(), Transformer(SMALL, seed=8).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])


def test_initial_loss_is_near_uniform():
    config = replace(SMALL, vocab_size=1_000, d_model=64, n_heads=4)
    tokens = tokens_of(config)
    assert Transformer(config)(tokens, tokens.roll(1)).item() == pytest.approx(math.log(1_000), abs=0.1)


@torch.no_grad()
def test_embedding_norm_precedes_positions():
    config = replace(
        SMALL, position="learned", norm="layernorm", bias=True, tie_embeddings=False, embedding_norm=True,
        init="zero_residual",
    )  # fmt: skip
    model, tokens = Transformer(config), tokens_of(config)
    table = F.layer_norm(model.embedding.weight, (24,), eps=config.norm_eps)
    expected = F.layer_norm(table[tokens] + model.positions.weight, (24,), eps=config.norm_eps)
    torch.testing.assert_close(model.hidden(tokens), expected)


def test_initial_residual_scales_are_identity():
    """Loss and gradients are to the bit those of the model without."""
    plain, scaled = Transformer(SMALL), Transformer(replace(SMALL, residual_scales=True))
    tokens = tokens_of(SMALL)
    loss, *gradients = gradients_of(plain.train(), tokens)
    scaled_loss, scales, *others = gradients_of(scaled.train(), tokens)
    assert torch.equal(loss, scaled_loss)
    assert all(map(torch.equal, gradients, others))
    assert scales.all()


# -- parameters -------------------------------------------------------------------------------------------------------


def counted_by_part(model: Transformer) -> dict[str, int]:
    """The module's parameters under plan.py's names, without the vocabulary's padding."""
    rows = model.config.vocab_size
    found = dict.fromkeys(
        ("embedding", "positions", "attention", "feed-forward", "norms", "residual scales", "head"), 0
    )
    for name, parameter in model.named_parameters():
        words = name.split(".")
        if words[0] in ("embedding", "head"):
            found[words[0]] += parameter[:rows].numel()
        elif words[0] in ("positions", "residual_scales"):
            found[words[0].replace("_", " ")] += parameter.numel()
        elif words[0] == "blocks" and words[2] in ("attention", "feed_forward"):
            found[words[2].replace("_", "-")] += parameter.numel()
        else:
            found["norms"] += parameter.numel()
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_planned_parameters_match_presets(name):
    config = PRESETS[name]().model
    with torch.device("meta"):  # full size: shapes without memory
        assert counted_by_part(Transformer(config)) == parameters_by_part(config)
    small = replace(config, vocab_size=60, d_model=40, n_layers=2, n_heads=4, d_ff=50, max_seq_len=8)
    assert counted_by_part(Transformer(small)) == parameters_by_part(small)


@by_model_kind
def test_planned_parameters_match_all_variants(kind):
    config = replace(SMALL, **kind)
    assert counted_by_part(Transformer(config)) == parameters_by_part(config)


def test_reference_run_parameter_count():
    """Its author's figures: 320,145,408 in all, "269M" without the embedding."""
    parts = parameters_by_part(PRESETS["lf-llm-269m"]().model)
    assert sum(parts.values()) == n_parameters(PRESETS["lf-llm-269m"]().model) == 320_145_408
    assert sum(parts.values()) - parts["embedding"] == 268_682_240


def test_gpt2_parameter_count():
    assert n_parameters(PRESETS["gpt2-124m"]().model) == 124_439_808  # openai-community/gpt2


def test_state_dict_names():
    """Checkpoints are saved under these names: changing one makes old checkpoints unreadable."""
    config = replace(SMALL, n_layers=1, bias=True, qk_norm=True)
    assert list(Transformer(config).state_dict()) == [
        "embedding.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.attention.qkv_proj.weight",
        "blocks.0.attention.qkv_proj.bias",
        "blocks.0.attention.out_proj.weight",
        "blocks.0.attention.out_proj.bias",
        "blocks.0.attention.q_norm.weight",
        "blocks.0.attention.k_norm.weight",
        "blocks.0.feed_forward_norm.weight",
        "blocks.0.feed_forward.up_proj.weight",
        "blocks.0.feed_forward.up_proj.bias",
        "blocks.0.feed_forward.down_proj.weight",
        "blocks.0.feed_forward.down_proj.bias",
        "norm.weight",
    ]
    learned = replace(config, position="learned", norm="layernorm", tie_embeddings=False, qk_norm=False)
    assert set(Transformer(learned).state_dict()) - set(Transformer(config).state_dict()) == {
        "blocks.0.attention_norm.bias",
        "blocks.0.feed_forward_norm.bias",
        "norm.bias",
        "head.weight",
        "positions.weight",
    }
    switches = {"embedding_norm": True, "tie_embeddings": False, "residual_scales": True}
    modern = Transformer(replace(config, **switches)).state_dict()
    assert set(modern) - set(Transformer(config).state_dict()) == {
        "residual_scales",
        "embedding_norm.weight",
        "head.weight",
    }
    assert modern["residual_scales"].tolist() == [1.0]


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["dropout_embedding", "dropout_attention_residual", "dropout_ffn"])
def test_dropout_in_training_only(where):
    model, tokens = lively(replace(SMALL, **{where: 0.5})), tokens_of(SMALL)
    plain = Transformer(SMALL).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens), plain(tokens))
    model.train()
    assert not torch.equal(model(tokens), plain(tokens))
    assert not torch.equal(model(tokens), model(tokens))


def test_autocast_keeps_float32_gradients():
    config = replace(SMALL, qk_norm=True, n_kv_heads=2)
    model, tokens, targets = lively(config).train(), tokens_of(config), tokens_of(config, seed=1)
    exact = model(tokens, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(tokens, targets)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.01)
    rough.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert not model.embedding.weight.grad[config.vocab_size :].any()


def gradients_of(model: Transformer, tokens: torch.Tensor, autocast: bool = False) -> list[torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(tokens[:, :-1], tokens[:, 1:])
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@by_model_kind
def test_bfloat16_residual_stream(kind):
    """Its loss and gradients are as close to float64's as autocast's own, and no other computation changes by a bit."""
    plain = lively(replace(SMALL, **kind)).train()
    half = Transformer(replace(SMALL, **kind, residual_dtype="bfloat16")).train()
    half.load_state_dict(plain.state_dict())
    tokens, types = tokens_of(SMALL), []
    for block in half.blocks:
        block.register_forward_hook(lambda block, inputs, output: types.extend([inputs[0].dtype, output.dtype]))
    rough, usual = gradients_of(half, tokens, autocast=True), gradients_of(plain, tokens, autocast=True)
    assert set(types) == {torch.bfloat16}
    assert {gradient.dtype for gradient in rough} == {torch.float32}
    exact = [gradient.float() for gradient in gradients_of(copy.deepcopy(plain).double(), tokens)]
    assert rough[0].item() == pytest.approx(exact[0].item(), rel=0.01)
    for mine, theirs, expected in zip(rough[1:], usual[1:], exact[1:], strict=True):
        assert (mine - expected).norm() < 3 * (theirs - expected).norm() + 0.01 * expected.norm()
    assert all(map(torch.equal, gradients_of(half, tokens), gradients_of(plain, tokens)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half.eval()(tokens), plain.eval()(tokens))


def test_activation_recomputation_is_bitwise_equal():
    """Dropout too: the same masks are drawn again."""
    tokens = tokens_of(SMALL)
    config = replace(
        SMALL, dropout_embedding=0.1, dropout_attention_residual=0.2, dropout_ffn=0.3, residual_scales=True
    )
    found = []
    for recompute in (False, True):
        model = Transformer(config, seed=1).train()
        for block in model.blocks:
            block.recompute = recompute
        kept = []
        torch.manual_seed(7)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters()], torch.get_rng_state(), sum(kept)))
    (loss, gradients, random, kept), (again, others, random_again, fewer) = found
    assert torch.equal(loss, again)
    assert all(map(torch.equal, gradients, others))
    assert torch.equal(random, random_again)
    assert fewer < kept / 2
