"""What DDP does in a step besides computing: which messages travel, and where gradients lie."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import with_train
from torch.profiler import ProfilerActivity, profile

from myllm.config import RunConfig
from myllm.distributed.collectives import DistContext
from myllm.distributed.parallelize import parallelize, sync_grads_on_last, zero_grad
from myllm.model.transformer import Transformer

PAIR = DistContext(0, 0, 2, torch.device("cpu"))
"""What DDP is chosen for; the group of these tests has one rank."""
pytestmark = pytest.mark.usefixtures("one_rank")


class Steps:
    """Two micro-steps each."""

    def __init__(self, config: RunConfig) -> None:
        config = with_train(replace(config, model=replace(config.model, vocab_size=300)), micro_batch_size=2)
        self.model, self.pointers = Transformer(config.model), []
        self.runner = parallelize(self.model, config, PAIR)

    def __call__(self) -> None:
        self.runner.train()
        for last in (False, True):
            with sync_grads_on_last(self.runner, last):
                self.runner(torch.randint(300, (2, 64)), torch.randint(300, (2, 64))).backward()
            self.pointers.append({p.grad.untyped_storage().data_ptr() for p in self.model.parameters()})
        zero_grad(self.runner)


def messages(work: Callable[[], None]) -> Counter[str]:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    return Counter(event.name for event in seen.events() if event.name.startswith("gloo:"))


def test_step_sends_single_gradient_all_reduce(tiny: RunConfig) -> None:
    steps = Steps(tiny)
    steps()  # once, DDP agrees on the order of its buckets
    assert messages(steps) == {"gloo:all_reduce": 1}
    assert any(buffer.numel() for buffer in steps.model.buffers()), "there are buffers that could have travelled"


def test_gradients_stay_in_buckets(tiny: RunConfig) -> None:
    """Not those of micro-steps that do not travel, nor between steps: elsewhere they would take that memory again."""
    steps = Steps(tiny)
    for _ in range(3):
        steps()
    bucket = steps.pointers[-1]
    assert len(bucket) == 1
    assert all(pointers == bucket for pointers in steps.pointers)
    assert all(not p.grad.any() for p in steps.model.parameters())
