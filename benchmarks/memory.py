"""The memory that is predicted (src/myllm/planning/memory_estimate.py) beside what a training step really takes.

Each row is measured in a process of its own, over two real steps on made-up tokens: on a card as torch's allocator
counts it, on a CPU as the process's resident memory. One command fills in a table:

    python benchmarks/memory.py                    # on a CPU: models that are a few hundred MB
    python benchmarks/memory.py --device cuda      # the presets, at micro-batches that are said to fit the card
"""

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from myllm import paths
from myllm.config import RunConfig, from_dict, to_dict
from myllm.planning.memory_estimate import ComputeMode, memory_by_part, predicted_bytes
from myllm.presets import PRESETS, get_preset


def cases(device: str) -> list[tuple[str, RunConfig]]:
    """Names and configs."""
    found = []
    for name in PRESETS:
        config = get_preset(name)
        if device == "cpu":
            model = replace(config.model, max_seq_len=256, n_layers=min(config.model.n_layers, 6))
            if model.d_model > 512:
                model = replace(model, d_model=512, n_heads=8, d_ff=512 * model.d_ff // model.d_model // 8 * 8)
            config = replace(config, model=model)
        for size, recompute in ((1, False), (4, False), (4, True)):
            train = replace(
                config.train, device=device, micro_batch_size=size, activation_checkpointing=recompute,
                batch_tokens=2 * size * config.model.max_seq_len,
            )  # fmt: skip
            words = ", recomputed" if recompute else ""
            found.append((f"{name} x {size}{words}", replace(config, train=train)))
    return found


def measure(config: RunConfig) -> None:
    """In a process of its own: two steps, then the peak in bytes on the last line."""
    import torch

    from myllm.distributed.collectives import DistContext
    from myllm.distributed.parallelize import zero_grad
    from myllm.distributed.precision import autocast
    from myllm.model.transformer import Transformer
    from myllm.optim.optimizer import ScheduledOptimizer
    from myllm.training.kernels import fast_kernels
    from myllm.training.preflight.device_memory import peak_bytes

    device = torch.device(config.train.device)
    process = DistContext(0, 0, 1, device)
    model = Transformer(config.model).to(device)
    optimizer = ScheduledOptimizer(model.named_parameters(), model.hidden_matrices(), config.optim, 10)
    shape = config.train.micro_batch_size, config.model.max_seq_len
    with fast_kernels(model, config, process) as runner:
        for step in range(2):
            for _ in range(2):
                tokens, targets = torch.randint(config.model.vocab_size, (2, *shape), device=device).unbind()
                runner.train()
                with autocast(config, device):
                    loss = runner(tokens, targets)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(optimizer.parameters.values(), 1.0)
            optimizer.step(step)
            zero_grad(runner)
    print(peak_bytes(device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--out", type=Path, help="the file for the table (temp_data/benchmarks/DATE-DEVICE-memory.md)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(from_dict(json.loads(args.one), RunConfig()))
        return
    lines = [
        f"# Memory of a training step, predicted and measured: {date.today()}, {_device_name(args.device)}\n",
        f"`python benchmarks/memory.py --device {args.device}`, torch {_torch_version()}, "
        f"Python {platform.python_version()}. MiB; runtime is what there is besides tensors, as predicted.\n",
        "| run | predicted | measured | off by | of it activations | loss or backward pass | states | runtime |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for name, config in cases(args.device):
        if args.only not in name:
            continue
        lines.append(row(name, config))
        print(lines[-1], flush=True)
    if not args.only:
        file = args.out or paths.temp_data() / "benchmarks" / f"{date.today()}-{args.device}-memory.md"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"\nwritten to {file}")


def row(name: str, config: RunConfig) -> str:
    """One line of the table."""
    how = ComputeMode.of(config, config.train.device)
    words = [sys.executable, __file__, "--one", json.dumps(to_dict(config))]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        return f"| {name} | {_mib(predicted_bytes(config, how))} | failed: {done.stderr.splitlines()[-1:]} | | | | | |"
    measured, parts = int(done.stdout.split()[-1]), memory_by_part(config, how)
    predicted = sum(parts.values())
    states = parts["weights"] + parts["optimizer state"] + parts["gradients"]
    shown = [
        parts.get("activations", 0),
        parts.get("loss", 0) + parts.get("backward pass", 0),
        states,
        parts["runtime"],
    ]
    return (
        f"| {name} | {_mib(predicted)} | {_mib(measured)} | {predicted / measured - 1:+.1%} | "
        + " | ".join(map(_mib, shown))
        + " |"
    )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f}"


def _torch_version() -> str:
    import torch

    return torch.__version__


def _device_name(device: str) -> str:
    import torch

    from myllm.distributed.device_info import device_name

    return device_name(torch.device(device))


if __name__ == "__main__":
    main()
