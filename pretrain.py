"""Train a language model: `python pretrain.py PRESET [overrides]`, alone or under torchrun.

    torchrun --standalone --nproc_per_node=8 pretrain.py lf-llm-269m --optim.max-lr 1e-3

The same command resumes an interrupted run. `python pretrain.py --help` lists the presets.
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))  # runs from a bare checkout too

if TYPE_CHECKING:
    from collections.abc import Callable

    from myllm.cli.launch import PretrainArgs
    from myllm.config import RunConfig
    from myllm.paths import RunPaths
    from myllm.runs.step_process import StepProcess
    from myllm.training.loop import Outcome


def main() -> None:
    # Imported here: the processes that tokenize import this file again, and need none of it.
    try:
        from myllm.cli.errors import exit_on_error
        from myllm.cli.launch import parse_args
        from myllm.distributed.library_env import set_library_env
        from myllm.distributed.standard_streams import protect_output
    except ModuleNotFoundError as error:
        sys.exit(missing_package(error))

    set_library_env()
    protect_output(keep_going=True)
    with exit_on_error():
        args = parse_args(sys.argv[1:], fetch_mirrored)
        if args.config.hub.repo and not args.prepare_only:
            check_publishing(args.config)
        if args.dry_run:
            from myllm.cli.plan import check_prepared_data, describe_dry_run

            print(describe_dry_run(args))
            check_mirror(args.config)
            check_run(args.config)
            check_data(args.config)  # last: the plan is useful even if the data is not there
            check_prepared_data(args.config)
        elif args.prepare_only:
            prepare_data(args.config)
        else:
            pretrain(args)


def pretrain(args: "PretrainArgs") -> None:
    """Prepare data in the background, train, draw the report, mirror, publish."""
    started = time.monotonic()
    from myllm.distributed import launcher as ranks

    if ranks.rank() == 0:
        print(f"starting the run {args.config.name}", flush=True)
    if ranks.local_rank() == 0:  # before torch is imported, which takes seconds
        check_run(args.config)
        check_data(args.config)

    from myllm.distributed.collectives import training_device
    from myllm.errors import exit_code
    from myllm.hub.background_publish import background_publisher
    from myllm.paths import RunPaths
    from myllm.runs.heartbeat import report_starting
    from myllm.runs.mirror.upload import background_mirror
    from myllm.training.preflight.device_memory import check_memory
    from myllm.training.stop_signals import exit_unfinished_on_time_signals

    exit_unfinished_on_time_signals()
    device = training_device(args.config.train.device)  # what is missing is reported now, not after the preparation
    check_memory(args.config, device, ranks.world_size())
    is_rank_zero = ranks.rank() == 0
    with (
        report_starting(RunPaths.of(args.config.name), active=is_rank_zero) as take_over,
        background_publisher(args.config, active=is_rank_zero) as publisher,
        background_mirror(args.config, active=is_rank_zero) as mirror,
    ):
        config, outcome = train(args, started, take_over, publisher, mirror)
        if is_rank_zero:
            finish(args, config, outcome, publisher, mirror)
        elif outcome.stopped_by is not None:
            ranks.exit_with(exit_code(outcome.stopped_by))


def train(
    args: "PretrainArgs",
    started: float,
    take_over: "Callable[[], None]",
    publisher: "StepProcess",
    mirror: "StepProcess",
) -> "tuple[RunConfig, Outcome]":
    """Train on a data set that may still be in preparation: on every machine, local rank 0 starts that in a process of
    its own.

    Args:
        started: when this process began, by the monotonic clock.
        take_over: called when the loop takes over the heartbeat.

    Returns:
        the config with the steps and the micro-batch size of this run, and how the run ended.
    """
    from myllm.data.prepare.background import prepare_in_background
    from myllm.distributed import collectives
    from myllm.distributed import launcher as ranks
    from myllm.distributed.out_of_memory import explain_out_of_memory
    from myllm.errors import TrainingDiverged
    from myllm.planning.length import resolve_max_steps, tokens_to_resolve_max_steps
    from myllm.runs.mirror.upload import stop_timeout_s
    from myllm.training import loop
    from myllm.training.preflight.batch_size import resolve_micro_batch_size
    from myllm.training.setup import resolve_config

    config, starts = args.config, ranks.local_rank() == 0
    min_tokens = tokens_to_resolve_max_steps(config, args.own_text)
    with (
        prepare_in_background(config.data, starts, min_train_tokens=min_tokens) as dataset,
        collectives.process_group(config.train.device) as dist,
    ):
        take_over()
        config = resolve_max_steps(config, dataset.known_train_tokens or dataset.train.tokens, args.own_text)
        config = resolve_config(config, dataset, dist)
        tokenizer, val_tokens = dataset.tokenizer(), dataset.val.tokens
        config, note = resolve_micro_batch_size(config, tokenizer, dist, val_tokens, use_preflight=True)
        notes = [note] if note else []

        def on_checkpoint(step: int) -> None:
            mirror.submit(step)
            publisher.submit(step)

        try:
            with explain_out_of_memory(config, dist):
                outcome = loop.train(config, dataset, dist, on_checkpoint, started, args.profile, notes)
        except TrainingDiverged as error:
            if dist.is_rank_zero:  # the log has the whole message
                print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
            collectives.barrier()  # a launcher ends the other ranks as soon as one has exited
            sys.exit(TrainingDiverged.EXIT_CODE)
        if outcome.stopped_by is not None and config.checkpoint.mirror is not None:
            mirror.finish(outcome.step, stop_timeout_s(started, config.train.max_wall_s))
            collectives.barrier()  # as above
        return config, outcome


def finish(
    args: "PretrainArgs", config: "RunConfig", outcome: "Outcome", publisher: "StepProcess", mirror: "StepProcess"
) -> None:
    """On rank 0, after training: the report, what to do next, the last uploads."""
    from myllm.distributed import launcher as ranks
    from myllm.errors import exit_code
    from myllm.runs.run_dir import next_steps

    # Without a training step there is nothing to draw. Of many trials few are looked at one by one.
    trained = outcome.stopped_by is None or outcome.run.metrics.is_file()
    if trained and not outcome.run.trial.is_file():
        draw_report(outcome.run)
    if outcome.stopped_by is not None:
        print(f"stopped after step {outcome.step:,}{', saved' if outcome.step else ''}; the same command resumes")
        ranks.exit_with(exit_code(outcome.stopped_by))
    print(next_steps(config, outcome.stopped_early, args.config.train.epochs))
    mirror.finish(outcome.step)
    publisher.finish(outcome.step)


def draw_report(run: "RunPaths") -> None:
    """Whatever goes wrong here must not fail a run that is complete."""
    try:
        from myllm.runs.report.html import write_report

        write_report(run)
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        print(f"no report: {reason}; to try again: myllm report {run.root.name}", file=sys.stderr)


def prepare_data(config: "RunConfig") -> None:
    from myllm.data.prepare.prepare import prepare
    from myllm.distributed import launcher as ranks

    if ranks.local_rank() == 0:
        check_data(config)
    dataset = prepare(config.data)
    print(f"data ready: {dataset.folder}, {dataset.known_train_tokens:,} tokens to train on")


def check_run(config: "RunConfig") -> None:
    """Reject settings with which the run of this name cannot resume."""
    from myllm.paths import RunPaths

    if RunPaths.of(config.name).checkpoints.is_dir():
        from myllm.runs.saved_settings import check_saved_settings

        check_saved_settings(config)


def check_data(config: "RunConfig") -> None:
    """Reject names of sources, data sets and tokenizers that do not exist."""
    from myllm.data.prepare.background import check_data_names
    from myllm.evals.validation_sets import check_validation_sets

    check_data_names(config.data)
    check_validation_sets(config)


def check_publishing(config: "RunConfig") -> None:
    """Only rank 0 publishes, so only that process needs a token."""
    from myllm.distributed import launcher as ranks
    from myllm.hub import publish as publishing
    from myllm.hub.background_publish import check_hub_access

    if ranks.rank() == 0:
        publishing.check_export(config.model)
        check_hub_access(config.hub)


def check_mirror(config: "RunConfig") -> None:
    """Reject a URL that cannot be a mirror, without asking the network."""
    from myllm.paths import RunPaths
    from myllm.runs.mirror.store import MirrorStore

    if config.checkpoint.mirror is not None:
        MirrorStore(config.checkpoint.mirror, RunPaths.of(config.name))


def fetch_mirrored(config: "RunConfig") -> None:
    """Begin on a new machine with the checkpoint that another one has mirrored."""
    from myllm.runs.mirror.fetch import fetch_from_mirror

    fetch_from_mirror(config)


def missing_package(error: ModuleNotFoundError) -> int:
    """Say how to get the environment that this Python lacks, and return the exit code."""
    if (error.name or "").partition(".")[0] == "myllm":
        raise error
    activate = Path(__file__).resolve().parent / ".venv/bin/activate"
    fix = f"source {activate}" if activate.exists() else "./run_pre_training_e2e_debug.sh creates it in .venv"
    print(f"error: {sys.executable} has no package {error.name!r}; use MyLLM's environment: {fix}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
