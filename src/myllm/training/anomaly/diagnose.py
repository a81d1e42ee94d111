"""Statistics of one training step: norms of weights, gradients and activations by layer, and each sample's loss.

The unwrapped model runs in training mode, so dropout repeats if the random generators are restored first. Ranks do not
communicate here: one that fails leaves no other waiting.

Shapes: B micro-batch, T sequence, D d_model.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from myllm.model.cross_entropy import token_log_probs
from myllm.model.transformer import Transformer


@dataclass(frozen=True)
class LayerStats:
    """One module: its own weights, their gradient, and its output over the whole step."""

    module: str
    weight_norm: float | None
    """None: it has no weights of its own."""
    gradient_norm: float | None
    activation_rms: float | None
    """None, as below: the module is never called, like the head, of which only the matrix is used."""
    activation_max: float | None
    input_finite: bool
    output_finite: bool


@dataclass(frozen=True)
class Diagnosis:
    """One step, or one rank's share of it."""

    losses: list[float]
    """By sample, in nats: the mean over its tokens."""
    input_gradient_norms: list[float]
    """By sample: norm of the gradient at its embedded tokens. Samples are independent in the model, so a number that is
    not finite in the backward pass of one sample shows up in that sample only."""
    loss: float
    """The model's own: the mean over the samples."""
    grad_norm: float
    """Before clipping; of the gradient of the mean over these samples."""
    layers: list[LayerStats]
    """In the order of computation."""
    nonfinite_weights: list[str]
    """Before the step."""
    nonfinite_gradients: list[str]
    first_nonfinite_backward: str | None
    """The first module, in the order of the backward pass, with a gradient of its output that is not finite."""

    @property
    def first_nonfinite(self) -> LayerStats | None:
        """The first module with an output that is not finite."""
        return next((layer for layer in self.layers if not layer.output_finite), None)


def diagnose(
    model: Transformer,
    batches: Iterable[tuple[Tensor, Tensor]],
    n_batches: int,
    autocast: Callable[[], AbstractContextManager],
) -> Diagnosis:
    """Forward and backward over micro-batches of one size. Leaves the gradient of their mean loss in the parameters.

    Args:
        batches: inputs and targets, (B, T) each, on the model's device.
    """
    model.train()
    model.zero_grad(set_to_none=True)
    losses, loss = [], 0.0
    with torch.compiler.set_stance("force_eager"), _recording(model) as recorder:  # hooks see each operation
        for tokens, targets in batches:
            with autocast():
                batch_loss = model(tokens, targets) / n_batches
                assert recorder.last_hidden is not None  # the forward pass sets it
                losses += _sample_losses(model, recorder.last_hidden, targets).tolist()
            batch_loss.backward()
            loss += batch_loss.item()
    parameters = dict(model.named_parameters())
    norms = {name: parameter.grad.norm() for name, parameter in parameters.items() if parameter.grad is not None}
    return Diagnosis(
        losses=losses,
        input_gradient_norms=torch.cat(recorder.input_gradient_norms).tolist(),
        loss=loss,
        grad_norm=torch.stack(list(norms.values())).norm().item(),
        layers=recorder.layer_stats(model),
        nonfinite_weights=[name for name, parameter in parameters.items() if not parameter.isfinite().all()],
        nonfinite_gradients=[name for name, norm in norms.items() if not norm.isfinite()],
        first_nonfinite_backward=recorder.first_nonfinite_backward(),
    )


def _sample_losses(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """Each sample's mean loss, from the hidden states of the step's own forward pass.

    Shapes:
        hidden (B, T, D); targets (B, T); returns (B,)
    """
    scores = token_log_probs(
        hidden.detach().flatten(0, 1), model.head_weight, targets.flatten(), model.config.vocab_size
    )
    return -scores.view_as(targets).mean(dim=1)


class _Recorder:
    """Statistics of every module's inputs, outputs and gradients, on the device until the step is over."""

    def __init__(self) -> None:
        self._outputs: dict[str, list[Tensor]] = {}
        """By module: (4,) for each micro-batch: root mean square, largest, whether input and output were finite."""
        self._finite_gradients: dict[str, list[Tensor]] = {}
        self.last_hidden: Tensor | None = None
        self.input_gradient_norms: list[Tensor] = []
        """By micro-batch, (B,)."""

    def forward_hook(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        with torch.no_grad():
            values = output.float()
            largest = values.abs().amax()
            # Divide first: the square of a large number would overflow.
            rms = (values / largest.clamp_min(torch.finfo(torch.float32).tiny)).square().mean().sqrt() * largest
            finite = inputs[0].isfinite().all().float(), values.isfinite().all().float()
            self._outputs.setdefault(name, []).append(torch.stack((rms, largest, *finite)))
        if output.requires_grad:
            output.register_hook(partial(self._gradient_hook, name))
        if name == "norm":
            self.last_hidden = output

    def _gradient_hook(self, name: str, gradient: Tensor) -> None:
        self._finite_gradients.setdefault(name, []).append(gradient.isfinite().all())
        if name == "embedding":
            self.input_gradient_norms.append(gradient.float().flatten(1).norm(dim=1))

    def first_nonfinite_backward(self) -> str | None:
        return next((name for name, flags in self._finite_gradients.items() if not torch.stack(flags).all()), None)

    def layer_stats(self, model: nn.Module) -> list[LayerStats]:
        modules = dict(model.named_modules())
        called = [_layer_stats(name, modules[name], torch.stack(rows)) for name, rows in self._outputs.items()]
        uncalled = [name for name in modules if name not in self._outputs and _own_parameters(modules[name])]
        return called + [_layer_stats(name, modules[name], None) for name in uncalled]


def _layer_stats(name: str, module: nn.Module, outputs: Tensor | None) -> LayerStats:
    """
    Shapes:
        outputs (micro-batches, 4), as `_Recorder` has them
    """
    parameters = _own_parameters(module)
    norms = _norm(parameters), _norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if outputs is None:
        return LayerStats(name, *norms, None, None, input_finite=True, output_finite=True)
    rms, largest, input_finite, output_finite = outputs.cpu().double().unbind(dim=1)
    activations = rms.square().mean().sqrt().item(), largest.amax().item()
    return LayerStats(name, *norms, *activations, bool(input_finite.all()), bool(output_finite.all()))


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _norm(tensors: Sequence[Tensor]) -> float | None:
    return torch.stack([tensor.detach().norm() for tensor in tensors]).norm().item() if tensors else None


@contextmanager
def _recording(model: Transformer) -> Iterator[_Recorder]:
    recorder = _Recorder()
    hooks = [
        module.register_forward_hook(partial(recorder.forward_hook, name))
        for name, module in model.named_modules()
        if name and not isinstance(module, nn.ModuleList | nn.Identity)
    ]
    try:
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()
