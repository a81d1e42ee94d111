"""What training waits for data: the loader alone, and real steps.

    python benchmarks/loader.py [PRESET] [--steps 8] [--micro-batch-size 8] [--batch-tokens 4096]

Made-up text in a temporary folder, one process, and on a GPU with the batches copied as in a run. Prints a Markdown
table: how many tokens a second the loader hands out when nobody computes, how many training takes, and how much of each
step training's thread stood waiting for a batch. A copy that comes late would be seen in a step's time and not in that
share, so on a GPU the last row compares steps on batches that lie there already.
"""

import argparse
import platform
import statistics
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from myllm.checkpoint.state import TrainState
from myllm.data.dataloader import BatchLoader
from myllm.data.dataset import Dataset
from myllm.data.sampler import DataPosition
from myllm.data.tokenizer.load import load_tokenizer
from myllm.data.transfer import Batch
from myllm.distributed.collectives import DistContext, process_group
from myllm.distributed.device_info import device_name
from myllm.paths import RunPaths
from myllm.planning.batch import BatchPlan, batch_plan
from myllm.presets import get_preset
from myllm.runs.logs import Stopwatch
from myllm.training.preflight.scratch import random_dataset, scratch_folder
from myllm.training.setup import RunContext, Trainer, build
from myllm.training.step import train_step

ALONE_S = 5.0
TEXT_STEPS = 64
"""Worth of text, so that batches are not the same few all the time."""


def main() -> None:
    options = read_options()
    config = get_preset(options.preset)
    changed = {"batch_tokens": options.batch_tokens, "micro_batch_size": options.micro_batch_size}
    config = replace(config, train=replace(config.train, **{key: value for key, value in changed.items() if value}))
    with process_group("auto") as process, scratch_folder(process) as folder, ExitStack() as stack:
        batch = batch_plan(config, 1)
        text = replace(config, train=replace(config.train, batch_tokens=TEXT_STEPS * batch.batch_tokens))
        dataset = random_dataset(text, folder, load_tokenizer("r50k_base"), process)
        ctx = RunContext.create(config, process, RunPaths(folder / "run"), log=lambda line: None)
        alone, first_s = tokens_per_s_alone(dataset, batch, config.train.seed, process)
        trainer, state = stack.enter_context(build(ctx, dataset, batch))
        step_s, wait_s, resident_s = steps(trainer, state, options.steps)
        print(
            f"{device_name(process.device)}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, Python "
            f"{platform.python_version()}: {options.preset}, {batch}\n"
        )
        print("| | |\n|---|---|")
        print(f"| first batch after | {first_s * 1_000:,.0f} ms |")
        print(f"| the loader alone | {alone:,.0f} tokens/s |")
        print(f"| training | {batch.batch_tokens / step_s:,.0f} tokens/s, {step_s:.4f} s a step |")
        print(f"| the loader could feed | {alone * step_s / batch.batch_tokens:,.1f} times as fast a training |")
        print(f"| waiting for the loader | {wait_s * 1_000:.3f} ms a step, {wait_s / step_s:.3%} |")
        print(
            f"| steps on batches that are there | {resident_s:.4f} s, {step_s / resident_s - 1:+.2%} with the loader |"
        )


def read_options() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("preset", nargs="?", default="debug")
    arguments.add_argument("--steps", type=int, default=8)
    arguments.add_argument("--micro-batch-size", type=int)
    arguments.add_argument("--batch-tokens", type=int)
    return arguments.parse_args()


def tokens_per_s_alone(dataset: Dataset, batch: BatchPlan, seed: int, process: DistContext) -> tuple[float, float]:
    """Tokens per second of the loader without training, and seconds until its first batch."""
    watch, tokens = Stopwatch(process.device), 0
    position = DataPosition(0, 0, seed, dataset.fingerprint)
    with BatchLoader(dataset.order(batch), batch, position, process.rank, process.device) as loader:
        loader.next_batch()
        first_s = watch.lap()
        for _ in range(loader.READ_AHEAD):  # batches that were read meanwhile do not count
            loader.next_batch()
        watch.lap()
        until = time.perf_counter() + ALONE_S
        while time.perf_counter() < until:
            tokens += loader.next_batch()[0].numel()
        return tokens / watch.lap(), first_s


def steps(trainer: Trainer, state: TrainState, count: int) -> tuple[float, float, float]:
    """Medians of seconds: a step, its wait for the loader, and a step whose batches are on the device already."""
    loader, times, waits, resident = trainer.loader, [], [], []
    watch = Stopwatch(trainer.ctx.dist.device)

    def step(number: int) -> float:
        watch.lap()
        trainer.guard.record(replace(state, step=number))
        train_step(trainer, number)
        return watch.lap()

    held = [loader.next_batch() for _ in range(trainer.batch.grad_accum_steps)]
    for number in range(2 + count):  # two to warm up; both kinds in turn, since a machine's speed drifts
        with handing_out(loader, held):
            resident.append(step(2 * number))
        before = loader.wait_s
        times.append(step(2 * number + 1))
        waits.append(loader.wait_s - before)
    return statistics.median(times[2:]), statistics.median(waits[2:]), statistics.median(resident[2:])


@contextmanager
def handing_out(loader: BatchLoader, batches: list[Batch]):
    """Have the loader give these batches, which are on the device, instead of its own."""
    rest = iter(batches)
    loader.next_batch = lambda: next(rest)
    try:
        yield
    finally:
        del loader.next_batch


if __name__ == "__main__":
    main()
