"""Muon against torch.optim.Muon, a float32 twin of it, and the singular values in float64; skipping; state by name."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.kinds import by_model_kind, by_optimizer
from torch import Tensor, nn

from myllm.config import ModelConfig, OptimConfig
from myllm.model.transformer import Transformer
from myllm.optim import muon
from myllm.optim.lr_schedule import rate_factor
from myllm.optim.muon import COEFFICIENTS, momentum_at, orthogonalize
from myllm.optim.optimizer import ScheduledOptimizer

CONFIG = OptimConfig(
    optimizer="muon", muon_lr=0.02, max_lr=0.01, warmup_steps=2, schedule="linear", muon_momentum_warmup_steps=4
)
STEPS = 20
MATRICES = {"square": (16, 16), "tall": (24, 16), "wide": (16, 40), "other_square": (16, 16)}
HIDDEN = {name: (rows,) for name, (rows, _) in MATRICES.items()}
SHAPES = {**MATRICES, "embedding.weight": (30, 16), "bias": (16,)}


def tensors(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """Exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).bfloat16().float() for name, shape in shapes.items()}


def make(config: OptimConfig = CONFIG, seed: int = 0) -> ScheduledOptimizer:
    return ScheduledOptimizer(
        ((name, nn.Parameter(value)) for name, value in tensors(seed).items()), HIDDEN, config, STEPS
    )


def update(optimizer: ScheduledOptimizer, step: int, **options: Tensor) -> None:
    for name, gradient in tensors(1_000 + step).items():
        optimizer.parameters[name].grad = gradient
    optimizer.step(step, **options)
    optimizer.zero_grad()


def snapshot(optimizer: ScheduledOptimizer) -> dict[str, Tensor]:
    """The bits of everything that an update may change."""
    state = {f"{name}/{key}": value for name, kinds in optimizer.state_dict().items() for key, value in kinds.items()}
    return {name: value.detach().clone().view(torch.int32) for name, value in (state | optimizer.parameters).items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture
def float32_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "iteration_dtype", lambda device: torch.float32)


# -- the update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_update_matches_torch(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch iterates in bfloat16, on matrices that it first rounds to bfloat16 and divides by a norm in bfloat16.

    Signs, in matrices whose norm is a power of 2, are exact through all of that.
    """
    monkeypatch.setattr(muon, "iteration_dtype", lambda device: torch.bfloat16)
    config = replace(CONFIG, muon_scale=scale, muon_momentum=0.0, muon_momentum_start=0.0)
    for shape in ((16, 16), (64, 16), (16, 64)):
        before, signs = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
        ours, theirs = nn.Parameter(before.clone()), nn.Parameter(before.clone())
        ours.grad = theirs.grad = signs.sign()
        rate = 0.02 * rate_factor(0, config, STEPS)
        torch.optim.Muon([theirs], lr=rate, momentum=0.0, weight_decay=0.1, adjust_lr_fn=scale).step()
        ScheduledOptimizer([("w", ours)], {"w": shape[:1]}, config, STEPS).step(0)
        assert (ours - theirs).norm() < 1e-2 * (theirs - before).norm()


def float32_twin(grad: Tensor, ns_coefficients: tuple[float, ...], ns_steps: int, eps: float) -> Tensor:
    """torch.optim._muon._zeropower_via_newtonschulz without the conversion to bfloat16."""
    a, b, c = ns_coefficients
    x = grad.mT if grad.shape[0] > grad.shape[1] else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if grad.shape[0] > grad.shape[1] else x


@pytest.mark.usefixtures("float32_iteration")
def test_updates_match_float32_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With momentum, its warm-up, the schedule and weight decay."""
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", float32_twin)
    start = {name: value / 64 for name, value in tensors(0, MATRICES).items()}  # so that rounding them is not seen
    ours = ScheduledOptimizer(((name, nn.Parameter(w.clone())) for name, w in start.items()), HIDDEN, CONFIG, STEPS)
    theirs = {name: nn.Parameter(w.clone()) for name, w in start.items()}
    reference = torch.optim.Muon(theirs.values(), weight_decay=CONFIG.weight_decay)
    for step in range(8):
        for name, parameter in theirs.items():
            ours.parameters[name].grad = parameter.grad = tensors(1_000 + step)[name]
        ours.step(step)
        rate = CONFIG.muon_lr * rate_factor(step, CONFIG, STEPS)
        reference.param_groups[0].update(lr=rate, momentum=momentum_at(step, CONFIG, STEPS))
        reference.step()
    for name, parameter in theirs.items():
        moved = (parameter - start[name]).norm()
        assert (ours.parameters[name] - parameter).norm() < 1e-6 * moved


@pytest.mark.parametrize("shape", [(12, 12), (12, 50), (1, 9)], ids=str)
def test_orthogonalize_applies_polynomial_to_singular_values(shape: tuple[int, int]) -> None:
    """In float64: U p(S) V^T. Not U V^T, which five iterations do not reach."""
    a, b, c = COEFFICIENTS
    batch = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch[1] *= 1e-3
    found = orthogonalize(batch, torch.float64)
    for matrix, result in zip(batch, found, strict=True):
        u, s, vt = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        torch.testing.assert_close(result, u * s @ vt, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_orthogonalized_singular_values_near_1(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(5, 64, 64, generator=generator))[0] for _ in range(2))
    singular_values = torch.logspace(0, -math.log10(99), 64)  # condition 99
    found = torch.linalg.svdvals(orthogonalize(left * singular_values @ right, dtype).float())
    assert found.min() > 0.65
    assert found.max() < 1.25


def test_orthogonalize_zero_matrix() -> None:
    """As query, key and value gradients are while residual projections are zero."""
    assert not orthogonalize(torch.zeros(2, 4, 8), torch.bfloat16).any()


def test_momentum_warmup() -> None:
    config = replace(CONFIG, muon_momentum_start=0.85, muon_momentum=0.95, muon_momentum_warmup_steps=100)
    expected = {0: 0.85, 50: 0.90, 100: 0.95, 399: 0.95}
    assert {step: round(momentum_at(step, config, 400), 6) for step in expected} == expected
    assert round(momentum_at(5, config, 40), 6) == 0.90  # a quarter of the run at most
    assert momentum_at(0, replace(config, muon_momentum_warmup_steps=0), 400) == 0.95


# -- which parameters, and their decay --------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_weight_decay_with_zero_gradients(optimizer: str, decay_embeddings: bool) -> None:
    """With zero gradients only the decay is left, times each part's own rate."""
    config = replace(CONFIG, optimizer=optimizer, decay_embeddings=decay_embeddings, weight_decay=0.3)
    ours = make(config)
    for parameter in ours.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    ours.step(5)
    factor = rate_factor(5, config, STEPS)
    hidden = 1 - 0.3 * factor * (config.muon_lr if optimizer == "muon" else config.max_lr)
    embedding = 1 - 0.3 * factor * config.max_lr if decay_embeddings else 1.0
    expected = {**dict.fromkeys(MATRICES, hidden), "embedding.weight": embedding, "bias": 1.0}
    for name, before in tensors(0).items():
        torch.testing.assert_close(ours.parameters[name].detach(), before * expected[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_cautious_decay(optimizer: str) -> None:
    """It decays exactly the weights that the update without decay moves toward zero."""
    config = replace(CONFIG, optimizer=optimizer, weight_decay=0.3)
    plain, cautious = make(replace(config, weight_decay=0.0)), make(replace(config, cautious_decay=True))
    for step in range(3):
        for name, value in plain.parameters.items():  # the same start of every step
            cautious.parameters[name].data.copy_(value.data)
        before = {name: value.detach().clone() for name, value in plain.parameters.items()}
        update(plain, step)
        update(cautious, step)
        factor = rate_factor(step, config, STEPS)
        for name, old in before.items():
            rate = factor * (config.muon_lr if optimizer == "muon" and name in MATRICES else config.max_lr)
            toward_zero = (plain.parameters[name].detach() - old) * old <= 0
            decay = torch.where(toward_zero, 0.3 * rate * old, 0.0) if old.ndim == 2 else 0.0
            found, expected = cautious.parameters[name].detach(), plain.parameters[name].detach() - decay
            torch.testing.assert_close(found, expected, rtol=0, atol=3e-7)


MODEL = {"max_seq_len": 8, "d_model": 16, "n_layers": 2, "n_heads": 4, "d_ff": 24}


@by_model_kind
def test_hidden_matrices_are_block_weights(kind: dict[str, Any]) -> None:
    model = Transformer(ModelConfig(**MODEL, **kind))
    matrices = {name: p.shape[0] for name, p in model.blocks.named_parameters("blocks") if p.ndim == 2}
    assert {name: sum(rows) for name, rows in model.hidden_matrices().items()} == matrices


def test_fused_projections_are_several_matrices() -> None:
    found = Transformer(ModelConfig(**MODEL, n_kv_heads=2)).hidden_matrices()
    assert found["blocks.1.attention.qkv_proj.weight"] == (16, 8, 8)
    assert found["blocks.1.feed_forward.up_proj.weight"] == (24, 24)
    plain = Transformer(ModelConfig(**MODEL, activation="gelu")).hidden_matrices()
    assert plain["blocks.0.feed_forward.up_proj.weight"] == (24,)


def test_fused_matrices_match_split_updates() -> None:
    torch.manual_seed(0)
    sizes = (16, 8, 8)
    fused = nn.Parameter(torch.randn(32, 16))
    split = {str(i): nn.Parameter(part.clone()) for i, part in enumerate(fused.detach().split(sizes))}
    one = ScheduledOptimizer([("fused", fused)], {"fused": sizes}, CONFIG, STEPS)
    rows = {name: (part.shape[0],) for name, part in split.items()}
    other = ScheduledOptimizer(split.items(), rows, CONFIG, STEPS)
    for step in range(3):
        fused.grad = torch.randn(32, 16)
        for part, gradient in zip(split.values(), fused.grad.split(sizes), strict=True):
            part.grad = gradient.clone()
        one.step(step)
        other.step(step)
    assert torch.equal(fused.detach(), torch.cat([part.detach() for part in split.values()]))


# -- skipping, loss scales, state -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("updates", [0, 2])
def test_skip_leaves_state_unchanged(cautious: bool, value: float, updates: int) -> None:
    optimizer = make(replace(CONFIG, cautious_decay=cautious))
    for parameter in optimizer.parameters.values():
        parameter.data.view(-1)[0] = -0.0
    for step in range(updates):
        update(optimizer, step, skip=torch.tensor(0.0))
    before = snapshot(optimizer)
    for number, parameter in enumerate(optimizer.parameters.values()):
        parameter.grad = torch.randn_like(parameter)
        parameter.grad.view(-1)[number] = value
    optimizer.step(updates, skip=torch.tensor(1.0), grad_scale=torch.tensor(8.0))
    after = snapshot(optimizer)
    if not updates:  # there was no state yet
        assert not any(value.any() for name, value in after.items() if "/" in name)
        after = {name: value for name, value in after.items() if "/" not in name}
    assert_equal(after, before)


@pytest.mark.parametrize("options", [{"skip": torch.tensor(0.0)}, {"grad_scale": torch.tensor(1.0)}], ids=str)
@pytest.mark.parametrize("cautious", [False, True])
def test_zero_skip_and_unit_scale_are_noops(options: dict[str, Tensor], cautious: bool) -> None:
    one, other = (make(replace(CONFIG, cautious_decay=cautious)) for _ in range(2))
    for step in range(3):
        update(one, step)
        update(other, step, **options)
    assert_equal(snapshot(one), snapshot(other))


@by_optimizer
def test_gradients_are_unscaled(optimizer: str) -> None:
    config = replace(CONFIG, optimizer=optimizer, cautious_decay=True)
    plain, scaled = make(config), make(config)
    for step in range(3):
        update(plain, step)
        for name, gradient in tensors(1_000 + step).items():
            scaled.parameters[name].grad = gradient * 1_024
        scaled.step(step, grad_scale=torch.tensor(1_024.0))
    assert_equal(snapshot(plain), snapshot(scaled))


def test_state_dict_round_trip() -> None:
    """Saved after 3 updates and loaded into a new instance, in another order, 3 more give the same bits."""
    old = make()
    for step in range(3):
        update(old, step)
    state = old.state_dict()
    assert state.keys() == old.parameters.keys()
    assert all(state[name].keys() == {"momentum_buffer"} for name in MATRICES)
    assert state.keys() == old.zero_state().keys()
    weights = {name: nn.Parameter(p.detach().clone()) for name, p in old.parameters.items()}
    new = ScheduledOptimizer(reversed(weights.items()), HIDDEN, CONFIG, STEPS)
    new.load_state_dict(state)
    for step in range(3, 6):
        update(old, step)
        update(new, step)
    assert_equal(snapshot(new), snapshot(old))


def test_initial_state_dict_is_empty() -> None:
    assert make().state_dict() == {}


def test_missing_matrix_names_raise() -> None:
    with pytest.raises(AssertionError, match="names"):
        ScheduledOptimizer([("w", nn.Parameter(torch.ones(2, 2)))], {}, CONFIG, STEPS)
