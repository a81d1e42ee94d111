"""AdamW: torch's fused kernel, whose rate follows the schedule."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from myllm.config import OptimConfig

from .lr_schedule import learning_rate
from .ranks import local

ParameterState = dict[str, Tensor]
"""Optimizer state of one parameter, by torch's names."""


class AdamW:
    """AdamW (Loshchilov and Hutter 2019).

    The update is one fused kernel, which changes nothing if `skip` is set, so that a non-finite gradient is skipped
    without a synchronization.

    State of a parameter: `step`, a float32 scalar, and the moments `exp_avg` and `exp_avg_sq`, each of its shape and
    type.
    """

    def __init__(
        self,
        decayed: Mapping[str, nn.Parameter],
        not_decayed: Mapping[str, nn.Parameter],
        config: OptimConfig,
        max_steps: int,
    ) -> None:
        self.parameters = {**decayed, **not_decayed}
        self._config, self._max_steps = config, max_steps
        # The kernel decays before it updates; cautious decay does the same in its place.
        self._cautiously_decayed = list(decayed.values()) if config.cautious_decay else []
        decay = 0.0 if config.cautious_decay else config.weight_decay
        self._adamw = torch.optim.AdamW(
            [
                {"params": list(decayed.values()), "weight_decay": decay},
                {"params": list(not_decayed.values()), "weight_decay": 0.0},
            ],
            lr=config.max_lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    def step(self, step: int, skip: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
        """As `ScheduledOptimizer.step`."""
        rate = learning_rate(step, self._config, self._max_steps)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        # MPS's fused kernel ignored both until pytorch/pytorch#186360: the host reads one and waits, and divides by the
        # other here.
        if skip is not None and _is_mps(skip) and skip.item():
            return
        if grad_scale is not None and _is_mps(grad_scale):
            for parameter in self.parameters.values():
                assert parameter.grad is not None
                parameter.grad.div_(grad_scale)
            grad_scale = None
        self._decay_cautiously(rate * self._config.weight_decay, skip, grad_scale)
        # The fused kernel reads both attributes; GradScaler unscales and skips in the same way.
        vars(self._adamw).update(found_inf=skip, grad_scale=grad_scale)
        self._adamw.step()

    @torch.no_grad()
    def _decay_cautiously(self, decay: float, skip: Tensor | None, grad_scale: Tensor | None) -> None:
        """Multiply the weights whose first moment has their sign by 1 - decay: the update moves them toward zero.

        Source: Chen et al. 2025 (arXiv 2510.12402), algorithm 1.
        """
        for parameter in self._cautiously_decayed:
            assert parameter.grad is not None
            weight, gradient = local(parameter), local(parameter.grad)
            if grad_scale is not None:
                gradient = gradient / grad_scale
            state = self._adamw.state.get(parameter)
            first_moment = local(state["exp_avg"]).lerp(gradient, 1 - self._config.beta1) if state else gradient
            aligned = first_moment * weight >= 0
            if skip is not None:
                aligned &= skip == 0
            weight.mul_(torch.where(aligned, 1 - decay, 1.0))

    def state_dict(self) -> dict[str, ParameterState]:
        return {name: dict(self._adamw.state[p]) for name, p in self.parameters.items() if self._adamw.state.get(p)}

    def zero_state(self) -> dict[str, ParameterState]:
        return {
            name: {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
            for name, parameter in self.parameters.items()
        }

    def load_parameter_state(self, name: str, state: ParameterState) -> None:
        self._adamw.state[self.parameters[name]] = state


def _is_mps(tensor: Tensor) -> bool:
    return tensor.device.type == "mps"
