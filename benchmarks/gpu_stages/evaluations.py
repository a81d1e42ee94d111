"""HellaSwag as training runs it, twice: equal sums, no new plan for each batch's shape, and which kernels attended."""

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from myllm.config import RunConfig
from myllm.data.tokenizer.load import load_tokenizer
from myllm.distributed.collectives import DistContext
from myllm.distributed.precision import autocast
from myllm.evals.choice import TokenizedQuestion, choice_sums, tokenize_questions
from myllm.evals.tasks import Question
from myllm.model.transformer import Transformer

from .bench import Bench, wall_seconds
from .frame import Check, bounded, correct, noted

EXAMPLES = 1_600
"""A sixth of the validation split: a hundred batches, nearly each of a shape of its own."""
WORDS = (
    "the river ran under old stone bridge while children counted boats and sang of salt wind light harbour evening "
    "bread copper lantern winter market song letter garden narrow window quiet morning voice paper road hill"
)
MOST_FIRST = 3.0
"""The first time may take this many times as long as the second: kernels are loaded and memory is allocated."""
SLOW_KERNELS = ("cudnn",)
"""Parts of names of kernels that are planned anew for each shape."""


def run(bench: Bench) -> Iterator[Check]:
    config = bench.config(compile="off")
    model = Transformer(config.model, config.train.seed).to(bench.device).eval()
    items = made_up_items(config, 8 if bench.tiny else EXAMPLES)
    sums: list[Tensor] = []

    def evaluate(part: list[TokenizedQuestion] = items) -> None:
        with autocast(config, bench.device):
            sums.append(choice_sums(model.score_continuations, part, DistContext(0, 0, 1, bench.device)))

    first, second = (wall_seconds(bench.device, evaluate) for _ in range(2))
    same = torch.equal(sums[0], sums[1])
    yield correct("HellaSwag twice", same, "equal" if same else f"{sums[0].tolist()}, {sums[1].tolist()}", "equal")
    limit = MOST_FIRST if bench.on_cuda else None
    yield bounded("the first time", first / second, None, limit, "times the second", 1, first=first, second=second)
    rate = len(items) / second
    yield noted("speed", f"{rate:,.0f} examples/s, {10_042 / rate:,.1f} s for all of HellaSwag", rate=rate)
    yield kernels(bench, lambda: evaluate(items[:64]))


def made_up_items(config: RunConfig, count: int) -> list[TokenizedQuestion]:
    """Contexts and endings of about HellaSwag's lengths, in the vocabulary that ships with the code."""
    chance, tokenizer = random.Random(0), load_tokenizer(config.data.tokenizer)
    words, longest = WORDS.split(), min(config.model.max_seq_len // 3, 40)

    def text(least: int, most: int) -> str:
        return " ".join(chance.choice(words) for _ in range(chance.randint(least, most)))

    questions = []
    for number in range(count):
        context, endings = text(8, 3 * longest), tuple(text(4, longest // 2) for _ in range(4))
        questions.append(Question((context,), endings, number % 4))
    return tokenize_questions(questions, tokenizer.encode, tokenizer.end_of_text, config.model.max_seq_len, True)


def kernels(bench: Bench, evaluate: object) -> Check:
    """The attention kernels of some batches, by a profile of the device."""
    if not bench.on_cuda:
        return noted("attention kernels", "a CPU has one")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recording:
        evaluate()
    parts = ("flash", "cudnn", "fmha", "attention", "softmax")
    names = {event.key for event in recording.key_averages() if any(part in event.key.lower() for part in parts)}
    names = {name for name in names if not name.startswith("aten::")}
    bad = [name for name in names if any(part in name.lower() for part in SLOW_KERNELS)]
    shown = ", ".join(sorted({name[:60] for name in bad or names})[:3]) or "none seen"
    verdict = "out of bounds" if bad else "passed"
    return Check("attention kernels", verdict, shown, "none that plans each shape", {"names": sorted(names)})
