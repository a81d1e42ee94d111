"""Steps behind a static cache: the tokens of the plain loop, traced once."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from model.test_kv_cache import model_of
from support.compiler import needs_compiler

from myllm.inference import generate as generation
from myllm.inference.generate import Sequence, generate_batch
from myllm.inference.sampling_params import SamplingParams
from myllm.model.kv_cache import KVCache
from myllm.model.transformer import Transformer

CONTEXT = 24
KINDS = [
    {"qk_norm": True, "n_kv_heads": 2},
    {"position": "learned", "norm": "layernorm", "bias": True},
    {"embedding_norm": True, "residual_scales": True, "tie_embeddings": False},
]


def greedy(model: Transformer, static: bool, prompts: list[list[int]], count: int) -> list[list[int]]:
    cache = KVCache(model.config, len(prompts), CONTEXT, "cpu", torch.float32, static)
    lengths = [len(prompt) for prompt in prompts]
    padded = torch.tensor([prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts])
    generated_ids = [model.next_logits(padded, cache, lengths).argmax(dim=-1)]
    while len(generated_ids) < count:
        generated_ids.append(model.next_logits(generated_ids[-1][:, None], cache).argmax(dim=-1))
    return torch.stack(generated_ids, dim=1).tolist()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.inference_mode()
def test_compiled_steps_match_eager_and_trace_once(kind: dict) -> None:
    """Rows alike or not, a new cache, another prompt: nothing of these is in the compiled step's shapes."""
    torch.compiler.reset()
    model, traced = model_of(kind | {"max_seq_len": CONTEXT}), []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        traced.append(graph)
        return graph

    model.compile_decoding(backend=backend)
    for prompts in ([[7, 1], [3, 4]], [[5], [9, 8, 7, 6]], [[1, 2, 3, 4, 5, 6], [2]]):
        assert greedy(model, True, prompts, 12) == greedy(model, False, prompts, 12)
    assert len(traced) == 1
    torch.compiler.reset()


@torch.inference_mode()
def test_static_cache_falls_back_after_dropping_rows() -> None:
    model = model_of(KINDS[0])
    model.compile_decoding(backend=lambda *_: pytest.fail("compiled"))
    cache = KVCache(model.config, 3, CONTEXT, "cpu", torch.float32, static=True)
    tokens = torch.randint(50, (3, 6), generator=torch.Generator().manual_seed(1))
    model.next_logits(tokens[:, :5], cache)
    cache.select_rows([2, 0])
    torch.testing.assert_close(
        model.next_logits(tokens[[2, 0], 5:], cache), model(tokens[[2, 0]])[:, -1], rtol=0, atol=1e-5
    )


@pytest.fixture
def compiled_from_one(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Generation compiles its steps however short the text; what was traced."""
    torch.compiler.reset()
    traced: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        traced.append(graph)
        return graph

    real = Transformer.compile_decoding
    monkeypatch.setattr(Transformer, "compile_decoding", lambda model, mode: real(model, backend=backend))
    monkeypatch.setattr(generation, "COMPILE_MIN_TOKENS", 1)
    monkeypatch.setattr(generation, "has_triton", lambda device: True)
    return traced


def generated(model: Transformer, n_rows: int, count: int) -> list[list[int]]:
    rows = [Sequence([1 + row % 9] * (1 + row % 3), seed=row) for row in range(n_rows)]
    list(generate_batch(model, rows, count, SamplingParams(1.0, 20)))
    return [row.generated for row in rows]


def test_recompile_limit_falls_back_to_eager(
    compiled_from_one: list[torch.fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch compiles a function eight times, and no more. Sizes are filled up to powers of two, windows that slide
    included; where these are too many all the same, steps go on uncompiled."""
    model = model_of(KINDS[0] | {"max_seq_len": CONTEXT})
    counts = dict.fromkeys(range(1, 10), 4) | {3: CONTEXT + 9}
    found = {size: generated(model, size, count) for size, count in counts.items()}
    assert len(compiled_from_one) == 5
    with torch._dynamo.config.patch(recompile_limit=5):
        found[17] = generated(model, 17, 4)
        assert len(compiled_from_one) == 5
        assert generated(model, 3, counts[3]) == found[3]
    monkeypatch.setattr(generation, "has_triton", lambda device: False)
    for size, rows in found.items():
        assert generated(model, size, counts.get(size, 4)) == rows
    torch.compiler.reset()


def test_other_threads_do_not_compile(compiled_from_one: list[torch.fx.GraphModule]) -> None:
    """A CUDA graph belongs to the thread that recorded it, and the server has one thread for each request."""
    model = model_of(KINDS[0] | {"max_seq_len": CONTEXT})
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(generated, model, 2, 4).result()
        assert not compiled_from_one
        assert generated(model, 2, 4) == found
        assert len(compiled_from_one) == 1
        assert thread.submit(generated, model, 3, 4).result() == generated(model, 3, 4)
        assert len(compiled_from_one) == 2
    torch.compiler.reset()


@pytest.mark.slow
@needs_compiler
def test_compiled_step_does_not_copy_cache() -> None:
    """Of one tensor for all layers, each layer's keys and values would be written as a copy of the whole cache."""
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    model = model_of({"max_seq_len": 48, "n_layers": 3})
    with torch.inference_mode():
        cache = KVCache(model.config, 2, 48, "cpu", torch.float32, static=True)
        model.next_logits(torch.ones(2, 3, dtype=torch.long), cache)
        model.compile_decoding()
        _, code = run_and_get_code(model.next_logits, torch.ones(2, 1, dtype=torch.long), cache)
    allocations = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", "\n".join(code))
    shapes = [tuple(int(size) for size in shape.split(",") if size.strip()) for shape in allocations]
    assert shapes
    assert not [shape for shape in shapes if torch.Size(shape).numel() >= cache.keys[0].numel()]
    torch.compiler.reset()
