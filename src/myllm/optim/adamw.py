"""AdamW with decay groups, a learning-rate schedule, and state that is saved by parameter name."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from myllm.config import OptimConfig

from .lr_schedule import learning_rate

ParameterState = dict[str, Tensor]
"""Optimizer state of one parameter: `step`, a float32 scalar, and the moments `exp_avg` and `exp_avg_sq`, each of the
parameter's shape and type."""


def zero_parameter_state(parameter: nn.Parameter) -> ParameterState:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }


class ScheduledAdamW:
    """AdamW (Loshchilov and Hutter 2019) whose learning rate is a function of the step.

    Weight decay applies to matrices, embeddings included, but not to vectors (biases, norms). The update is one fused
    kernel, which changes nothing if `skip` is set, so that a non-finite gradient is skipped without a synchronization.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, max_steps: int
    ) -> None:
        self._config, self._max_steps = config, max_steps
        self.parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        matrices = [p for p in self.parameters.values() if p.ndim >= 2]
        vectors = [p for p in self.parameters.values() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.max_lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    def rate(self, step: int) -> float:
        return learning_rate(step, self._config, self._max_steps)

    def step(self, step: int, skip: Tensor | None = None, grad_scale: Tensor | None = None) -> float:
        """Apply update number `step`, counted from 0, and return its learning rate.

        Args:
            skip: float32 scalar on the device; if it is not 0, nothing changes.
            grad_scale: factor by which the gradients are too large, a float32 scalar on the device.
        """
        rate = self.rate(step)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        # MPS's fused kernel ignored found_inf until pytorch/pytorch#186360, so there the host reads it and waits.
        if skip is not None and skip.device.type == "mps" and skip.item():
            return rate
        # The fused kernel reads both attributes; GradScaler unscales and skips in the same way.
        vars(self._adamw).update(found_inf=skip, grad_scale=grad_scale)
        self._adamw.step()
        return rate

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, ParameterState]:
        """The state of each parameter, by name. Empty before the first step."""
        return {name: dict(self._adamw.state[p]) for name, p in self.parameters.items() if self._adamw.state.get(p)}

    def zero_state(self) -> dict[str, ParameterState]:
        """`state_dict` of the first step, filled with zeros: the tensors that a checkpoint is read into."""
        return {name: zero_parameter_state(p) for name, p in self.parameters.items()}

    def load_state_dict(self, state: dict[str, ParameterState]) -> None:
        """
        Raises:
            ValueError: the names are not those of the parameters.
        """
        if state and state.keys() != self.parameters.keys():
            wrong = sorted(state.keys() ^ self.parameters.keys())[:5]
            raise ValueError(f"the optimizer state does not fit this model: {', '.join(wrong)}, ... are not in both")
        for name, parameter_state in state.items():
            parameter = self.parameters[name]
            self._adamw.state[parameter] = {
                key: value.to(parameter.device).clone() for key, value in parameter_state.items()
            }
