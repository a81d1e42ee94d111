"""How fast a model reads and writes, and what it takes in memory: through the engine that everything else uses.

    first_token_s        from a prompt to the first token of it, one prompt alone
    prefill              prompt tokens a second, until each prompt has its first token
    decode               new tokens a second after that, over all prompts of the batch

Medians of a few rounds, greedy, with random prompts, after one that does not count. The clock starts and stops when
tokens are on the host.
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

BATCHES = (1, 16)
PROMPT_TOKENS = 128
NEW_TOKENS = 64
REPEATS = 3
MB = 1e6


def token_counts(context: int) -> tuple[int, int]:
    """Tokens of a prompt, and new ones: as above, less where the context is short."""
    prompt = max(min(PROMPT_TOKENS, context // 2), 1)
    return prompt, max(min(NEW_TOKENS, context - prompt), 2)


def measure(model: Transformer, batches: tuple[int, ...] = BATCHES, repeats: int = REPEATS) -> dict[str, float]:
    """
    Returns:
        `prefill_tokens_per_s_1`, `decode_tokens_per_s_1` and so on for each batch; `first_token_s`, if a batch of 1 is
        among them; `weights_mb`, and `peak_memory_mb`: on a GPU what tensors took at most meanwhile, elsewhere what the
        whole process ever held.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    prompt, new = token_counts(model.config.max_seq_len)
    found: dict[str, float] = {}
    for batch in batches:
        first, whole = _seconds(model, batch, prompt, new, repeats)
        if batch == 1:
            found["first_token_s"] = first
        found[f"prefill_tokens_per_s_{batch}"] = batch * prompt / first
        found[f"decode_tokens_per_s_{batch}"] = batch * (new - 1) / max(whole - first, 1e-9)
    return found | {"weights_mb": weight_bytes(model) / MB, "peak_memory_mb": _peak_bytes(device) / MB}


def _seconds(model: Transformer, batch: int, prompt: int, new: int, repeats: int) -> tuple[float, float]:
    """Medians: until every row has its first token, and until every row has all."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (batch, prompt), generator=generator).tolist()
    times = []
    for _ in range(repeats + 1):
        rows = [Sequence(tokens, seed=0) for tokens in prompts]
        started, first = time.perf_counter(), 0.0
        for count, _ in enumerate(generate_batch(model, rows, new, SamplingParams(temperature=0)), 1):
            if count == batch:
                first = time.perf_counter() - started
        times.append((first, time.perf_counter() - started))
    firsts, wholes = zip(*times[1:], strict=True)  # the first one warms up
    return statistics.median(firsts), statistics.median(wholes)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024  # macOS counts bytes, Linux KiB
