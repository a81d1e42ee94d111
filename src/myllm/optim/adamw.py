"""AdamW with decay groups, the schedule, and state that is saved by parameter name."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from myllm.config import OptimConfig

from .lr_schedule import learning_rate


class ScheduledAdamW:
    """AdamW (Loshchilov and Hutter 2019) whose rate follows the step.

    Matrices, embeddings included, decay; vectors (biases, norms) do not. The update is one fused kernel, which leaves
    everything as it was where `skip` is set, so that a non-finite gradient is kept out without asking the host.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, max_steps: int
    ) -> None:
        self._config, self._max_steps = config, max_steps
        self.parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        decayed = [p for p in self.parameters.values() if p.ndim >= 2]
        kept = [p for p in self.parameters.values() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
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
        """Update number `step`, counted from 0.

        Args:
            step: decides the rate.
            skip: a float32 scalar on the device; where it is not 0, nothing changes.
            grad_scale: what the gradients are too large by, a float32 scalar on the device; None: by nothing.

        Returns:
            the rate used.
        """
        rate = self.rate(step)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        # MPS's fused kernel ignored found_inf until pytorch/pytorch#186360: there the host asks, and waits.
        if skip is not None and skip.device.type == "mps" and skip.item():
            return rate
        # The fused kernel reads both; it is how GradScaler unscales and skips too.
        self._adamw.found_inf, self._adamw.grad_scale = skip, grad_scale
        self._adamw.step()
        return rate

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's moments and step counts, by parameter name. Empty before the first step."""
        return {name: dict(self._adamw.state[p]) for name, p in self.parameters.items() if self._adamw.state.get(p)}

    def zero_state(self) -> dict[str, dict[str, Tensor]]:
        """As `state_dict` after a step, but zeros: what a checkpoint is read into."""
        return {
            name: {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
            }
            for name, p in self.parameters.items()
        }

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: names that do not match this model's.
        """
        if state and state.keys() != self.parameters.keys():
            odd = sorted(state.keys() ^ self.parameters.keys())[:5]
            raise ValueError(f"the optimizer state does not fit this model: {', '.join(odd)}, ... are not in both")
        for name, parameter in self.parameters.items():
            if name in state:
                moved = {key: value.to(parameter.device).clone() for key, value in state[name].items()}
                self._adamw.state[parameter] = moved
