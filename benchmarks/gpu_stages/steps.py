"""Real steps of a run on made-up text, for the stages that train."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from myllm.checkpoint.async_saver import AsyncSaver
from myllm.config import RunConfig
from myllm.data.dataset import Dataset
from myllm.data.sample_digest import SampleDigest
from myllm.data.sampler import count_sequences
from myllm.data.tokenizer.load import load_tokenizer
from myllm.distributed.collectives import DistContext
from myllm.paths import RunPaths
from myllm.planning.batch import batch_plan
from myllm.training.preflight.scratch import random_dataset, scratch_folder
from myllm.training.setup import RunContext, build
from myllm.training.step import train_step

from .bench import Bench, fresh


class Steps:
    """What the loop does between two log lines, over and over: the run's own `build` and `train_step`."""

    def __init__(
        self,
        config: RunConfig,
        process: DistContext,
        dataset: Dataset,
        stack: ExitStack,
        run: RunPaths | None = None,
    ) -> None:
        """
        Args:
            stack: ends the trainer.
            run: start from the newest checkpoint in this folder; None: from step 0.
        """
        self.config, self.process, self.dataset = config, process, dataset
        self.batch = batch_plan(config, process.world_size)
        self.messages: list[str] = []
        ctx = RunContext.create(config, process, run or RunPaths(dataset.folder.parent / "new"), self.messages.append)
        self.trainer, self.state = stack.enter_context(build(ctx, dataset, self.batch))
        self.start, self.loader = self.state, self.trainer.loader

    def step(self, phase: Callable[[str], AbstractContextManager[None]] = nullcontext) -> Tensor:
        """One update; the loss, on the device, where nothing has waited for it."""
        state, batch = self.state, self.batch
        self.trainer.guard.record(state)
        loss, self.grad_norm, _ = train_step(self.trainer, state.step, phase)
        self.state = replace(
            state,
            step=state.step + 1,
            tokens_seen=state.tokens_seen + batch.batch_tokens,
            data=state.data.advance(batch.sequences, count_sequences(self.dataset.train.tokens, batch.seq_len)),
        )
        return loss

    @property
    def sample_digest(self) -> SampleDigest:
        """Of all text since the run's first step."""
        return (self.start.sample_digest or SampleDigest()).add(self.loader.digest_sums)

    def losses(self, count: int) -> list[float]:
        """Of this many steps; one read from the device at their end."""
        return torch.stack([self.step() for _ in range(count)]).tolist()


@contextmanager
def stage_folder(bench: Bench) -> Iterator[Path]:
    """A folder, a compiler and a memory that know nothing of what went before, and leave nothing behind."""
    fresh(bench.device)
    with scratch_folder(bench.process) as folder:
        yield folder
    fresh(bench.device)


def made_up(bench: Bench, config: RunConfig, folder: Path) -> Dataset:
    """Text of random tokens, as much as one step trains on."""
    return random_dataset(config, folder, load_tokenizer(config.data.tokenizer), bench.process)


def save(steps: Steps, run: RunPaths) -> None:
    """A checkpoint of where the steps are, whole when this returns."""
    tokenizer, trainer = load_tokenizer(steps.config.data.tokenizer), steps.trainer
    with AsyncSaver(steps.config, run, trainer.model, trainer.optimizer, tokenizer, steps.process) as saver:
        saver.save(replace(steps.state, sample_digest=steps.sample_digest))
