"""A checkpoint of the whole model: what training waits for, what the disk takes, and whether all of it comes back."""

import time
from collections.abc import Iterator
from contextlib import ExitStack

from myllm.checkpoint.async_saver import AsyncSaver
from myllm.data.tokenizer.load import load_tokenizer
from myllm.paths import RunPaths

from .bench import Bench, synchronize
from .frame import Check, bounded, correct, noted
from .guard import equal, state
from .steps import Steps, made_up, stage_folder

BLOCKED_S = 5.0
"""That training may wait for the copy to host memory."""


def run(bench: Bench) -> Iterator[Check]:
    config = bench.config(micro_batch=1, compile="off")
    with stage_folder(bench) as folder:
        dataset, run = made_up(bench, config, folder), RunPaths(folder)
        with ExitStack() as stack:
            steps = Steps(config, bench.process, dataset, stack)
            steps.step()
            expected = state(steps)
            synchronize(bench.device)
            trainer, started = steps.trainer, time.perf_counter()
            tokenizer = load_tokenizer(config.data.tokenizer)
            with AsyncSaver(config, run, trainer.model, trainer.optimizer, tokenizer, bench.process) as saver:
                saver.save(steps.state)
                blocked_s = time.perf_counter() - started
            whole_s = time.perf_counter() - started
        n_bytes = sum(path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file())
        limit = BLOCKED_S if bench.on_cuda else None
        yield bounded("training waits", blocked_s, None, limit, "s", 2)
        yield noted("whole on the disk", f"{n_bytes / 2**30:.2f} GiB after {whole_s:.1f} s", seconds=whole_s)
        with ExitStack() as stack:
            started = time.perf_counter()
            again = Steps(config, bench.process, dataset, stack, run)
            load_s, same = time.perf_counter() - started, equal(expected, state(again))
        measured = f"{'equal' if same else 'DIFFERENT'}, in {load_s:.1f} s"
        yield correct("weights and moments read back", same, measured, "equal", seconds=load_s)
