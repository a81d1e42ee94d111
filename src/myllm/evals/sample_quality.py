"""Statistics of samples from fixed prompts with fixed seeds.

    distinct_1, distinct_2   different tokens (pairs of consecutive tokens) divided by all tokens (pairs), over all
                             samples together: higher is more varied. They fall with the amount of text, so compare them
                             only at the same number and length of samples.
                             Source: Li et al. 2016 (arXiv 1510.03055), section 5.
    repetition               fraction of a sample's 4-grams that occurred in it before; mean over samples. 0: no 4-gram
                             repeats; near 1: a loop. Source: Welleck et al. 2020 (arXiv 1908.04319), section 6,
                             seq-rep-4.
    ended                    fraction of samples that end with end-of-text before the maximum length.
    mean_log_prob            of the drawn tokens including end-of-text, in nats, in the model's own distribution: at
                             temperature 1, before all filters. Near minus the validation loss: like real text. Far
                             above: safe text, often loops. Below: unlikely tokens.

Compare them with `held_out_samples`: passages of held-out documents of the same number and length. Far lower distinct
values mean dull text, far higher repetition means loops.
"""

import math
from collections.abc import Iterable, Iterator
from importlib.resources import files
from itertools import islice, pairwise

import numpy as np

from myllm.data.token_stream import TokenStream
from myllm.inference.generate import LanguageModel, Sequence, generate_batch
from myllm.inference.sampling_params import SamplingParams

SAMPLING = SamplingParams(temperature=0.8, top_k=50)
"""The defaults of `myllm sample`; sample n of each prompt has the seed n."""
SAMPLES_PER_PROMPT = 2
NEW_TOKENS = 64
NGRAM = 4
READ_TOKENS = 2_000_000
"""Held-out documents come from this many tokens at the start of the stream."""
Sample = tuple[Sequence, list[float]]
"""A finished sequence and the log-probabilities of its tokens, with that of end-of-text if it was drawn."""


def prompts() -> list[str]:
    return files(__package__).joinpath("prompts.txt").read_text(encoding="utf-8").splitlines()


def sample_prompts(
    model: LanguageModel, texts: Iterable[str], samples_per_prompt: int, new_tokens: int, batch_size: int
) -> Iterator[Sample]:
    """Samples of each prompt, prompt by prompt."""
    sequences = [
        Sequence(model.tokenizer.encode_document(text).tolist(), SAMPLING.seed + number)
        for text in texts
        for number in range(samples_per_prompt)
    ]
    for first in range(0, len(sequences), batch_size):
        batch = sequences[first : first + batch_size]
        log_probs: dict[int, list[float]] = {id(sequence): [] for sequence in batch}
        end = model.tokenizer.end_of_text
        for sequence in generate_batch(model.model, batch, new_tokens, SAMPLING, end, top_logprobs=1):
            log_probs[id(sequence)].append(_log_prob(sequence))
        for sequence in batch:
            if sequence.finish_reason == "end_of_text":
                log_probs[id(sequence)].append(_log_prob(sequence))
            yield sequence, log_probs[id(sequence)]


def _log_prob(sequence: Sequence) -> float:
    """Of the token drawn last."""
    assert sequence.logprobs is not None, "generate_batch computes them only if asked to"
    return sequence.logprobs.logprob


def sample_metrics(samples: Iterable[Sample]) -> dict[str, float]:
    sequences, log_probs = zip(*samples, strict=True)
    drawn = [value for values in log_probs for value in values]
    return {
        **variety([sequence.generated for sequence in sequences]),
        "ended": sum(sequence.finish_reason == "end_of_text" for sequence in sequences) / len(sequences),
        "mean_log_prob": math.fsum(drawn) / len(drawn),
        "n_samples": len(sequences),
        "n_tokens": sum(len(sequence.generated) for sequence in sequences),
    }


def variety(samples: list[list[int]]) -> dict[str, float]:
    """Distinct tokens and pairs, and repetition, of token ids. Pairs do not cross samples."""
    repeated = [repetition(sample) for sample in samples if len(sample) >= NGRAM]
    return {
        "distinct_1": _distinct([token for sample in samples for token in sample]),
        "distinct_2": _distinct([pair for sample in samples for pair in pairwise(sample)]),
        "repetition": math.fsum(repeated) / len(repeated) if repeated else 0.0,
    }


def repetition(sample: list[int]) -> float:
    return 1 - _distinct([tuple(sample[start : start + NGRAM]) for start in range(len(sample) - NGRAM + 1)])


def held_out_samples(stream: TokenStream, end_of_text: int, count: int, length: int) -> list[list[int]]:
    """A passage near the start of each of the first `count` documents that are long enough."""
    tokens = stream.read(0, min(stream.tokens, READ_TOKENS))
    bounds = np.append(np.flatnonzero(tokens == end_of_text), len(tokens))
    prompt_tokens = 8  # skipped: about the length of a prompt
    passages = (
        tokens[start + 1 + prompt_tokens :][:length]
        for start, end in pairwise(bounds)
        if end - start - 1 >= prompt_tokens + length
    )
    return [passage.tolist() for passage in islice(passages, count)]


def _distinct(items: list) -> float:
    return len(set(items)) / len(items) if items else 0.0
