"""float16 with a loss scale, which is what a card without bfloat16 computes in. A CPU does the same, only slower."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import losses, train_rows, with_train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from myllm.checkpoint.format import load_checkpoint
from myllm.checkpoint.layout import list_checkpoints
from myllm.checkpoint.state import FIRST_LOSS_SCALE, SkipStats, TrainState
from myllm.cli import doctor
from myllm.config import RunConfig, TrainConfig
from myllm.data.prepare.prepare import prepare
from myllm.data.sampler import DataPosition
from myllm.distributed.collectives import DistContext, process_group
from myllm.distributed.parallelize import parallelize
from myllm.distributed.precision import autocast, compute_dtype, has_bfloat16
from myllm.errors import TrainingDiverged
from myllm.model import cross_entropy as model_loss
from myllm.model.cross_entropy import linear_cross_entropy
from myllm.model.transformer import Transformer
from myllm.optim.optimizer import ScheduledOptimizer
from myllm.paths import RunPaths
from myllm.planning.batch import batch_plan
from myllm.training import gradient_guard as guard
from myllm.training import loop, setup
from myllm.training.gradient_guard import GROWTH_STEPS, MAX_LOSS_SCALE, GradientGuard
from myllm.training.setup import RunContext, Trainer
from myllm.training.step import accumulate_gradients, clip_gradients, train_step

pytestmark = pytest.mark.usefixtures("prepared_data")

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ALONE = DistContext(rank=0, local_rank=0, world_size=1, device=CPU)
HALF = TrainConfig(precision="float16")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((6, 1), torch.float16),
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((8, 9), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_auto_precision_follows_device_capability(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert compute_dtype("auto", CUDA) is expected
    assert compute_dtype("float32", CUDA) is torch.float32
    assert compute_dtype("auto", CPU) is torch.float32
    scaled = expected is torch.float16
    assert ("float16 with a loss scale" in doctor.how_it_trains(CUDA)) == scaled
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert has_bfloat16(CUDA)


# -- the gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiling", [False, True])
def test_float16_loss_gradient_does_not_underflow(compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Divided by 32,768 tokens before the products, most of it would be below float16's least number."""
    monkeypatch.setattr(model_loss, "CPU_CHUNK", 4_096)  # as on a GPU
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)  # the form that is compiled, uncompiled
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(32_768, 16, generator=generator), 0.02 * torch.randn(128, 16, generator=generator)
    targets = torch.randint(100, (32_768,), generator=generator)
    exact = [part.double().requires_grad_() for part in (hidden, weight)]
    F.cross_entropy((exact[0] @ exact[1].t())[:, :100], targets).backward()
    found = [part.clone().requires_grad_() for part in (hidden, weight)]
    with torch.autocast("cpu", torch.float16):
        loss, _ = linear_cross_entropy(*found, targets, 100)
    loss.backward(torch.tensor(FIRST_LOSS_SCALE))
    for mine, true in zip(found, exact, strict=True):
        assert (mine.grad / FIRST_LOSS_SCALE - true.grad).norm() < 2e-3 * true.grad.norm()


class RepeatingLoader:
    """Stands in for a loader: the same few batches again and again."""

    def __init__(self) -> None:
        self._turn = 0
        self._rows = torch.randint(100, (4, 4, 65), generator=torch.Generator().manual_seed(1))

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._turn += 1
        rows = self._rows[self._turn % len(self._rows)]
        return rows[:, :-1], rows[:, 1:]


class Steps:
    """The parts of a run, and its steps."""

    def __init__(self, config: RunConfig) -> None:
        self.config = replace(config, model=replace(config.model, vocab_size=100, dropout_ffn=0.0))
        self.model = Transformer(self.config.model)
        self.optimizer = ScheduledOptimizer(
            self.model.named_parameters(), self.model.hidden_matrices(), config.optim, config.train.max_steps
        )
        self.runner, self.guard = parallelize(self.model, self.config, ALONE), GradientGuard(config.train, CPU)
        self.batch, self.loader = batch_plan(self.config, 1), RepeatingLoader()

    def make(self, step: int) -> tuple[float, float]:
        self.guard.record(TrainState(step, 0, DataPosition(0, 0, 0, "")))
        ctx, model = RunContext.create(self.config, ALONE), self.model
        trainer = Trainer(ctx, None, self.batch, model, model, self.runner, self.optimizer, self.loader, self.guard)
        loss, norm, _ = train_step(trainer, step)
        return loss.item(), norm.item()


@pytest.fixture
def steps(tiny: RunConfig) -> Callable[[str], Steps]:
    config = replace(tiny, model=replace(tiny.model, dropout_embedding=0.0, dropout_attention_residual=0.0))
    settings = {"batch_tokens": 1_024, "micro_batch_size": 4, "max_steps": 30}
    return lambda precision: Steps(with_train(config, precision=precision, **settings))


def test_float16_steps_match_float32(steps: Callable[[str], Steps]) -> None:
    """Losses, and norms without the scale; what the optimizer gets is clipped and unscaled."""
    exact, half = steps("float32"), steps("float16")
    for step in range(12):
        (loss, norm), (true_loss, true_norm) = half.make(step), exact.make(step)
        assert loss == pytest.approx(true_loss, abs=3e-3)
        assert norm == pytest.approx(true_norm, rel=2e-2)
    assert half.guard.sync() == replace(half.guard.sync(), overflows=0, steps_at_scale=12)
    assert half.guard.loss_scale == FIRST_LOSS_SCALE
    assert exact.guard.loss_scale is None


def test_clipping_and_unscaling_are_exact() -> None:
    def updated(scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        weight = torch.nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
        optimizer = ScheduledOptimizer([("weight", weight)], {}, RunConfig().optim, 10)
        weight.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)) * (scale or 1.0)
        given = None if scale is None else torch.tensor(scale)
        norm = clip_gradients([weight], 1.0, given)
        optimizer.step(0, torch.tensor(0.0), given)
        return weight.detach(), norm

    assert all(torch.equal(a, b) for a, b in zip(updated(None), updated(2.0**16), strict=True))


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_fsdp_float16_steps_match_float32(steps: Callable[[str], Steps]) -> None:
    """FSDP: float16 on the way, float32 sums, one norm, the scale taken off."""
    exact, config = steps("float32"), steps("float16").config
    model = Transformer(config.model)
    for block in model.blocks:
        fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    parted = steps("float16")
    parted.model, parted.runner = model, parallelize(model, config, ALONE)
    parted.optimizer = ScheduledOptimizer(
        model.named_parameters(), model.hidden_matrices(), config.optim, config.train.max_steps
    )
    for step in range(4):
        (loss, norm), (true_loss, true_norm) = parted.make(step), exact.make(step)
        assert loss == pytest.approx(true_loss, abs=3e-3)
        assert norm == pytest.approx(true_norm, rel=2e-2)


def test_loss_scale_prevents_gradient_underflow(steps: Callable[[str], Steps]) -> None:
    """Most numbers of a long batch's gradient are too small for float16; with the scale none that matters is lost."""

    def gradients(precision: str, scale: float | None) -> dict[str, torch.Tensor]:
        parts = steps(precision)
        batch = replace(parts.batch, batch_tokens=1_024)
        given = None if scale is None else torch.tensor(scale)

        def small(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return parts.model(tokens, targets) / 4_096  # as with this many accumulation steps

        small.train = parts.model.train
        accumulate_gradients(small, parts.loader, batch, parts.config, CPU, loss_scale=given)
        return {name: parameter.grad.double() / (scale or 1.0) for name, parameter in parts.model.named_parameters()}

    true, scaled, plain = gradients("float32", None), gradients("float16", 2.0**20), gradients("float16", None)
    name = "blocks.0.attention.qkv_proj.weight"
    assert (scaled[name] - true[name]).norm() < 0.02 * true[name].norm()
    assert (plain[name] - true[name]).norm() > 0.1 * true[name].norm()


# -- the scale --------------------------------------------------------------------------------------------------------


def judged(judge: GradientGuard, norms: list[float]) -> list[float]:
    """The optimizer's decision about each step's update; step 1 is skipped."""
    found = []
    for step, norm in enumerate(norms):
        judge.record(TrainState(step, 0, DataPosition(0, 0, 0, "")))
        found.append(judge.check(torch.tensor(norm)).item())
    return found


def test_overflow_skips_update_and_halves_scale() -> None:
    """It ends no run, is counted apart, and neither adds to what was bad in a row nor starts that anew."""
    judge = GradientGuard(replace(HALF, max_skipped_steps=0), CPU)
    assert judged(judge, [1.0, math.inf, math.nan, 1.0]) == [0, 1, 1, 0]
    skips = judge.sync()
    assert (skips.overflows, skips.nonfinite, skips.consecutive) == (2, 0, 0)
    assert (skips.loss_scale, skips.steps_at_scale) == (FIRST_LOSS_SCALE / 4, 1)
    assert not judge.diverged
    assert [step.kind for step in judge.skipped] == ["overflow", "overflow"]
    assert [skipped.step for skipped in judge.skipped] == [2, 3]


def test_overflow_at_minimum_scale_diverges() -> None:
    judge = GradientGuard(HALF, CPU)
    halvings = int(math.log2(FIRST_LOSS_SCALE))
    assert judged(judge, [math.nan] * halvings) == [1] * halvings
    assert judge.sync().loss_scale == 1.0
    assert not judge.diverged
    judged(judge, [math.nan, 1.0])
    assert judge.sync().nonfinite == 1
    assert judge.diverged
    assert judge.skipped[-1].kind == "nonfinite"
    exact = GradientGuard(TrainConfig(precision="float32"), CPU)
    judged(exact, [math.nan])
    exact.sync()
    assert exact.diverged


def test_scale_grows_up_to_maximum() -> None:
    judge = GradientGuard(HALF, CPU, SkipStats(loss_scale=1_024.0, steps_at_scale=GROWTH_STEPS - 2))
    judged(judge, [1.0])
    assert judge.loss_scale == 1_024.0
    judged(judge, [1.0])
    assert judge.loss_scale == 2_048.0
    assert judge.sync().steps_at_scale == 0
    largest = GradientGuard(HALF, CPU, SkipStats(loss_scale=MAX_LOSS_SCALE, steps_at_scale=GROWTH_STEPS))
    judged(largest, [1.0])
    assert largest.loss_scale == MAX_LOSS_SCALE


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tiny: RunConfig) -> RunConfig:
    evals = replace(tiny.eval, validation_every_steps=0, cloze_every_steps=0, sample_every_steps=0)
    return with_train(replace(tiny, eval=evals), precision="float16", max_steps=6, log_every_steps=1)


def run(config: RunConfig, stop_at: int | None = None) -> Any:
    if stop_at is not None:
        config = with_train(config, max_steps=stop_at)
    with process_group("cpu") as process:
        return RunPaths.of(loop.train(config, prepare(config.data, progress=False), process).run.root.name)


def test_resume_preserves_loss_scale(bare: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a scale that is far too large it finds its own; the checkpoint has it, and the losses after a restart are
    those of a run that was never stopped."""
    monkeypatch.setattr(guard, "GROWTH_STEPS", 2)
    monkeypatch.setattr(
        guard, "SkipStats", lambda *given: SkipStats(*given) if given else SkipStats(loss_scale=2.0**23)
    )
    whole = run(bare)
    rows, saved = train_rows(whole.root), load_checkpoint(list_checkpoints(whole.checkpoints)[0])
    assert saved.state.skips.overflows == rows[-1]["skipped_overflows"] > 0
    assert saved.state.skips.loss_scale == rows[-1]["loss_scale"] < 2.0**23
    assert "overflowed float16, so the loss scale is halved" in whole.log.read_text()
    assert json.loads(whole.environment.read_text())["precision"] == "float16"
    broken = replace(bare, name="broken")
    real = loop.train_step
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", lambda *a: real(*a) if a[1] != 3 else (_ for _ in ()).throw(Cut()))
        with pytest.raises(Cut):
            run(with_train(broken, save_every_steps=2))
    again = run(broken)
    assert load_checkpoint(list_checkpoints(again.checkpoints)[0]).state == saved.state
    assert losses(again.root) == losses(whole.root)


class Cut(Exception):
    pass


def test_nonfinite_gradient_stops_float16_run(bare: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "Transformer", poisoned)
    monkeypatch.setattr(guard, "SkipStats", lambda *given: SkipStats(*given) if given else SkipStats(loss_scale=4.0))
    with pytest.raises(TrainingDiverged, match="the gradient of step 3 is not finite"):
        run(with_train(bare, log_every_steps=6, save_every_steps=6))


def poisoned(*given: Any) -> Transformer:
    model = Transformer(*given)
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    return model


def test_old_checkpoint_uses_initial_loss_scale() -> None:
    old = {
        "nonfinite": 1,
        "spikes": 0,
        "consecutive": 0,
        "norm_count": 3,
        "log_norm_mean": 0.1,
        "log_norm_variance": 0.2,
    }
    skips = SkipStats(**old)
    assert (skips.loss_scale, skips.overflows) == (FIRST_LOSS_SCALE, 0)
    assert GradientGuard(HALF, CPU, skips).loss_scale == FIRST_LOSS_SCALE


def test_autocast_dtype(tiny: RunConfig) -> None:
    with autocast(with_train(tiny, precision="float16"), CPU):
        assert torch.get_autocast_dtype("cpu") is torch.float16
        assert torch.is_autocast_enabled("cpu")
    with autocast(with_train(tiny, precision="float32"), CPU):
        assert not torch.is_autocast_enabled("cpu")
