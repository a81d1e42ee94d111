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
    from myllm.config import RunConfig
    from myllm.paths import RunPaths


def main() -> None:
    # Imported here, since the processes that tokenise import this file again and need none of it.
    try:
        from myllm.cli import launch
        from myllm.distributed.library_env import set_library_env
        from myllm.distributed.standard_streams import protect_output
    except ModuleNotFoundError as error:
        sys.exit(missing_package(error))

    set_library_env()
    protect_output(keep_going=True)
    with launch.exit_on_error():
        wanted = launch.parse_args(sys.argv[1:])
        if wanted.config.hub.repo and not wanted.prepare_only:
            check_publishing(wanted.config)
        if wanted.dry_run:
            from myllm.cli.plan import describe_dry_run
            from myllm.data.prepare.background import check_data_names

            print(describe_dry_run(wanted))
            check_data_names(wanted.config.data)  # a plan helps without the data, but this run could not start
        else:
            prepare_and_train(wanted.config, wanted.prepare_only, wanted.profile, wanted.own_text)


def missing_package(error: ModuleNotFoundError) -> int:
    """Say how to get the environment that this Python lacks, and return the exit code."""
    if (error.name or "").partition(".")[0] == "myllm":
        raise error
    activate = Path(__file__).resolve().parent / ".venv/bin/activate"
    how = f"source {activate}" if activate.exists() else "./run_pre_training_e2e_debug.sh makes one in .venv"
    print(f"error: {sys.executable} has no package {error.name!r}; use MyLLM's environment: {how}", file=sys.stderr)
    return 2


def check_publishing(config: "RunConfig") -> None:
    """Only one process publishes, and only that one needs a token."""
    from myllm.distributed import launcher as ranks
    from myllm.hub import publish as publishing
    from myllm.hub.background_publish import check_hub_access

    if ranks.rank() == 0:
        publishing.check_export(config.model)
        check_hub_access(config.hub)


def prepare_and_train(config: "RunConfig", prepare_only: bool, profile: bool = False, own_text: bool = False) -> None:
    started = time.monotonic()
    from myllm.data.prepare.background import check_data_names, prepare_in_background
    from myllm.data.prepare.prepare import prepare
    from myllm.distributed import launcher as ranks

    if ranks.local_rank() == 0:
        check_data_names(config.data)  # a typo is not worth the seconds that torch takes
    if prepare_only:
        dataset = prepare(config.data)
        print(f"data ready: {dataset.folder}, {dataset.train.tokens:,} tokens to train on")
        return

    from myllm.distributed import collectives as distributed
    from myllm.errors import TrainingDiverged, exit_code
    from myllm.hub.background_publish import background_publisher
    from myllm.paths import RunPaths
    from myllm.planning.length import resolve_max_steps, tokens_to_resolve_max_steps
    from myllm.runs.heartbeat import report_starting
    from myllm.runs.run_dir import next_steps
    from myllm.training.loop import train
    from myllm.training.preflight.batch_size import resolve_micro_batch_size
    from myllm.training.setup import resolve_config
    from myllm.training.stop_signals import exit_unfinished_on_time_signals

    exit_unfinished_on_time_signals()
    distributed.training_device(config.train.device)  # one that is not there is to be known before the hours ahead
    is_rank_zero, epochs = ranks.rank() == 0, config.train.epochs

    min_tokens = tokens_to_resolve_max_steps(config, own_text)
    with (
        report_starting(RunPaths.of(config.name), active=is_rank_zero) as taken_over,
        background_publisher(config, active=is_rank_zero) as publisher,
    ):
        # The first process of each machine has the data prepared, in a process of its own, while all of them train.
        with (
            prepare_in_background(config.data, starts=ranks.local_rank() == 0, min_train_tokens=min_tokens) as dataset,
            distributed.process_group(config.train.device) as process,
        ):
            taken_over()
            config = resolve_config(resolve_max_steps(config, dataset.train.tokens, own_text), dataset, process)
            config, note = resolve_micro_batch_size(
                config, dataset.tokenizer(), process, dataset.val.tokens, use_preflight=True
            )
            try:
                outcome = train(config, dataset, process, publisher.submit, started, profile, [note] if note else [])
            except TrainingDiverged as error:
                if is_rank_zero:  # all that is known stands in the log, and above
                    print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
                distributed.barrier()  # a launcher ends the others as soon as one has left
                sys.exit(TrainingDiverged.EXIT_CODE)
        if not is_rank_zero:
            if outcome.stopped_by is not None:
                ranks.exit_with(exit_code(outcome.stopped_by))
            return
        if outcome.stopped_by is None or outcome.run.metrics.is_file():  # stopped before the first row: nothing to draw
            draw_report(outcome.run)
        if outcome.stopped_by is not None:
            saved = ", saved" if outcome.step else ""
            print(f"stopped after step {outcome.step:,}{saved}; the same command resumes")
            ranks.exit_with(exit_code(outcome.stopped_by))
        print(next_steps(config, outcome.stopped_early, epochs))
        publisher.finish(outcome.step)


def draw_report(run: "RunPaths") -> None:
    """The report of a run that has ended. Whatever keeps it from being drawn takes nothing from the run."""
    try:
        from myllm.runs.report.html import write_report

        write_report(run)
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        print(f"no report: {reason}; `myllm report {run.root.name}` tries again", file=sys.stderr)


if __name__ == "__main__":
    main()
