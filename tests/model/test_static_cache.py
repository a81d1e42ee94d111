"""Steps behind a static cache: the tokens of the plain loop, traced once."""

import pytest
import torch
from model.test_kv_cache import model_of

from myllm.model import KVCache, Transformer

CONTEXT = 24
KINDS = [{"qk_norm": True, "n_kv_heads": 2}, {"position": "learned", "norm": "layernorm", "bias": True}]


def greedy(model: Transformer, static: bool, prompts: list[list[int]], count: int) -> list[list[int]]:
    cache = KVCache(model.config, len(prompts), CONTEXT, "cpu", torch.float32, static)
    lengths = [len(prompt) for prompt in prompts]
    padded = torch.tensor([prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts])
    written = [model.next_logits(padded, cache, lengths).argmax(dim=-1)]
    while len(written) < count:
        written.append(model.next_logits(written[-1][:, None], cache).argmax(dim=-1))
    return torch.stack(written, dim=1).tolist()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.inference_mode()
def test_compiled_steps_give_the_same_tokens_and_are_traced_once(kind: dict) -> None:
    """Rows alike or not, a new cache, another prompt: nothing of these is in the compiled step's shapes."""
    torch.compiler.reset()
    model, traced = model_of(kind | {"max_seq_len": CONTEXT}), []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        traced.append(graph)
        return graph

    model.compile_steps(backend=backend)
    for prompts in ([[7, 1], [3, 4]], [[5], [9, 8, 7, 6]], [[1, 2, 3, 4, 5, 6], [2]]):
        assert greedy(model, True, prompts, 12) == greedy(model, False, prompts, 12)
    assert len(traced) == 1
    torch.compiler.reset()


@torch.inference_mode()
def test_a_static_cache_that_loses_rows_goes_on_uncompiled() -> None:
    model = model_of(KINDS[0])
    model.compile_steps(backend=lambda *_: pytest.fail("compiled"))
    cache = KVCache(model.config, 3, CONTEXT, "cpu", torch.float32, static=True)
    tokens = torch.randint(50, (3, 6), generator=torch.Generator().manual_seed(1))
    model.next_logits(tokens[:, :5], cache)
    cache.keep([2, 0])
    torch.testing.assert_close(
        model.next_logits(tokens[[2, 0], 5:], cache), model(tokens[[2, 0]])[:, -1], rtol=0, atol=1e-5
    )
