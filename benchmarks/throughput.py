"""Tokens a second of training: this project, this project the reference's way, and transformers.

    python benchmarks/throughput.py debug
    python benchmarks/throughput.py lf-llm-269m --train.micro-batch-size 32
    torchrun --standalone --nproc_per_node=8 benchmarks/throughput.py lf-llm-269m

Checks first that all ways compute the same: with the same weights and batch, the same loss and gradient norm. Then they
take turns in this one process, warmed up and synchronised, so that other work on the machine weighs on all; a ratio is
that of one turn, and the table has the medians. Text is made up. The ways themselves are in throughput_ways.py.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # runs from a bare checkout too

from myllm.cli.errors import exit_on_error
from myllm.cli.launch import RunArgs, parse_run_args
from myllm.config import RunConfig
from myllm.distributed import launcher as ranks
from myllm.errors import UserError
from myllm.planning.batch import batch_plan

GPU_SEQUENCES = 32
"""A rank's share of a step on a GPU: 16 x 2 accumulation steps, as the reference's run has on each of its eight."""


@dataclass(frozen=True)
class Args(RunArgs):
    """Compare this project's training step with the reference's way and with transformers, in turns, in one process."""

    turns: int = 7
    """How often each way has its turn."""
    steps: int = 5
    """Timed steps of a turn, behind one that is not."""
    sequences: int | None = None
    """A rank's share of a step. None: 32 on a GPU, the preset's on a CPU."""
    peer: Literal["same", "none"] = "same"
    """Whether the model of transformers that computes the same takes part."""
    out: Path | None = None
    """The file that the result is added to. None: temp_data/benchmarks/DATE-DEVICE.md."""


def settle_config(args: Args, device: str, world_size: int) -> RunConfig:
    """The config with a step of the asked size.

    Raises:
        UserError: the micro-batch does not divide it, or is still to be found out.
    """
    config = args.config
    if args.turns < 1 or args.steps < 1:
        raise UserError(f"--turns {args.turns} and --steps {args.steps} must be 1 or more")
    if config.train.micro_batch_size == "auto":
        raise UserError("train.micro_batch_size is auto; give a number, such as `myllm preflight` finds")
    sequences = args.sequences or (None if device == "cpu" else GPU_SEQUENCES)
    if sequences:
        batch_tokens = sequences * config.model.max_seq_len * world_size
        config = replace(config, train=replace(config.train, batch_tokens=batch_tokens))
    if fault := batch_plan(config, world_size).error():
        raise UserError(fault)
    return config


def main() -> None:
    with exit_on_error():
        args = parse_run_args(Args, sys.argv[1:], "python benchmarks/throughput.py")
        from throughput_table import section, write
        from throughput_turns import compare

        from myllm.distributed.collectives import process_group

        with process_group(args.config.train.device) as process:
            config = settle_config(args, process.device.type, process.world_size)
            result = compare(config, process, args.turns, args.steps, args.peer == "same", say)
            if process.is_rank_zero:
                text = section(result, process)
                print(f"\n{text}")
                print(f"added to {write(text, process, args.out)}")


def say(line: str) -> None:
    if ranks.rank() == 0:
        print(f"throughput: {line}", flush=True)


if __name__ == "__main__":
    main()
