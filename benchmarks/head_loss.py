"""The head's loss on a CPU: chunks with the gradient made in the forward pass, against full logits.

    python benchmarks/head_loss.py [--tokens 1024] [--repeats 8]

Checks first that both give the same loss and gradients, then times forward and backward of the whole debug model both
ways, in turn, and prints a Markdown table.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from myllm.distributed.device_info import device_name
from myllm.model.transformer import Transformer
from myllm.presets import get_preset


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--tokens", type=int, default=1_024)
    arguments.add_argument("--repeats", type=int, default=8)
    options = arguments.parse_args()
    config = get_preset("debug").model
    model = Transformer(config)
    shape = (options.tokens // config.max_seq_len, config.max_seq_len)
    tokens, targets = torch.randint(config.vocab_size, (2, *shape)).unbind()

    def full_logits() -> Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

    ways = {"full logits, F.cross_entropy": full_logits, "chunks (cross_entropy.py)": lambda: model(tokens, targets)}
    check_equal(model, *ways.values())
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(options.repeats + 1):  # interleaved; the first round warms up
        for name, way in ways.items():
            elapsed = measure(model, way)
            if repeat:
                seconds[name].append(elapsed)
    machine = f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{machine}, {versions}; debug model, {shape[0]} x {shape[1]} tokens, forward and backward\n")
    print("| way | median s | least s | greatest s |\n|---|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {statistics.median(times):.3f} | {min(times):.3f} | {max(times):.3f} |")


def check_equal(model: Transformer, first: Callable[[], Tensor], second: Callable[[], Tensor]) -> None:
    results = []
    for way in (first, second):
        model.zero_grad()
        loss = way()
        loss.backward()
        results.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        difference = (gradient - results[1][1][name]).norm() / gradient.norm()
        assert difference < 1e-5, f"{name} differs by {difference:.1e}"


def measure(model: Transformer, way: Callable[[], Tensor]) -> float:
    model.zero_grad()
    started = time.perf_counter()
    way().backward()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
