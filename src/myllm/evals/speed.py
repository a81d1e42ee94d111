"""Speed of generation and its memory, with the engine that all commands use.

    first_token_s        seconds from a single prompt to its first token
    prefill              prompt tokens per second, until every prompt has its first token
    decode               new tokens per second after that, over all prompts of the batch

Medians of a few greedy rounds with random prompts, after one warm-up round. Times are taken when tokens are on the CPU.
"""

import resource
import statistics
import sys
import time

import torch

from myllm.inference.generate import Sequence, generate_batch
from myllm.inference.int8 import weight_bytes
from myllm.inference.sampling_params import SamplingParams
from myllm.model.transformer import Transformer

BATCH_SIZES = (1, 16)
PROMPT_TOKENS = 128
NEW_TOKENS = 64
REPEATS = 3
MB = 1e6


def token_counts(context: int) -> tuple[int, int]:
    """Tokens of a prompt and new tokens, reduced for a short context."""
    prompt = max(min(PROMPT_TOKENS, context // 2), 1)
    return prompt, max(min(NEW_TOKENS, context - prompt), 2)


def measure(model: Transformer, batches: tuple[int, ...] = BATCH_SIZES, repeats: int = REPEATS) -> dict[str, float]:
    """
    Returns:
        `prefill_tokens_per_s_N` and `decode_tokens_per_s_N` for each batch size N; `first_token_s`, if 1 is among them;
        `weights_mb`; `peak_memory_mb`, on CUDA of tensors during the measurement, elsewhere of the process so far.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    prompt, new = token_counts(model.config.max_seq_len)
    metrics: dict[str, float] = {}
    for batch in batches:
        first, total = _seconds(model, batch, prompt, new, repeats)
        if batch == 1:
            metrics["first_token_s"] = first
        metrics[f"prefill_tokens_per_s_{batch}"] = batch * prompt / first
        metrics[f"decode_tokens_per_s_{batch}"] = batch * (new - 1) / max(total - first, 1e-9)
    return metrics | {"weights_mb": weight_bytes(model) / MB, "peak_memory_mb": _peak_bytes(device) / MB}


def _seconds(model: Transformer, batch: int, prompt: int, new: int, repeats: int) -> tuple[float, float]:
    """Median time until every sequence has its first token, and until every sequence is complete."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (batch, prompt), generator=generator).tolist()
    times = []
    for _ in range(repeats + 1):
        sequences = [Sequence(tokens, seed=0) for tokens in prompts]
        started, first = time.perf_counter(), 0.0
        for count, _ in enumerate(generate_batch(model, sequences, new, SamplingParams(temperature=0)), 1):
            if count == batch:
                first = time.perf_counter() - started
        times.append((first, time.perf_counter() - started))
    firsts, totals = zip(*times[1:], strict=True)  # without the warm-up
    return statistics.median(firsts), statistics.median(totals)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux
