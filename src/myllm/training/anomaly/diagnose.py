"""What a step does inside the model: norms of weights, activations and gradients by layer, and each sample's loss.

Runs on the bare model, in training mode, so that dropout falls as it did in the step if the generators stand where they
stood then. Nothing is communicated: a rank that fails at it leaves no other waiting.

Shapes: B micro-batch, T sequence.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from myllm.model.cross_entropy import token_log_probs
from myllm.model.transformer import Transformer


@dataclass(frozen=True)
class LayerStats:
    """One module: its own weights, their gradient, and what came out of it over the whole step."""

    module: str
    weight_norm: float | None
    """None: it has no weights of its own."""
    gradient_norm: float | None
    activation_rms: float | None
    """None, as below: nothing passes through it by itself, such as the head, whose matrix alone is used."""
    activation_max: float | None
    input_finite: bool
    output_finite: bool


@dataclass(frozen=True)
class Diagnosis:
    """One step, or one rank's share of it."""

    losses: list[float]
    """By sample, in nats: the mean over its tokens."""
    input_gradients: list[float]
    """By sample: norm of the gradient that reaches its embedded tokens. Samples never meet in the model, so a number
    that goes bad in one's backward pass shows in that one alone."""
    loss: float
    """As the model gave it: the mean over the samples."""
    grad_norm: float
    """Before clipping; of the gradient of the mean over these samples."""
    layers: list[LayerStats]
    """In the order in which the model computes them."""
    bad_weights: list[str]
    """Weights that were not finite to begin with."""
    bad_gradients: list[str]
    first_bad_backward: str | None
    """The first module, in the order of the backward pass, at whose output the gradient was not finite."""

    @property
    def first_bad(self) -> LayerStats | None:
        """The first module whose output was not finite."""
        return next((layer for layer in self.layers if not layer.output_finite), None)


def diagnose(
    model: Transformer,
    batches: Iterable[tuple[Tensor, Tensor]],
    n_batches: int,
    autocast: Callable[[], AbstractContextManager],
) -> Diagnosis:
    """Forward and backward over micro-batches of one size; leaves the gradient of their mean loss in the parameters.

    Args:
        batches: inputs and targets, (B, T) each, on the model's device.
        n_batches: how many these are.
    """
    model.train()
    model.zero_grad(set_to_none=True)
    losses, loss = [], 0.0
    with model.uncompiled(), _watched(model) as seen:
        for tokens, targets in batches:
            with autocast():
                part = model(tokens, targets) / n_batches
                losses += _sample_losses(model, seen.last_hidden, targets).tolist()
            part.backward()
            loss += part.item()
    named = dict(model.named_parameters())
    norms = {name: parameter.grad.norm() for name, parameter in named.items() if parameter.grad is not None}
    return Diagnosis(
        losses=losses,
        input_gradients=torch.cat(seen.input_gradients).tolist(),
        loss=loss,
        grad_norm=torch.stack(list(norms.values())).norm().item(),
        layers=seen.layers(model),
        bad_weights=[name for name, parameter in named.items() if not parameter.isfinite().all()],
        bad_gradients=[name for name, norm in norms.items() if not norm.isfinite()],
        first_bad_backward=seen.first_bad_backward(),
    )


def _sample_losses(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """Each sample's mean loss, from the hidden states that the step's own loss came from.

    Shapes:
        hidden (B, T, D); targets (B, T); returns (B,)
    """
    scores, _ = token_log_probs(
        hidden.detach().flatten(0, 1), model.head_weight, targets.flatten(), model.config.vocab_size
    )
    return -scores.view_as(targets).mean(dim=1)


class _Seen:
    """What passed through each module, on the device until the step is over."""

    def __init__(self) -> None:
        self._figures: dict[str, list[Tensor]] = {}
        self._finite_backward: dict[str, list[Tensor]] = {}
        self.last_hidden: Tensor | None = None
        self.input_gradients: list[Tensor] = []
        """By micro-batch, (B,)."""

    @torch.no_grad()
    def note(self, name: str, given: Tensor, made: Tensor) -> None:
        made = made.float()
        largest = made.abs().amax()
        # Divided first: the square of a large number would overflow.
        rms = (made / largest.clamp_min(torch.finfo(torch.float32).tiny)).square().mean().sqrt() * largest
        figures = (rms, largest, given.isfinite().all().float(), made.isfinite().all().float())
        self._figures.setdefault(name, []).append(torch.stack(figures))

    def note_gradient(self, name: str, gradient: Tensor) -> None:
        self._finite_backward.setdefault(name, []).append(gradient.isfinite().all())
        if name == "embedding":
            self.input_gradients.append(gradient.float().flatten(1).norm(dim=1))

    def first_bad_backward(self) -> str | None:
        finite = {name: torch.stack(flags).all().item() for name, flags in self._finite_backward.items()}
        return next((name for name, sound in finite.items() if not sound), None)

    def layers(self, model: nn.Module) -> list[LayerStats]:
        modules = dict(model.named_modules())
        found = [_layer(name, modules[name], torch.stack(figures)) for name, figures in self._figures.items()]
        silent = [name for name, each in modules.items() if name not in self._figures and _own(each)]
        return found + [_layer(name, modules[name], None) for name in silent]


def _layer(name: str, module: nn.Module, figures: Tensor | None) -> LayerStats:
    """
    Shapes:
        figures (micro-batches, 4), as `_Seen.note` makes them
    """
    own = _own(module)
    norms = _norm(own), _norm([parameter.grad for parameter in own if parameter.grad is not None])
    if figures is None:
        return LayerStats(name, *norms, None, None, input_finite=True, output_finite=True)
    rms, largest, input_finite, output_finite = figures.cpu().double().unbind(dim=1)
    passed = rms.square().mean().sqrt().item(), largest.amax().item()
    return LayerStats(name, *norms, *passed, bool(input_finite.all()), bool(output_finite.all()))


def _own(module: nn.Module) -> list[nn.Parameter]:
    """Its own weights, not those of modules inside it."""
    return list(module.parameters(recurse=False))


def _norm(tensors: list[Tensor]) -> float | None:
    return torch.stack([tensor.detach().norm() for tensor in tensors]).norm().item() if tensors else None


@contextmanager
def _watched(model: Transformer) -> Iterator[_Seen]:
    """Note what every module takes and makes."""
    seen = _Seen()

    def noting(name: str) -> Callable[..., None]:
        def note(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            seen.note(name, given[0], made)
            if made.requires_grad:
                made.register_hook(partial(seen.note_gradient, name))
            if name == "norm":
                seen.last_hidden = made

        return note

    hooks = [
        module.register_forward_hook(noting(name))
        for name, module in model.named_modules()
        if name and not isinstance(module, nn.ModuleList | nn.Identity)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
