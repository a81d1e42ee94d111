"""Muon: momentum whose matrices are orthogonalized before they are applied.

Shapes: N matrices of a batch; R, C rows and columns of a matrix; S, L its smaller and its larger side.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
(kellerjordan.github.io/posts/muon). torch.optim.Muon (torch/optim/_muon.py) makes the same update, matrix by matrix.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from myllm.config import OptimConfig
from myllm.planning.length import momentum_warmup_steps

from .adamw import ParameterState
from .lr_schedule import rate_factor
from .ranks import Matrix, Replicas, Shards, cut, local

ITERATIONS = 5
COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the polynomial a s + b s^3 + c s^5, which the iteration applies to every singular value. Chosen for a steep start
at 0; so values end between 0.7 and 1.2 and not at 1, which training does not notice. Source: Jordan et al. 2024."""
EPS = 1e-7
"""Smallest norm that a matrix is divided by."""


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Move the singular values of each matrix near 1: Newton-Schulz iteration, in `dtype`. A zero matrix stays zero.

    Shapes:
        matrices (N, S, L); returns (N, S, L), in `dtype`
    """
    a, b, c = COEFFICIENTS
    # The Frobenius norm bounds the largest singular value, which must be at most 1.
    x = (matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(EPS)).to(dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT  # (N, S, S)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def iteration_dtype(device: torch.device) -> torch.dtype:
    """The type that the iteration is fastest in; its precision does not matter.

    On a CPU with AVX512-BF16, bfloat16 is 2 to 10 times as fast as float32 for matrices of 64 and more rows
    (docs/experiments/muon.md); on other CPUs torch emulates it.
    """
    if device.type == "cuda":
        # Before Ampere, bfloat16 is emulated. Values are at most about 1, so that float16 does not overflow.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16"):
        return torch.bfloat16
    return torch.float32


def update_scale(rows: int, columns: int, scale: Literal["original", "match_rms_adamw"]) -> float:
    """Factor on an orthogonal update, so that one rate suits matrices of all shapes.

    Source: original, Jordan et al. 2024; match_rms_adamw, Liu et al. 2025 (arXiv 2502.16982), equation 4.
    """
    if scale == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def momentum_at(step: int, config: OptimConfig, max_steps: int) -> float:
    """The momentum of update number `step`, counted from 0: rises linearly, then stays.

    Source: modded-nanogpt, records/track_1_short/2024-11-06_ShortcutsTweaks.
    """
    warmup = momentum_warmup_steps(config, max_steps)
    progress = min(step / warmup, 1.0) if warmup else 1.0
    return (1 - progress) * config.muon_momentum_start + progress * config.muon_momentum


class Muon:
    """Muon with Nesterov momentum and decoupled weight decay, in batches of matrices of the same shape.

    State of a parameter: `momentum_buffer`, of its shape and type.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        row_sizes: Mapping[str, tuple[int, ...]],
        config: OptimConfig,
        max_steps: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            row_sizes: by parameter name, the rows of the matrices that the parameter consists of.
            group: ranks that have the same parameters and share the work. None: this process alone, or FSDP2.
        """
        self.parameters = dict(parameters)
        self._config, self._max_steps = config, max_steps
        self._momentum: dict[str, Tensor] = {}
        self._batches: dict[tuple[int, int], list[Matrix]] = defaultdict(list)
        for name, parameter in self.parameters.items():
            for matrix in cut(name, parameter.shape, row_sizes[name]):
                small, large = sorted((matrix.n_rows, matrix.columns))
                self._batches[small, large].append(matrix)
        first = next(iter(self.parameters.values()))
        self._ranks = Shards(first) if isinstance(first, DTensor) else Replicas(group)

    @torch.no_grad()
    def step(self, step: int, skip: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
        config, max_steps = self._config, self._max_steps
        rate = config.muon_lr * rate_factor(step, config, max_steps)
        momentum = momentum_at(step, config, max_steps)
        skipped = None if skip is None else skip != 0
        for name, parameter in self.parameters.items():
            if name not in self._momentum:
                self._momentum[name] = torch.zeros_like(parameter, requires_grad=False)
            assert parameter.grad is not None
            gradient, buffer = local(parameter.grad), local(self._momentum[name])
            if grad_scale is not None:
                gradient.div_(grad_scale)
            following = buffer.lerp(gradient, 1 - momentum)
            # Not a factor of 0, which would leave NaN.
            buffer.copy_(following if skipped is None else torch.where(skipped, buffer, following))
        arriving = []
        for matrices in self._batches.values():
            directions = self._ranks.to_owners(matrices, partial(self._direction, momentum))
            if skipped is not None:
                directions = torch.where(skipped, 0.0, directions)  # and so is their update, exactly
            updates = orthogonalize(directions, iteration_dtype(directions.device))
            arriving.append((matrices, self._ranks.from_owners(matrices, updates)))
        for matrices, wait in arriving:
            for matrix, update in zip(matrices, wait(), strict=True):
                self._apply(matrix, update, rate, skipped)

    def _direction(self, momentum: float, matrix: Matrix) -> Tensor:
        """This rank's rows of Nesterov's direction: the gradient, ahead of the momentum by one step."""
        gradient, rows = self.parameters[matrix.parameter].grad, self._ranks.rows(matrix)
        assert gradient is not None
        return local(gradient)[rows].lerp(local(self._momentum[matrix.parameter])[rows], momentum)

    def _apply(self, matrix: Matrix, update: Tensor, rate: float, skipped: Tensor | None) -> None:
        """Decay this rank's rows of a matrix, then update them. The decay takes the rate without the update's scale."""
        weight = local(self.parameters[matrix.parameter])[self._ranks.rows(matrix)]
        kept: float | Tensor = 1 - rate * self._config.weight_decay
        if skipped is not None:
            kept = torch.where(skipped, 1.0, kept)
        if self._config.cautious_decay:
            kept = torch.where(update * weight >= 0, kept, 1.0)
        weight.mul_(kept)
        weight.add_(update, alpha=-rate * update_scale(matrix.n_rows, matrix.columns, self._config.muon_scale))

    def state_dict(self) -> dict[str, ParameterState]:
        return {name: {"momentum_buffer": buffer} for name, buffer in self._momentum.items()}

    def zero_state(self) -> dict[str, ParameterState]:
        return {
            name: {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}
            for name, parameter in self.parameters.items()
        }

    def load_parameter_state(self, name: str, state: ParameterState) -> None:
        self._momentum[name] = state["momentum_buffer"]
