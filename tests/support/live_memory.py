"""What a training step really holds in memory, by two of torch's own means that know nothing of the estimate."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from myllm.config import RunConfig
from myllm.distributed.collectives import DistContext
from myllm.distributed.parallelize import parallelize, sync_grads_on_last, zero_grad
from myllm.distributed.precision import autocast
from myllm.model.transformer import Transformer
from myllm.optim.optimizer import ScheduledOptimizer

ALONE = DistContext(0, 0, 1, torch.device("cpu"))


class Step:
    """One rank's steps on a CPU, with a model and an optimizer that are made here."""

    def __init__(self, config: RunConfig, process: DistContext = ALONE) -> None:
        self.config, shape = config, (config.train.micro_batch_size, config.model.max_seq_len)
        self.model = Transformer(config.model)
        self.optimizer = ScheduledOptimizer(
            self.model.named_parameters(), self.model.hidden_matrices(), config.optim, 10
        )
        self.runner = parallelize(self.model, config, process)
        self.tokens = torch.randint(config.model.vocab_size, shape)
        self.accumulation = config.train.batch_tokens // (self.tokens.numel() * process.world_size)

    def forward(self) -> Tensor:
        with autocast(self.config, ALONE.device):
            return self.runner(self.tokens, self.tokens)

    def __call__(self) -> None:
        self.runner.train()
        for micro_step in range(self.accumulation):
            with sync_grads_on_last(self.runner, micro_step == self.accumulation - 1):
                self.forward().backward()
        torch.nn.utils.clip_grad_norm_(self.optimizer.parameters.values(), 1.0)
        self.optimizer.step(0)
        zero_grad(self.runner)

    @property
    def held(self) -> int:
        """Bytes of weights, buffers and moments, and of gradients where they stay from step to step."""
        moments = [each for state in self.optimizer.state_dict().values() for each in state.values()]
        gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
        return bytes_of([*self.model.parameters(), *self.model.buffers(), *moments, *gradients])


def bytes_of(tensors: list[Tensor]) -> int:
    """Of their memory; what several of them share counts once."""
    return sum({each.data_ptr(): each.nbytes() for each in (t.untyped_storage() for t in tensors)}.values())


def saved_bytes(step: Step) -> int:
    """What autograd keeps from a forward pass for the backward pass, without weights and buffers."""
    kept: list[Tensor] = []
    step.runner.train()
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = step.forward()
    own = {t.untyped_storage().data_ptr() for t in [*step.model.parameters(), *step.model.buffers(), step.tokens]}
    kept = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    del loss
    return bytes_of(kept)


def highest(work: Callable[[], None]) -> int:
    """How many bytes more than before are allocated at once, at most, while something is done."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
