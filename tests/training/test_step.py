"""One training step: what it never does, and what its phases are."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import with_train
from torch.utils._python_dispatch import TorchDispatchMode

from myllm.checkpoint.state import TrainState
from myllm.config import RunConfig
from myllm.data.sampler import DataPosition
from myllm.distributed.collectives import DistContext
from myllm.distributed.parallelize import parallelize
from myllm.model.transformer import Transformer
from myllm.optim.optimizer import ScheduledOptimizer
from myllm.planning.batch import batch_plan
from myllm.training import kernels
from myllm.training.gradient_guard import GradientGuard
from myllm.training.kernels import fast_kernels
from myllm.training.profiler import PHASES
from myllm.training.setup import RunContext, Trainer
from myllm.training.step import train_step

ALONE = DistContext(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__")
"""Methods that make the host wait until the device has the value."""
WAITS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal", "aten::masked_select")
"""Operations that do, wherever they are called; on a GPU their result decides a shape or a branch of the host."""


class HostReads(TorchDispatchMode):
    """Everything that reads a tensor on the host, while it is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().partition(".")[0] in WAITS:
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostReads]:
    watch = HostReads()
    for name in READS:
        real = getattr(torch.Tensor, name)

        def seen(*args: Any, _real: Any = real, _name: str = name, **kwargs: Any) -> Any:
            watch.seen.append(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, seen)
    with watch:
        yield watch


class RandomLoader:
    """Stands in for a loader."""

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(500, (2, 64)), torch.randint(500, (2, 64))


class Steps:
    """The parts of a run, and its steps."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.model = model = Transformer(config.model)
        self.optimizer = ScheduledOptimizer(model.named_parameters(), model.hidden_matrices(), config.optim, 10)
        self.runner, self.guard = parallelize(model, config, ALONE), GradientGuard(config.train, ALONE.device)
        self.batch = batch_plan(config, 1)

    def make(self, step: int, *phase: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
        self.guard.record(TrainState(step, 0, DataPosition(0, 0, 0, "")))
        ctx, model = RunContext.create(self.config, ALONE), self.model
        trainer = Trainer(ctx, None, self.batch, model, model, self.runner, self.optimizer, RandomLoader(), self.guard)
        return train_step(trainer, step, *phase)


@pytest.fixture
def steps(tiny: RunConfig) -> Steps:
    model = replace(tiny.model, vocab_size=500)
    return Steps(replace(with_train(tiny, batch_tokens=256, micro_batch_size=2, skip_spikes_sigma=6.0), model=model))


@pytest.mark.parametrize("foreach", [False, True])
def test_step_does_not_synchronize_with_device(
    foreach: bool, steps: Steps, reads: HostReads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipping and the guard's judgement neither; clipped as on a CPU, and by one kernel for all as on a GPU."""
    clip, norms = torch.nn.utils.clip_grad_norm_, []

    def clipped(parameters: Any, most: float) -> torch.Tensor:
        parameters = list(parameters)
        norms.append((clip(parameters, most, foreach=foreach), parameters[0].grad.detach().clone()))
        return norms[-1][0]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    rows = [steps.make(step) for step in range(3)]
    assert reads.seen == []
    assert all(norm > steps.config.optim.max_grad_norm / 100 for norm, _ in norms)
    assert "__bool__" in reads.seen  # the watch sees what this very line did
    loss, _, _ = rows[-1]
    reads.seen.clear()
    loss.item()
    float(loss)
    assert "item" in reads.seen
    assert "aten::_local_scalar_dense" in reads.seen


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_algorithms_cover_whole_step(
    deterministic: bool, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, compiling included, and nothing but it; cuBLAS is told before anything is wrapped or computed."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    config = with_train(replace(tiny, model=replace(tiny.model, vocab_size=500)), deterministic=deterministic)
    config = with_train(config, batch_tokens=256, micro_batch_size=2)
    model, seen, workspaces = Transformer(config.model), [], []

    def look(*_: Any) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())

    def wrapped(*given: Any) -> torch.nn.Module:
        workspaces.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        return parallelize(*given)

    monkeypatch.setattr(kernels, "parallelize", wrapped)
    with fast_kernels(model, config, ALONE) as runner:
        parts = Steps(config)
        parts.runner = runner
        for parameter in parts.runner.parameters():
            parameter.register_hook(look)
        model.blocks[0].register_forward_hook(look)
        parts.guard.check, check = lambda norm: (look(), check(norm))[1], parts.guard.check
        parts.make(0)
        assert not torch.are_deterministic_algorithms_enabled()
    assert len(seen) > 20
    assert set(seen) == {deterministic}
    assert workspaces == [":4096:8" if deterministic else None]
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_failed_step_restores_determinism_setting(steps: Steps) -> None:
    steps.config = with_train(steps.config, deterministic=True)
    steps.runner = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError):
        steps.make(0)
    assert not torch.are_deterministic_algorithms_enabled()


def test_step_phases(steps: Steps) -> None:
    entered: list[str] = []

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        entered.append(name)
        yield

    steps.make(0, phase)
    micro_step = ["data", "forward", "backward"]
    assert entered == [*micro_step, *micro_step, "clip", "optimizer"]
    assert tuple(dict.fromkeys(entered)) == PHASES


def test_step_modules_contain_no_synchronizing_calls() -> None:
    """What runs on a GPU alone is not seen by the watch above. MPS has to ask the device, on a line that names it."""
    source = Path(__file__).resolve().parents[2] / "src/myllm"
    model = ("cross_entropy", "attention", "norm", "rope")
    for name in ("training/step.py", "optim/adamw.py", *(f"model/{part}.py" for part in model)):
        lines = (source / name).read_text(encoding="utf-8").splitlines()
        text = "\n".join(line for line in lines if "mps" not in line)
        for call in (".item()", ".tolist()", ".cpu()", ".numpy()", "synchronize"):
            assert call not in text, (name, call)
