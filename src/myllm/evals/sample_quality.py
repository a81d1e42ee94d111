"""How a model writes: figures of samples of fixed prompts, with fixed seeds.

    distinct_1, distinct_2   different words (pairs of words) in a row over all of them, in all samples together: the
                             more, the less they say the same. Falls with the amount of text, so it is compared at the
                             same number of samples and tokens. Words are tokens here, and pairs never cross samples.
                             Source: Li et al. 2016 (arXiv 1510.03055), section 5.
    repetition               of each sample, the share of its runs of four tokens that it had written before; the mean
                             over samples. 0: never the same four in a row; near 1: a loop.
                             Source: Welleck et al. 2020 (arXiv 1908.04319), section 6, as seq-rep-4.
    ended                    the share of samples that end in end-of-text before they are as long as they may be.
    mean_log_prob            of the drawn tokens, end-of-text included, in nats, in the model's own distribution: at
                             temperature 1, before every filter. Near minus the validation loss: as surprising as real
                             text. Far above: it plays safe, often in loops. Below: it draws what it thinks unlikely.

Good values are those of people's text: `held_out` gives the figures of as many pieces of held-out documents, as long as
the samples are. Distinct words well below them are dull, repetition well above them is a loop.
"""

import math
from collections.abc import Iterable, Iterator
from importlib.resources import files
from itertools import islice, pairwise

import numpy as np

from myllm.data.dataset import TokenStream
from myllm.inference.generate import Sequence, generate_batch
from myllm.inference.load import LanguageModel
from myllm.inference.sampling_params import SamplingParams

SAMPLING = SamplingParams(temperature=0.8, top_k=50)
"""As `myllm sample` draws if it is not told otherwise; of prompt p, sample n has the seed n."""
SAMPLES_PER_PROMPT = 2
"""Of each prompt."""
NEW_TOKENS = 64
NGRAM = 4
READ_TOKENS = 2_000_000
"""How much of the held-out stream documents are taken from."""


def prompts() -> list[str]:
    """The fixed ones."""
    return files(__package__).joinpath("prompts.txt").read_text(encoding="utf-8").splitlines()


def sample_prompts(
    model: LanguageModel, texts: list[str], samples: int, new_tokens: int, batch_size: int
) -> Iterator[tuple[Sequence, list[float]]]:
    """Samples of each prompt, with the log-probabilities of what was drawn: of the end of text too, where it was."""
    rows = [
        Sequence(model.tokenizer.encode_document(text).tolist(), SAMPLING.seed + number)
        for text in texts
        for number in range(samples)
    ]
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        drawn: dict[int, list[float]] = {id(row): [] for row in batch}
        end = model.tokenizer.end_of_text
        for row in generate_batch(model.model, batch, new_tokens, SAMPLING, end, top_logprobs=1):
            drawn[id(row)].append(row.logprobs.logprob)
        for row in batch:
            if row.finish_reason == "end_of_text":
                drawn[id(row)].append(row.logprobs.logprob)
            yield row, drawn[id(row)]


def sample_metrics(made: Iterable[tuple[Sequence, list[float]]]) -> dict[str, float]:
    """Of samples and their log-probabilities."""
    rows, scores = zip(*made, strict=True)
    drawn = [value for values in scores for value in values]
    return {
        **variety([row.generated for row in rows]),
        "ended": sum(row.finish_reason == "end_of_text" for row in rows) / len(rows),
        "mean_log_prob": math.fsum(drawn) / len(drawn),
        "n_samples": len(rows),
        "n_tokens": sum(len(row.generated) for row in rows),
    }


def variety(samples: list[list[int]]) -> dict[str, float]:
    """Distinct words and pairs, and repetition, of token ids."""
    repeated = [repetition(sample) for sample in samples if len(sample) >= NGRAM]
    return {
        "distinct_1": _distinct([token for sample in samples for token in sample]),
        "distinct_2": _distinct([pair for sample in samples for pair in pairwise(sample)]),
        "repetition": math.fsum(repeated) / len(repeated) if repeated else 0.0,
    }


def repetition(sample: list[int]) -> float:
    """The share of runs of four that came before."""
    return 1 - _distinct([tuple(sample[at : at + NGRAM]) for at in range(len(sample) - NGRAM + 1)])


def held_out_samples(stream: TokenStream, end_of_text: int, count: int, length: int) -> list[list[int]]:
    """The beginnings, behind a prompt's length, of the stream's first `count` documents that are long enough."""
    tokens = stream.read(0, min(stream.tokens, READ_TOKENS))
    bounds = np.append(np.flatnonzero(tokens == end_of_text), len(tokens))
    skipped = 8  # tokens, as a prompt has about
    long = (tokens[a + 1 + skipped :][:length] for a, b in pairwise(bounds) if b - a - 1 >= skipped + length)
    return [piece.tolist() for piece in islice(long, count)]


def _distinct(parts: list[object]) -> float:
    return len(set(parts)) / len(parts) if parts else 0.0
