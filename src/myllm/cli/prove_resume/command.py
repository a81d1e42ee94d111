"""`myllm prove-resume [PRESET] [overrides]`: see here that a killed run goes on as if nothing had happened."""

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
from myllm.config import DataConfig, RunConfig
from myllm.distributed import launcher as ranks
from myllm.errors import UserError
from myllm.planning.validation import check_config


@dataclass(frozen=True)
class ProveLaunch:
    """What `myllm prove-resume` is asked."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    seed: int | None = None
    """Decides when runs are killed; None: another one each time, which is shown."""
    keep: bool = False
    """Leave the runs' folders there, for inspection."""


def prove_resume(words: list[str]) -> None:
    """Prove that a killed and restarted run matches an uninterrupted one.

    Trains a small run undisturbed, then kills and restarts it, on other numbers of ranks too, and compares samples and
    losses. Takes a preset (default: debug) and the settings of pretrain.py; the preset is shrunk to a few steps on
    little text. Exit code 0: proven, 1: not proven, 2: invalid arguments.
    """
    files, rest = read_config_files(words)
    named = bool(rest) and not rest[0].startswith("-")
    base, rest = base_config(files, rest if named or files else ["debug", *rest])
    if ranks.is_launched():
        raise UserError("`myllm prove-resume` starts its own ranks; call it without torchrun")
    if not paths.is_checkout():
        raise UserError(
            "`myllm prove-resume` starts pretrain.py, which an installed package does not have; run it from a clone of "
            "the repository"
        )
    wanted = parse_arguments(
        ProveLaunch, rest, "myllm prove-resume [PRESET]", ProveLaunch(shrink_config(base)), inspect.getdoc(prove_resume)
    )
    from .compare import format_results, run_trials, world_sizes
    from .training_process import RunFailed

    config = wanted.config
    for world_size in world_sizes(config):
        check_config(config, world_size)
    if config.train.log_every_steps != 1 or config.train.max_steps < 4 or not config.train.save_every_steps:
        raise UserError(
            f"train.log_every_steps is {config.train.log_every_steps}, train.max_steps {config.train.max_steps:,} and "
            f"train.save_every_steps {config.train.save_every_steps:,}; to compare every step, log each, save some "
            "and train at least 4"
        )
    seed = random.randrange(10**6) if wanted.seed is None else wanted.seed
    folder = paths.temp_data() / f"prove-resume-{time.strftime('%Y%m%d-%H%M%S')}-{seed}"
    folder.mkdir(parents=True)
    started = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - started:6.1f} s  {line}", flush=True)

    say(f"{config.train.max_steps} steps of {base.name} a run, kills by --seed {seed}; runs and logs are in {folder}")
    try:
        results = run_trials(config, seed, folder, say)
    except RunFailed as error:
        print(f"\nnot proven: {error}\nwhat it left behind: {folder}")
        raise SystemExit(1) from None
    proven = not any(result.faults for result in results)
    print(f"\n{format_results(results)}\n")
    if proven and not wanted.keep:
        shutil.rmtree(folder)
    print("proven: the same samples in the same order, and the losses of a run that was never interrupted" if proven
          else f"NOT proven; every run's files and output are in {folder}")  # fmt: skip
    raise SystemExit(0 if proven else 1)


def shrink_config(config: RunConfig) -> RunConfig:
    """A run of the same model and recipe that takes a minute: few steps, four sequences each, on little text."""
    sequences, steps = 4, 30
    batch_tokens = sequences * config.model.max_seq_len
    return replace(
        config,
        name="prove-resume",
        data=DataConfig(
            source="python-stdlib", val_tokens=20_000, target_tokens=2 * steps * batch_tokens, shard_tokens=1_000_000
        ),
        optim=replace(config.optim, warmup_steps=5),
        train=replace(
            config.train, max_steps=steps, batch_tokens=batch_tokens, micro_batch_size=2, log_every_steps=1,
            save_every_steps=4, early_stop_patience=None, fresh=False,
        ),
        eval=replace(
            config.eval, validation_every_steps=10, validation_tokens=sequences * config.model.max_seq_len,
            cloze_every_steps=0, hellaswag_every_steps=0, sample_every_steps=0,
        ),
        hub=replace(config.hub, repo=None, every_checkpoint=False),
    )  # fmt: skip
