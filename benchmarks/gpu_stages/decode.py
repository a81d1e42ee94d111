"""Generation: eager and compiled give the same text, for every batch size, and at what rate."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from myllm.distributed.precision import autocast
from myllm.inference import generate as generation
from myllm.inference.generate import Sequence, generate_batch
from myllm.inference.sampling_params import SamplingParams
from myllm.model.transformer import Transformer

from .bench import Bench, fresh, synchronize
from .frame import Check, correct, noted, skipped

BATCHES = (1, 16)
PROMPT, NEW = 64, 128
ODD_BATCHES = tuple(range(1, 12))
"""More distinct sizes than torch compiles one function for."""
ODD_LAYERS, ODD_NEW = 2, 8
COMPILED_S = 45


def run(bench: Bench) -> Iterator[Check]:
    yield from rates(bench, compiled=False)
    if not bench.has_time(COMPILED_S):
        yield skipped("compiled", f"needs {COMPILED_S} s")
        return
    yield from rates(bench, compiled=True)
    yield texts(bench)


def rates(bench: Bench, compiled: bool) -> Iterator[Check]:
    """Tokens a second of the whole model, in the run's precision."""
    fresh(bench.device)
    model, (prompt, new) = build_model(bench, None), (8, 8) if bench.tiny else (PROMPT, NEW)
    way = "compiled" if compiled else "eager"
    with autocast(bench.config(), bench.device):
        for batch in BATCHES:
            decode(bench, model, batch, prompt, 4, compiled)  # compiles, and warms up
            _, rate = decode(bench, model, batch, prompt, new, compiled)
            yield noted(f"{way}, batch {batch}", f"{rate:,.0f} tokens/s", tokens_per_s=rate)


def texts(bench: Bench) -> Check:
    """The same greedy text from both, in float32, where rounding hardly ever makes another token the likeliest."""
    fresh(bench.device)
    model, odd = build_model(bench, ODD_LAYERS), []
    for batch in ODD_BATCHES:
        eager, compiled = (decode(bench, model, batch, 8, ODD_NEW, way)[0] for way in (False, True))
        if eager != compiled:
            odd.append(batch)
    measured = f"other texts with batches of {odd}" if odd else "the same texts"
    return correct(f"compiled against eager, {len(ODD_BATCHES)} batch sizes", not odd, measured, "the same texts")


def build_model(bench: Bench, layers: int | None) -> Transformer:
    """With roughened weights: fresh ones find nearly all tokens as likely."""
    torch.manual_seed(0)
    model = Transformer(bench.model(layers=layers), 0).to(bench.device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def decode(
    bench: Bench, model: Transformer, batch: int, prompt: int, new: int, compiled: bool
) -> tuple[list[list[int]], float]:
    """Greedy texts, and tokens a second behind the prompt's."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (batch, prompt), generator=generator).tolist()
    rows = [Sequence(tokens, seed) for seed, tokens in enumerate(prompts)]
    with compiled_from(0 if compiled else 10**9):
        steps = generate_batch(model, rows, new, SamplingParams(temperature=0))
        for _ in range(batch):  # the first token of each row
            next(steps)
        synchronize(bench.device)
        started = time.perf_counter()
        for _ in steps:
            pass
        synchronize(bench.device)
    return [row.generated for row in rows], batch * (new - 1) / (time.perf_counter() - started)


@contextmanager
def compiled_from(tokens: int) -> Iterator[None]:
    """CUDA compiles texts of at least this many tokens."""
    before = generation.COMPILE_MIN_TOKENS
    try:
        generation.COMPILE_MIN_TOKENS = tokens
        yield
    finally:
        generation.COMPILE_MIN_TOKENS = before
