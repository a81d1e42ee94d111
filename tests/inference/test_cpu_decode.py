"""A stand-in computes what its model does, to the bit, and leaves to modules what is theirs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.kinds import MODEL_KINDS, by_model_kind
from support.random_models import random_model
from torch import Tensor, nn

from myllm.config import ModelConfig
from myllm.inference import cpu_decode
from myllm.inference.cpu_decode import as_plain_objects, few_rows_linear
from myllm.inference.generate import Sequence, generate_batch
from myllm.inference.sampling_params import SamplingParams
from myllm.model.kv_cache import KVCache
from myllm.model.transformer import Transformer

SMALL = ModelConfig(vocab_size=50, vocab_multiple=8, max_seq_len=20, d_model=24, n_layers=2, n_heads=4, d_ff=32)
DROPOUT = {"dropout_embedding": 0.1, "dropout_ffn": 0.1, "dropout_attention_residual": 0.1}


def model_of(**kind: Any) -> Transformer:
    return random_model(replace(SMALL, **kind), 0.15)


def generated(model: Any, config: ModelConfig, counts: list[int]) -> Tensor:
    """Logits of four steps, one token each, after prompts of these lengths."""
    tokens = torch.randint(50, (len(counts), 12), generator=torch.Generator().manual_seed(1))
    cache = KVCache(config, len(counts), 20, "cpu", torch.float32)
    logits = [model.next_logits(tokens[:, : max(counts)], cache, counts)]
    logits += [model.next_logits(tokens[:, position : position + 1], cache) for position in range(8, 12)]
    return torch.stack(logits)


@pytest.mark.parametrize("kind", [*MODEL_KINDS.values(), DROPOUT], ids=[*MODEL_KINDS, "dropout"])
@pytest.mark.parametrize("counts", [[8], [8, 8, 8], [3, 8, 1]], ids=str)
@torch.inference_mode()
def test_logits_match_exactly(kind: dict[str, Any], counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_decode, "FEW_LOGIT_ROWS", 1)  # products of few rows are rounded differently
    model = model_of(**kind)
    assert torch.equal(generated(as_plain_objects(model), model.config, counts), generated(model, model.config, counts))


def modules_in(stand_in: Any) -> list[nn.Module]:
    if isinstance(stand_in, nn.Module):
        return [stand_in]
    parts = stand_in if isinstance(stand_in, list) else vars(stand_in).values() if hasattr(stand_in, "__dict__") else []
    return [module for part in parts if not isinstance(part, Tensor) for module in modules_in(part)]


@by_model_kind
def test_plain_objects_contain_no_modules(kind: dict[str, Any]) -> None:
    assert modules_in(as_plain_objects(model_of(**kind))) == []


class Doubled(nn.Module):
    """Somebody's own part."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


@pytest.mark.parametrize("where", ["feed_forward", "attention.out_proj", "attention_norm"])
@pytest.mark.parametrize("how", ["hook", "pre-hook", "own part", "own forward", "in place"])
@torch.inference_mode()
def test_changed_weights_and_hooks_take_effect(where: str, how: str) -> None:
    """Whatever somebody hangs into a model takes part in generation as in training."""
    model = model_of()
    before = generated(as_plain_objects(model), model.config, [8])
    part = model.blocks[1].get_submodule(where)
    if how == "hook":
        part.register_forward_hook(lambda module, arguments, y: 2 * y)
    elif how == "pre-hook":
        part.register_forward_pre_hook(lambda module, arguments: (2 * arguments[0], *arguments[1:]))
    elif how == "own forward":
        plain = part.forward
        part.forward = lambda x, *others: 2 * plain(x, *others)
    elif how == "own part":
        model.blocks[1].set_submodule(where, Doubled(part))
    else:
        next(part.parameters()).mul_(2)
    after = generated(as_plain_objects(model), model.config, [8])
    assert torch.equal(after, generated(model, model.config, [8]))
    assert not torch.equal(after, before)


def test_hooks_run_for_every_generated_token() -> None:
    model, seen = model_of(), []
    model.blocks[0].register_forward_hook(lambda module, arguments, y: seen.append(tuple(y.shape)))
    for _ in generate_batch(model, [Sequence([1, 2, 3], 0)], 4, SamplingParams(temperature=0)):
        pass
    assert seen == [(1, 3, 24)] + 3 * [(1, 1, 24)]


@pytest.mark.parametrize("rows", [(1,), (3,), (3, 1), (2, 2), (16, 1), (0,)])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_few_rows_linear_matches_linear(rows: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(*rows, 64, generator=generator), torch.randn(900, 64, generator=generator)
    b = torch.randn(900, generator=generator) if bias else None
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    torch.testing.assert_close(few_rows_linear(x, weight, b, 4).double(), expected, rtol=1e-5, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert few_rows_linear(x, weight, b, 4).dtype == torch.bfloat16


@torch.inference_mode()
def test_large_layers_and_head_use_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_decode, "LARGE", 1)
    for kind in MODEL_KINDS.values():
        model = model_of(**kind)
        logits = generated(as_plain_objects(model), model.config, [8, 8, 8])
        torch.testing.assert_close(logits, generated(model, model.config, [8, 8, 8]), rtol=0, atol=1e-4)
