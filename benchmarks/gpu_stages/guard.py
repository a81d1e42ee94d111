"""What keeps a step right: the guard leaves a bad update out, nothing waits for the device, and text arrives whole."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from myllm.data.transfer import inputs_and_targets, make_transfer

from .bench import Bench
from .frame import Check, correct, noted
from .steps import Steps, made_up, stage_folder

LAYERS = 2
AHEAD = 4
"""Batches on their way at a time, as the loader has them."""


def run(bench: Bench) -> Iterator[Check]:
    # Not compiled: the loss is spoilt from outside, and what would wait waits either way.
    config = bench.config(LAYERS, micro_batch=2 if bench.tiny else 8, compile="off", on_nonfinite="skip")
    with stage_folder(bench) as folder, ExitStack() as stack:
        steps = Steps(config, bench.process, made_up(bench, config, folder), stack)
        steps.losses(2)
        yield from skips(steps)
        yield waits(bench, steps)
    yield transfer(bench)


class Spoilt(nn.Module):
    """A model whose loss is no number."""

    def __init__(self, runner: nn.Module) -> None:
        super().__init__()
        self.runner = runner

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.runner(tokens, targets) * torch.nan


def skips(steps: Steps) -> Iterator[Check]:
    before, trainer = state(steps), steps.trainer
    steps.trainer = replace(trainer, train_model=Spoilt(trainer.train_model))
    steps.step()
    steps.trainer = trainer
    counted = trainer.guard.sync().nonfinite
    kept = equal(before, state(steps))
    measured = f"{counted} counted, weights and moments {'as before' if kept else 'CHANGED'}"
    yield correct("an update that is not finite", kept and counted == 1, measured, "1 counted, as before")
    loss = steps.step().item()
    moved = not equal(before, state(steps))
    right = moved and loss == loss
    yield correct("the next one", right, f"loss {loss:.3f}, {'made' if moved else 'NOT MADE'}", "made")


def state(steps: Steps) -> list[Tensor]:
    """Copies of weights, moments and AdamW's counts of steps."""
    moments = steps.trainer.optimizer.state_dict().values()
    tensors = [*steps.trainer.model.state_dict().values(), *(tensor for state in moments for tensor in state.values())]
    return [tensor.detach().clone() for tensor in tensors]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def waits(bench: Bench, steps: Steps) -> Check:
    """Two steps in which torch raises an error at anything that would wait for the device."""
    if not bench.on_cuda:
        steps.step()
        return noted("waiting for the device", "a CPU has none")
    with no_waiting():
        try:
            steps.step()
            steps.step()
        except RuntimeError as error:
            return correct("waiting for the device", False, str(error).splitlines()[0][:200], "nothing waits")
    return correct("waiting for the device", True, "nothing waits", "nothing waits")


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def transfer(bench: Bench) -> Check:
    """Batches sent from another thread while the device is busy, against the rows that they were made of."""
    rounds, model, chance = 8 if bench.tiny else 256, bench.model(), np.random.Generator(np.random.PCG64(0))
    shape = 2 if bench.tiny else 32, model.max_seq_len + 1
    rows = [chance.integers(2**16, size=shape, dtype=np.uint16) for _ in range(rounds)]
    busy = torch.randn(2, 64 if bench.tiny else 4_096, 64 if bench.tiny else 4_096, device=bench.device)
    way, differ = make_transfer(bench.device), torch.zeros((), dtype=torch.int64, device=bench.device)
    with ThreadPoolExecutor(1) as thread:
        sent = [thread.submit(way.send, row) for row in rows[:AHEAD]]
        for number, row in enumerate(rows):
            got = way.receive(sent.pop(0).result())
            if number + AHEAD < rounds:
                sent.append(thread.submit(way.send, rows[number + AHEAD]))
            torch.mm(busy[0], busy[1], out=busy[0])
            busy[0].clamp_(-1, 1)
            for received, expected in zip(got, inputs_and_targets(row), strict=True):
                differ += (received != expected.to(bench.device)).sum()
    wrong = int(differ)
    return correct(f"{rounds} batches on their way", wrong == 0, f"{wrong:,} wrong tokens", "0")
