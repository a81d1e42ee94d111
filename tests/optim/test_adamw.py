"""AdamW against a hand-written float64 one; skipping; state by name."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from myllm.config import OptimConfig
from myllm.optim import adamw
from myllm.optim.lr_schedule import learning_rate
from myllm.optim.optimizer import ScheduledOptimizer

CONFIG = OptimConfig(max_lr=0.02, warmup_steps=3, schedule="linear", weight_decay=0.1, beta1=0.9, beta2=0.95)
SHAPES = {"embedding.weight": (7, 4), "proj.weight": (4, 5), "proj.bias": (5,), "norm.weight": (4,)}


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1_000 + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def update(optimizer: ScheduledOptimizer, step: int, skip: torch.Tensor | None = None) -> float:
    for name, grad in gradients(step).items():
        optimizer.parameters[name].grad = grad
    rate = optimizer.step(step, skip)
    optimizer.zero_grad()
    return rate


class OnMPS:
    """A verdict on a device that is not here."""

    def __init__(self, value: float) -> None:
        self.device, self._value = torch.device("mps"), value

    def item(self) -> float:
        return self._value

    def to(self, *where: object, **how: object) -> torch.Tensor:
        return torch.zeros(())  # as if the kernel ignored it


def test_mps_skip_leaves_state_unchanged() -> None:
    """Its kernel makes the update whatever it is told."""
    optimizer = ScheduledOptimizer(parameters().items(), {}, CONFIG, 20)
    update(optimizer, 0)
    before = snapshot(optimizer)
    for name, grad in gradients(1).items():
        optimizer.parameters[name].grad = grad * torch.nan
    assert optimizer.step(1, OnMPS(1.0)) == optimizer.rate(1)
    after = snapshot(optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, cautious_decay=True)], ids=["plain", "cautious"])
def test_mps_gradients_lose_their_scale(config: OptimConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel takes them as they are."""
    expected, optimizer = (ScheduledOptimizer(parameters().items(), {}, config, 20) for _ in range(2))
    for step in range(3):
        update(expected, step)
    fused = torch._fused_adamw_
    without = {"grad_scale": None, "found_inf": None}
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *tensors, **settings: fused(*tensors, **(settings | without)))
    monkeypatch.setattr(adamw, "_is_mps", lambda tensor: True)
    for step, scale in enumerate((1_024.0, 512.0, 512.0)):  # powers of two do not round
        for name, grad in gradients(step).items():
            optimizer.parameters[name].grad = grad * scale
        optimizer.step(step, torch.zeros(()), torch.tensor(scale))
    assert_equal(snapshot(optimizer), snapshot(expected))


def snapshot(optimizer: ScheduledOptimizer) -> dict[str, torch.Tensor]:
    """Everything that an update may change, as copies."""
    state = {
        f"{name}/{key}": value.clone()
        for name, moments in optimizer.state_dict().items()
        for key, value in moments.items()
    }
    return state | {name: p.detach().clone() for name, p in optimizer.parameters.items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, weight_decay=0.0), replace(CONFIG, eps=1e-2)], ids=str)
def test_updates_match_float64_adamw(config):
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""
    ours = parameters()
    optimizer = ScheduledOptimizer(ours.items(), {}, config, max_steps=10)
    theta = {name: p.detach().double() for name, p in parameters().items()}
    m = {name: torch.zeros_like(p) for name, p in theta.items()}
    v = {name: torch.zeros_like(p) for name, p in theta.items()}
    for step in range(10):
        rate = update(optimizer, step)
        assert rate == learning_rate(step, config, 10)
        for name, grad in gradients(step).items():
            g = grad.double()
            decay = config.weight_decay if theta[name].ndim == 2 else 0.0  # vectors never decay
            m[name] = config.beta1 * m[name] + (1 - config.beta1) * g
            v[name] = config.beta2 * v[name] + (1 - config.beta2) * g**2
            m_hat = m[name] / (1 - config.beta1 ** (step + 1))
            v_hat = v[name] / (1 - config.beta2 ** (step + 1))
            theta[name] = theta[name] - rate * (m_hat / (v_hat.sqrt() + config.eps) + decay * theta[name])
        for name, p in ours.items():
            torch.testing.assert_close(p.detach().double(), theta[name], rtol=1e-5, atol=1e-6, msg=f"{name} at {step}")


def test_weight_decay_with_zero_gradients():
    """With no gradient to speak of, matrices shrink by the rate times the decay, vectors stay."""
    ours, before = parameters(), parameters()
    optimizer = ScheduledOptimizer(ours.items(), {}, replace(CONFIG, warmup_steps=0), max_steps=10)
    for p in ours.values():
        p.grad = torch.zeros_like(p)
    optimizer.step(0)
    for name, p in ours.items():
        shrunk = 1 - 0.02 * 0.1 if p.ndim == 2 else 1
        torch.testing.assert_close(p.detach(), before[name].detach() * shrunk, rtol=1e-6, atol=0)


def test_skip_leaves_state_unchanged():
    optimizer = ScheduledOptimizer(parameters().items(), {}, CONFIG, max_steps=10)
    update(optimizer, 0, skip=torch.tensor(0.0))
    before = snapshot(optimizer)
    assert len(before) == 4 * len(SHAPES)  # two moments, a step count, and the weights
    for p in optimizer.parameters.values():
        p.grad = torch.full_like(p, math.nan)
    optimizer.step(1, skip=torch.tensor(1.0))
    optimizer.zero_grad()
    assert_equal(snapshot(optimizer), before)
    update(optimizer, 2, skip=torch.tensor(0.0))
    assert not torch.equal(snapshot(optimizer)["proj.weight"], before["proj.weight"])
    assert snapshot(optimizer)["proj.weight/step"] == 2


def test_skip_first_step():
    optimizer = ScheduledOptimizer(parameters().items(), {}, CONFIG, max_steps=10)
    for p in optimizer.parameters.values():
        p.grad = torch.full_like(p, math.inf)
    optimizer.step(0, skip=torch.tensor(1.0))
    for name, value in snapshot(optimizer).items():
        if "/" in name:
            assert not value.any(), name
        else:
            assert torch.equal(value, parameters()[name])


def test_zero_skip_equals_no_skip():
    one, other = (ScheduledOptimizer(parameters().items(), {}, CONFIG, max_steps=10) for _ in range(2))
    for step in range(3):
        update(one, step)
        update(other, step, skip=torch.tensor(0.0))
    assert_equal(snapshot(one), snapshot(other))


def test_state_dict_round_trip():
    """Saved after 3 updates and loaded into a new instance, 3 more give the same bits."""
    old = ScheduledOptimizer(parameters().items(), {}, CONFIG, max_steps=10)
    for step in range(3):
        update(old, step)
    weights = {name: nn.Parameter(p.detach().clone()) for name, p in old.parameters.items()}
    # Listed in another order: names decide, not places.
    new = ScheduledOptimizer(reversed(weights.items()), {}, CONFIG, max_steps=10)
    new.load_state_dict(old.state_dict())
    assert_equal(snapshot(new), snapshot(old))
    for step in range(3, 6):
        update(old, step)
        update(new, step)
        assert_equal(snapshot(new), snapshot(old))


def test_load_state_dict_copies():
    """Training on must not change what was loaded, which may be somebody else's."""
    old = ScheduledOptimizer(parameters().items(), {}, CONFIG, max_steps=10)
    update(old, 0)
    saved = old.state_dict()
    before = snapshot(old)
    new = ScheduledOptimizer(parameters().items(), {}, CONFIG, max_steps=10)
    new.load_state_dict(saved)
    update(new, 1)
    assert_equal(snapshot(old), before)


def test_initial_state_dict_is_empty():
    optimizer = ScheduledOptimizer(parameters().items(), {}, CONFIG, max_steps=10)
    assert optimizer.state_dict() == {}
    optimizer.load_state_dict({})
    update(optimizer, 0)


@pytest.mark.parametrize("change", ["missing", "renamed", "extra"])
def test_mismatched_state_names_raise(change):
    optimizer = ScheduledOptimizer(parameters().items(), {}, CONFIG, max_steps=10)
    update(optimizer, 0)
    state = optimizer.state_dict()
    if change != "extra":
        entry = state.pop("proj.bias")
    if change != "missing":
        state["other.bias"] = entry if change == "renamed" else state["proj.bias"]
    with pytest.raises(ValueError, match=r"other\.bias|proj\.bias"):
        optimizer.load_state_dict(state)


def test_frozen_parameters_are_ignored():
    mixed = parameters()
    mixed["norm.weight"].requires_grad_(False)
    optimizer = ScheduledOptimizer(mixed.items(), {}, CONFIG, max_steps=10)
    assert "norm.weight" not in optimizer.parameters


def test_only_vectors_or_only_matrices():
    for names in (["proj.bias"], ["proj.weight"]):
        chosen = {name: parameters()[name] for name in names}
        optimizer = ScheduledOptimizer(chosen.items(), {}, CONFIG, max_steps=10)
        parameter = chosen[names[0]]
        before, parameter.grad = parameter.detach().clone(), torch.ones_like(parameter)
        optimizer.step(0)
        assert (parameter < before).all(), "against the gradient"
