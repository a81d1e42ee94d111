"""Train a language model: `python pretrain.py PRESET [overrides]`, alone or under torchrun.

    torchrun --standalone --nproc_per_node=8 pretrain.py lf-llm-269m --optim.max-lr 1e-3

The same command resumes an interrupted run. `python pretrain.py --help` lists the presets.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))  # runs from a bare checkout too

if TYPE_CHECKING:
    from myllm.config import RunConfig


def main() -> None:
    # Imported here, since the processes that tokenise import this file again and need none of it.
    from myllm import launch

    with launch.clear_errors():
        wanted = launch.parse(sys.argv[1:])
        if wanted.dry_run:
            print(launch.describe(wanted))
        else:
            prepare_and_train(wanted.config, wanted.prepare_only)


def prepare_and_train(config: "RunConfig", prepare_only: bool) -> None:
    from myllm import distributed, ranks
    from myllm.data.beside import prepared_beside
    from myllm.data.prepare import prepare
    from myllm.launch import what_next
    from myllm.meter import Diverged
    from myllm.report import write_report
    from myllm.train import train

    if prepare_only:
        dataset = prepare(config.data)
        print(f"data ready: {dataset.folder}, {dataset.train.tokens:,} tokens to train on")
        return
    distributed.choose_device(config.train.device)  # one that is not there is a mistake to know before the hours ahead
    # Of the processes on one machine, the first prepares the data, in a process of its own, while all of them train.
    with (
        prepared_beside(config.data, starts=ranks.local_rank() == 0) as dataset,
        distributed.process_group(config.train.device) as process,
    ):
        try:
            outcome = train(config, dataset, process)
        except Diverged as error:
            sys.exit(f"error: {error}")
        if not process.is_main:
            return
        write_report(outcome.run)
        if outcome.stopped_by is None:
            print(what_next(config))
        else:
            print(f"stopped after step {outcome.step:,}, saved; the same command resumes")
            sys.exit(128 + outcome.stopped_by)


if __name__ == "__main__":
    main()
