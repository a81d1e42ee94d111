"""Sampling with a key-value cache: one engine for evaluations, the command line and notebooks.

Shapes: B samples, T tokens, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .errors import UserError
from .model import KVCache, Transformer
from .model.kv_cache import cache_dtype


def generate(
    model: Transformer,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
    end_of_text: int | None = None,
) -> Iterator[int]:
    """Continue a prompt, one token id at a time, until `end_of_text` (which is not given out) or `max_new_tokens`.

    Random numbers come from a generator of their own on the CPU: the same seed gives the same text on every device up
    to rounding, and training's random state is left alone. Beyond the context the window slides: the older half is
    forgotten, the newer half read again.

    Args:
        model: in evaluation mode.
        prompt: token ids; of one longer than the context, the last tokens count.
        temperature: 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens; 0 for all.

    Raises:
        UserError: empty prompt or settings out of range.
    """
    if not prompt:
        raise UserError("the prompt is empty: give at least one token to start from")
    if not 0 <= seed < 2**63:
        raise UserError(f"the seed {seed} must be at least 0 and below 2**63")
    if not 0 <= temperature < float("inf") or top_k < 0 or max_new_tokens < 0:
        raise UserError(
            f"temperature {temperature}, top_k {top_k} and max_new_tokens {max_new_tokens} must be finite, not negative"
        )
    # A generator of its own, so that the faults above are raised here and not at the first token.
    return _continue(model, prompt, max_new_tokens, temperature, top_k, seed, end_of_text)


@torch.no_grad()
def _continue(
    model: Transformer,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    end_of_text: int | None,
) -> Iterator[int]:
    device = next(model.parameters()).device
    context = model.config.max_seq_len
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt[-context:])
    cache = KVCache(model.config, 1, context, device, cache_dtype(device))
    fresh = tokens
    for _ in range(max_new_tokens):
        if cache.length + len(fresh) > context:
            cache.clear()
            fresh = tokens[-(context // 2 or 1) :]
        logits = model(torch.tensor([fresh], device=device), cache=cache)[0, -1]  # (V,)
        token = choose(logits, temperature, top_k, generator)
        if token == end_of_text:
            return
        yield token
        tokens = [*tokens, token][-context:]
        fresh = [token]


def choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token id drawn from logits, (V,)."""
    logits = logits.cpu().double()
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        logits, ids = logits.topk(min(top_k, len(logits)))
    # The largest becomes 0 first: divided by a tiny temperature it would be infinite.
    probabilities = ((logits - logits.max()) / temperature).softmax(dim=-1)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return int(ids[drawn] if top_k else drawn)
