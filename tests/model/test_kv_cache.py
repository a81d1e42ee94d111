"""Tokens one at a time, or a few, behind a cache give the logits of the whole sequence at once."""

from dataclasses import replace

import pytest
import torch
from support.kinds import by_model_kind
from support.random_models import random_model

from myllm.config import ModelConfig
from myllm.model.kv_cache import KVCache
from myllm.model.transformer import Transformer

SMALL = ModelConfig(vocab_size=50, vocab_multiple=8, max_seq_len=20, d_model=24, n_layers=3, n_heads=4, d_ff=32)


def model_of(kind: dict) -> Transformer:
    return random_model(replace(SMALL, **kind), 0.15)


@by_model_kind
@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, *[1] * 13], [5, 4, 1, 6, 1, 3]], ids=str)
@torch.no_grad()
def test_cached_chunks_match_full_sequence(kind, pieces):
    model = model_of(kind)
    tokens = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(1))
    whole = model(tokens)
    cache = KVCache(model.config, 3, 20, "cpu", torch.float32)
    parts = [model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)]
    assert cache.length == 20
    assert whole.std() > 0.5
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_cleared_cache_equals_new():
    model = model_of({})
    tokens = torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(2))
    cache = KVCache(model.config, 1, 20, "cpu", torch.float32)
    first = model(tokens, cache=cache)
    model(tokens[:, :5], cache=cache)
    cache.clear()
    assert cache.length == 0
    assert torch.equal(model(tokens, cache=cache), first)


@torch.no_grad()
def test_full_cache_raises():
    model = model_of({})
    cache = KVCache(model.config, 1, 4, "cpu", torch.float32)
    assert cache.max_tokens == 4
    with pytest.raises(AssertionError, match="cache of 4 tokens cannot hold 5"):
        model(torch.zeros(1, 5, dtype=torch.long), cache=cache)


@torch.no_grad()
def test_bfloat16_cache_under_autocast():
    model = model_of({"qk_norm": True, "n_kv_heads": 2})
    tokens = torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(2))
    cache = KVCache(model.config, 1, 20, "cpu", torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        whole = model(tokens).float()
        parts = [model(piece, cache=cache).float() for piece in tokens.split([6, 1, 1, 4], dim=1)]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 0.05 * whole.abs().max()


@pytest.mark.parametrize("kind", [{}, {"position": "learned", "n_kv_heads": 2}], ids=str)
@torch.no_grad()
def test_expanded_cache_matches_full_sequence(kind):
    model = model_of(kind)
    generator = torch.Generator().manual_seed(3)
    prefixes, ends = torch.randint(50, (2, 9), generator=generator), torch.randint(50, (5, 6), generator=generator)
    owners = torch.tensor([1, 0, 0, 1, 1])
    cache = KVCache(model.config, 2, 9, "cpu", torch.float32)
    model(prefixes, cache=cache)
    forked = cache.expand(owners, 15)
    got = model(ends, cache=forked)
    assert (cache.length, forked.length) == (9, 15)
    whole = model(torch.cat((prefixes[owners], ends), dim=1))[:, 9:]
    torch.testing.assert_close(got, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shared", [0, 1, 9])
def test_score_continuations_matches_full_sequences(shared):
    """Padding on the right, a target of -1, changes nothing; nor does autocast but for its rounding."""
    model, generator = model_of({"qk_norm": True}), torch.Generator().manual_seed(5)
    prefixes, ends = torch.randint(50, (2, shared), generator=generator), torch.randint(50, (4, 7), generator=generator)
    owners, targets = torch.tensor([0, 0, 1, 1]), ends[:, 1:].clone()
    targets[1, 3:] = -1
    log_probs = model.score_continuations(prefixes, owners, ends[:, :-1], targets)
    whole = torch.cat((prefixes[owners], ends), dim=1)
    all_targets = torch.cat((torch.full((4, shared), -1), targets), dim=1)
    expected, _, _ = model.evaluate(whole[:, :-1], all_targets)
    torch.testing.assert_close(log_probs, expected[:, shared:], rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.score_continuations(prefixes, owners, ends[:, :-1], targets)
    torch.testing.assert_close(rounded, log_probs, rtol=0, atol=0.1)
