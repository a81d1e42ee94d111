"""What Muon costs: its share of a training step's FLOPs and time, beside fused AdamW and torch.optim.Muon.

    python benchmarks/muon.py [PRESET] [--device cpu] [--tokens 2048] [--repeats 5] [--d-model N --n-layers N ...]

Times one update of each optimizer, in turn, and a forward and backward pass of `--tokens` tokens, and prints a Markdown
table. The share is that of a step of `train.batch_tokens` tokens, on one rank.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from myllm.config import OptimConfig
from myllm.distributed.collectives import choose_device
from myllm.distributed.device_info import device_name
from myllm.distributed.precision import autocast
from myllm.model.transformer import Transformer
from myllm.optim.muon import ITERATIONS, iteration_dtype
from myllm.optim.optimizer import ScheduledOptimizer
from myllm.planning.flops import flops_per_token
from myllm.presets import get_preset


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("preset", nargs="?", default="debug")
    arguments.add_argument("--device", default="auto")
    arguments.add_argument("--tokens", type=int, default=2_048)
    arguments.add_argument("--repeats", type=int, default=5)
    for name in ("d-model", "n-layers", "n-heads", "d-ff", "max-seq-len", "vocab-size"):
        arguments.add_argument(f"--{name}", type=int)
    options = vars(arguments.parse_args())
    config, device = get_preset(options.pop("preset")), choose_device(options.pop("device"))
    tokens, repeats = options.pop("tokens"), options.pop("repeats")
    config = replace(config, model=replace(config.model, **{key: n for key, n in options.items() if n}))
    flops, batch = muon_flops(Transformer(config.model)), config.train.batch_tokens
    step_flops = batch * flops_per_token(config.model)
    print(f"Muon on one rank: {flops / 1e12:.3g} TFLOP, {flops / step_flops:.2%} of a step of {batch:,} tokens\n")
    model = Transformer(config.model).to(device)
    shape = (-(-tokens // config.model.max_seq_len), config.model.max_seq_len)
    data = torch.randint(config.model.vocab_size, shape, device=device)

    def forward_backward() -> None:
        with autocast(config, device):
            loss = model(data, data)
        loss.backward()

    forward_backward()
    seconds = measure({"forward and backward": forward_backward, **updates(model)}, repeats, device)
    part = batch / data.numel() * seconds["forward and backward"]
    dtype = str(iteration_dtype(device)).removeprefix("torch.")
    print(f"{device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads, {dtype} iteration\n")
    print(f"| | ms | % of a step of {batch:,} tokens |\n|---|---|---|")
    for name, time_s in seconds.items():
        share = part / (part + seconds["AdamW"]) if name == "forward and backward" else time_s / (part + time_s)
        print(f"| {name} | {1e3 * time_s:,.1f} | {share:.1%} |")


def muon_flops(model: Transformer) -> float:
    """Of all iterations of one update: S x S from S x L, its square, and the product with S x L."""
    columns = {name: parameter.shape[1] for name, parameter in model.named_parameters() if parameter.ndim == 2}
    sides = (sorted((rows, columns[name])) for name, row_sizes in model.hidden_matrices().items() for rows in row_sizes)
    return sum(ITERATIONS * (4 * small**2 * large + 2 * small**3) for small, large in sides)


def updates(model: Transformer) -> dict[str, Callable[[], object]]:
    """One update of the whole model by each optimizer; torch's Muon takes fused matrices whole."""
    hidden = [model.get_parameter(name) for name in model.hidden_matrices()]
    theirs = torch.optim.Muon(hidden, lr=0.0)
    rest = [parameter for parameter in model.parameters() if not any(parameter is matrix for matrix in hidden)]
    beside = torch.optim.AdamW(rest, lr=0.0, fused=True)
    skip = torch.zeros((), device=next(model.parameters()).device)

    def ours(name: str) -> Callable[[], object]:
        optim = OptimConfig(optimizer=name, weight_decay=0.0, muon_lr=1e-9, max_lr=1e-9)
        optimizer = ScheduledOptimizer(model.named_parameters(), model.hidden_matrices(), optim, 1_000)
        return lambda: optimizer.step(0, skip)

    return {
        "AdamW": ours("adamw"),
        "Muon and AdamW": ours("muon"),
        "torch.optim.Muon and AdamW": lambda: (theirs.step(), beside.step()),
    }


def measure(ways: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, interleaved; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            synchronize(device)
            start = time.perf_counter()
            way()
            synchronize(device)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
