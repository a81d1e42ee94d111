"""Beside others: the reference's nanoGPT-like loop, and transformers' Llama, all compiled, in turns."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

from .bench import NO_DROPOUT, Bench, fresh
from .frame import Check, bounded, correct, noted

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # throughput.py's modules lie beside gpu_check.py

from throughput_turns import compare, describe

LAYERS = 6
"""Three models and their compilers at once: the ratios hold for a part of the depth."""
MOST_SEQUENCES = 16
"""A micro-batch: others keep all logits, 0.4 GB a sequence in float32, and more than once."""
TURNS, STEPS = 3, 3
LEAST_RATIO = 1.0
"""Nobody should be faster."""


def run(bench: Bench) -> Iterator[Check]:
    size = min(bench.config(LAYERS).train.micro_batch_size, MOST_SEQUENCES)
    config = bench.config(LAYERS, micro_batch=size)
    config = replace(config, model=replace(config.model, **NO_DROPOUT))  # which transformers' Llama has no place for
    turns, steps = (1, 1) if bench.tiny else (TURNS, STEPS)
    fresh(bench.device)
    result = compare(config, bench.process, turns, steps, True, lambda line: None)
    fresh(bench.device)
    yield correct("same loss and gradient norm", True, describe(result.agreement), "refused if they differ")
    if result.absent:
        yield noted("transformers", f"takes no part: {result.absent}")
    mine = median(turn.tokens_per_s for turn in result.turns["myllm"])
    yield noted("myllm", f"{mine:,.0f} tokens/s", tokens_per_s=mine)
    for name, taken in result.turns.items():
        if name != "myllm":
            pairs = zip(result.turns["myllm"], taken, strict=True)
            ratio = median(ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs)
            limit = LEAST_RATIO if bench.on_cuda else None
            yield bounded(f"myllm to {name}", ratio, limit, None, "times as fast", 2)
