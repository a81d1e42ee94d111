"""Speed of HellaSwag's scoring on a CPU: batches with shared contexts against one example at a time.

    python benchmarks/hellaswag.py FILE [--examples 64] [--repeats 3]

FILE has HellaSwag's rows (.jsonl or .parquet). One example at a time is as in build-nanogpt: four rows of context and
ending, padded to one length, with logits for all tokens. The third method, our scoring with batches of one, shows the
effect of batches alone. Checks first that all methods agree, then times them in turn with the debug model and prints a
Markdown table.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from myllm.data.tokenizer.load import load_tokenizer
from myllm.distributed.collectives import DistContext
from myllm.distributed.device_info import device_name
from myllm.evals.choice import TokenizedQuestion, ending_log_probs, tokenize_questions
from myllm.evals.examples import load_questions
from myllm.model.transformer import Transformer
from myllm.presets import get_preset

CPU = torch.device("cpu")
ALONE = DistContext(0, 0, 1, CPU)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("file", type=Path)
    arguments.add_argument("--examples", type=int, default=64)
    arguments.add_argument("--repeats", type=int, default=3)
    options = arguments.parse_args()
    config, tokenizer = get_preset("debug").model, load_tokenizer()
    model = Transformer(config).eval()
    questions = load_questions("hellaswag", options.file, options.examples)
    tokenized = tokenize_questions(questions, tokenizer.encode, tokenizer.end_of_text, config.max_seq_len)
    methods = {
        "one example at a time, all logits": lambda: one_at_a_time(model, tokenized),
        "one example at a time, our scoring": lambda: batched(model, tokenized, 1),
        "batches of 16, our scoring": lambda: batched(model, tokenized, 16),
    }
    check_equal(*(method() for method in methods.values()))
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(options.repeats):  # interleaved; the check was the warm-up
        for name, method in methods.items():
            seconds[name].append(measure(method))
    slowest = statistics.median(next(iter(seconds.values())))
    machine = f"{device_name(CPU)}, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, Python {platform.python_version()}; debug model")
    print(f"{len(tokenized)} examples of {options.file.name}\n")
    print("| method | median s | min s | max s | speedup |\n|---|---|---|---|---|")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"| {name} | {median:.2f} | {min(times):.2f} | {max(times):.2f} | {slowest / median:.1f} |")


@torch.no_grad()
def one_at_a_time(model: Transformer, tokenized: list[TokenizedQuestion]) -> Tensor:
    """The summed log-probability of each ending, (examples, 4)."""
    totals = []
    for example in tokenized:
        contexts = example.contexts * (len(example.endings) // len(example.contexts))
        rows = [[*context, *ending] for context, ending in zip(contexts, example.endings, strict=True)]
        width = max(map(len, rows))
        tokens, is_ending = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
        for n, (row, context) in enumerate(zip(rows, contexts, strict=True)):
            tokens[n, : len(row)] = torch.tensor([int(token) for token in row])
            is_ending[n, len(context) : len(row)] = 1
        logits = model(tokens[:, :-1])  # (4, T, V)
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(rows), -1)
        totals.append(-(losses * is_ending[:, 1:]).sum(dim=1))
    return torch.stack(totals)


def batched(model: Transformer, tokenized: list[TokenizedQuestion], batch: int) -> Tensor:
    totals = torch.zeros(len(tokenized), 4)
    for number, sums in ending_log_probs(model.score_continuations, tokenized, ALONE, batch):
        totals[number] = sums.float()
    return totals


def check_equal(first: Tensor, *others: Tensor) -> None:
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-3)


def measure(method: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    method()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
