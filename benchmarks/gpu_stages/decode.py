"""Generation: eager and compiled give the same text, for every batch size, and at what rate."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from myllm import generation
from myllm.generation import Continuation, continue_batch
from myllm.model import Transformer
from myllm.sampling import Sampling

from .bench import Bench, fresh, synchronize
from .frame import Check, correct, noted, skipped

BATCHES = (1, 4, 16)
PROMPT, NEW = 64, 128
ODD_BATCHES = tuple(range(1, 12))
"""More distinct sizes than torch compiles one function for."""
ODD_NEW, ODD_LAYERS = 8, 2
COMPILED_S = 40


def run(bench: Bench) -> Iterator[Check]:
    model = made(bench, None)
    prompt, new = (8, 8) if bench.tiny else (PROMPT, NEW)
    eager = {}
    for batch in BATCHES:
        eager[batch], rate = decode(bench, model, batch, prompt, new, compiled=False)
        yield noted(f"eager, batch {batch}", f"{rate:,.0f} tokens/s", tokens_per_s=rate)
    if not bench.has_time(COMPILED_S):
        yield skipped("compiled", f"needs {COMPILED_S} s")
        return
    for batch in BATCHES:
        decode(bench, model, batch, prompt, 4, compiled=True)  # compiles
        texts, rate = decode(bench, model, batch, prompt, new, compiled=True)
        yield noted(f"compiled, batch {batch}", f"{rate:,.0f} tokens/s", tokens_per_s=rate)
        same = sum(a == b for a, b in zip(texts, eager[batch], strict=True))
        # In rounding alone they differ, and where two tokens are as likely a text takes another way from there on.
        first = sum(a[:4] == b[:4] for a, b in zip(texts, eager[batch], strict=True))
        right = first == batch
        yield correct(f"the same text, batch {batch}", right, f"{same} of {batch} to the end", "all begin alike")
    del model
    fresh(bench.device)
    small = made(bench, ODD_LAYERS)
    for batch in ODD_BATCHES:
        texts, _ = decode(bench, small, batch, 8, ODD_NEW, compiled=True)
    whole = all(len(text) == ODD_NEW for text in texts)
    yield correct(f"{len(ODD_BATCHES)} batch sizes", whole, "written" if whole else "cut short", "written")


def made(bench: Bench, layers: int | None) -> Transformer:
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
    rows = [Continuation(tokens, seed) for seed, tokens in enumerate(prompts)]
    with compiled_from(0 if compiled else 10**9):
        steps = continue_batch(model, rows, new, Sampling(temperature=0))
        for _ in range(batch):  # the first token of each row
            next(steps)
        synchronize(bench.device)
        started = time.perf_counter()
        for _ in steps:
            pass
        synchronize(bench.device)
    return [row.written for row in rows], batch * (new - 1) / (time.perf_counter() - started)


@contextmanager
def compiled_from(tokens: int) -> Iterator[None]:
    """CUDA compiles texts of so many tokens or more."""
    before = generation.COMPILED_FROM
    try:
        generation.COMPILED_FROM = tokens
        yield
    finally:
        generation.COMPILED_FROM = before
