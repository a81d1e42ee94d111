"""The command `myllm prove-resume [PRESET] [overrides]`."""

import inspect
import random
import shutil
import time
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from myllm import paths
from myllm.cli.launch import base_config, read_config_files
from myllm.cli.parse import parse_arguments
from myllm.cli.trials import as_trial
from myllm.config import DataConfig, RunConfig
from myllm.distributed import launcher as ranks
from myllm.errors import UserError
from myllm.planning.config_checks import check_config


@dataclass(frozen=True)
class ProveArgs:
    """Command-line arguments of `myllm prove-resume`."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    seed: int | None = None
    """Seed of the moments when runs are killed (default: random; it is printed)."""
    keep: bool = False
    """Keep the folders of the runs."""


def prove_resume(words: list[str]) -> None:
    """Prove that a killed and restarted run matches an uninterrupted one.

    Trains a small run without interruption, then kills and restarts it, also on another number of ranks, and compares
    samples and losses. Takes a preset (default: debug), which is shrunk to a few steps on little text, and the settings
    of pretrain.py. Exit code 0: proven, 1: not proven, 2: invalid arguments.
    """
    files, rest = read_config_files(words)
    named = bool(rest) and not rest[0].startswith("-")
    base, rest = base_config(files, rest if named or files else ["debug", *rest])
    if ranks.is_launched():
        raise UserError("`myllm prove-resume` starts its own ranks; run it without torchrun")
    if not paths.is_checkout():
        raise UserError(
            "`myllm prove-resume` needs pretrain.py, which an installed package does not have; run it from a clone of "
            "the repository"
        )
    args = parse_arguments(
        ProveArgs, rest, "myllm prove-resume [PRESET]", ProveArgs(shrink_config(base)), inspect.getdoc(prove_resume)
    )
    from .compare import Prover, format_results, world_sizes
    from .training_process import RunFailed

    config = args.config
    for world_size in world_sizes(config):
        check_config(config, world_size)
    if config.train.log_every_steps != 1 or config.train.max_steps < 4 or not config.train.save_every_steps:
        raise UserError(
            f"train.log_every_steps is {config.train.log_every_steps}, train.max_steps {config.train.max_steps:,} and "
            f"train.save_every_steps {config.train.save_every_steps:,}; expected 1, at least 4, and at least 1"
        )
    seed = random.randrange(10**6) if args.seed is None else args.seed
    folder = paths.temp_data() / f"prove-resume-{time.strftime('%Y%m%d-%H%M%S')}-{seed}"
    folder.mkdir(parents=True)
    started = time.perf_counter()

    def log(line: str) -> None:
        print(f"{time.perf_counter() - started:6.1f} s  {line}", flush=True)

    log(f"{config.train.max_steps} steps of {base.name} per run, --seed {seed}; runs and logs are in {folder}")
    try:
        results = Prover(config, folder, random.Random(seed), log).run_trials()
    except RunFailed as error:
        print(f"\nnot proven: {error}\nall files are in {folder}")
        raise SystemExit(1) from None
    proven = not any(result.errors for result in results)
    print(f"\n{format_results(results)}\n")
    if proven and not args.keep:
        shutil.rmtree(folder)
    print(
        "proven: the same samples in the same order, and the losses of an uninterrupted run"
        if proven
        else f"NOT proven; all files and output are in {folder}"
    )
    raise SystemExit(0 if proven else 1)


def shrink_config(config: RunConfig) -> RunConfig:
    """The same model and recipe for a run of a minute: few steps of four sequences, on little text."""
    sequences, steps = 4, 30
    batch_tokens, trial = sequences * config.model.max_seq_len, as_trial(config)
    return replace(
        trial,
        name="prove-resume",
        data=DataConfig(
            source="python-stdlib", tokenizer=config.data.tokenizer, val_tokens=20_000, shard_tokens=1_000_000,
            target_tokens=2 * steps * batch_tokens,
        ),
        optim=replace(config.optim, warmup_steps=5),
        train=replace(
            trial.train, max_steps=steps, batch_tokens=batch_tokens, micro_batch_size=2, log_every_steps=1,
            save_every_steps=4, keep_last=config.train.keep_last,
        ),
        eval=replace(trial.eval, validation_every_steps=10, validation_tokens=batch_tokens),
    )  # fmt: skip
