"""Decides on the device, without waiting for the host, whether an update is applied.

An update is skipped if the gradient is not finite or, optionally, if its norm is a spike: far above the running mean.
Once the run must stop, all later updates are skipped too. So weights and optimizer stay those before the step that
stopped it, until the host looks at the next log line or save and diagnoses that step.

The gradient norm is the same on all ranks, bit for bit, so all ranks reach the same decision without communication.

float16 has no numbers below 6e-8, and gradients are full of them. There the loss is multiplied by a scale and the
gradient divided by it: large, but small enough that nothing overflows. An overflow appears as a gradient that is not
finite. It skips the update and halves the scale; only at the smallest scale does it count as a bad number.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from myllm.checkpoint.rng import get_rng_state
from myllm.checkpoint.state import FIRST_LOSS_SCALE, SkipStats, TrainState
from myllm.config import TrainConfig
from myllm.data.sampler import DataPosition
from myllm.distributed.precision import needs_loss_scale

MEMORY_STEPS = 128
"""Time constant of the running statistics."""
WARMUP_STEPS = 64
"""Norms seen before one can count as a spike."""
MIN_DEVIATION = 0.05
"""Smallest standard deviation of the log norm: where the norm hardly varies, a few percent are not a spike."""

MIN_LOSS_SCALE, MAX_LOSS_SCALE = 1.0, 2.0**24
"""An overflow at the minimum is a bad number. It takes 16 overflows to get there from the first scale."""
GROWTH_STEPS = 2_000
"""After this many updates without an overflow the scale is doubled. Source: torch.amp.GradScaler, also for the factors
2 and 1/2: powers of two do not round."""

APPLIED, NONFINITE, SPIKE, FROZEN, OVERFLOW = range(5)
SkipKind = Literal["nonfinite", "spike", "overflow"]
SKIP_KINDS: dict[int, SkipKind] = {NONFINITE: "nonfinite", SPIKE: "spike", OVERFLOW: "overflow"}


@dataclass(frozen=True)
class SkippedStep:
    """A step whose update was skipped, and what it takes to repeat it."""

    step: int
    """Counted from 1."""
    kind: SkipKind
    grad_norm: float
    data: DataPosition
    """Before the step."""
    random: dict[str, Tensor]
    """This rank's random state before the step."""


@dataclass
class PendingStep:
    """A step whose decision the host has not read."""

    step: int
    data: DataPosition
    random: dict[str, Tensor]
    verdict: Tensor = field(init=False)
    """Like the norm, known once the step is checked."""
    grad_norm: Tensor = field(init=False)


class GradientGuard:
    """Decides on each update, counts skipped ones, and keeps what it takes to repeat their steps."""

    def __init__(self, config: TrainConfig, device: torch.device, skips: SkipStats | None = None) -> None:
        self._config, self._device = config, device
        self._skips = skips or SkipStats()
        self._pending: list[PendingStep] = []
        self.skipped: list[SkippedStep] = []
        """Found by `sync`; the caller reports and removes them."""
        self.diverged = False
        """The last of them ends the run."""
        self._scales = needs_loss_scale(config.precision, device)
        start = self._skips
        if not self._scales:  # a run that was in float16 has no scale now
            start = replace(start, overflows=0, loss_scale=FIRST_LOSS_SCALE, steps_at_scale=0)
        # The fields of SkipStats as scalars on the device, int64 or float32.
        self._stats = SimpleNamespace(**{
            name: torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else torch.int64, device=device)
            for name, value in asdict(start).items()
        })  # fmt: skip
        self._frozen = torch.zeros((), dtype=torch.bool, device=device)

    @property
    def loss_scale(self) -> Tensor | None:
        """For the current step: a float32 scalar on the device; None: no scale."""
        return self._stats.loss_scale if self._scales else None

    def record(self, state: TrainState) -> None:
        """Keep the state before the next step. Takes a few microseconds on the host and nothing on the device."""
        self._pending.append(PendingStep(state.step + 1, state.data, get_rng_state(self._device)))

    @torch.no_grad()
    def check(self, grad_norm: Tensor) -> Tensor:
        """Decide on the update of the recorded step.

        The verdict depends on the state before the step, and the new state on the verdict. The run stops once
        `consecutive` is above max_skipped_steps, and at NONFINITE with on_nonfinite "stop".

            before   gradient                           verdict    counted              consecutive
            running  finite                             APPLIED    norm_count           0
            running  finite, norm above the ceiling     SPIKE      norm_count, spikes   + 1
            running  not finite, scale not its minimum  OVERFLOW   overflows            stays
            running  not finite otherwise               NONFINITE  nonfinite            + 1
            stopped  any                                FROZEN     nothing              stays

        Args:
            grad_norm: before clipping and without the loss scale; the same on every rank.

        Returns:
            1 to skip the update, 0 to apply it: a float32 scalar on the device.
        """
        stats, finite = self._stats, grad_norm.isfinite()
        log_norm = grad_norm.float().clamp_min(torch.finfo(torch.float32).tiny).log()
        ceiling = self._ceiling()
        may_halve = (stats.loss_scale > MIN_LOSS_SCALE) & self._scales
        verdict = torch.where(
            finite, torch.where(log_norm > ceiling, SPIKE, APPLIED), torch.where(may_halve, OVERFLOW, NONFINITE)
        )
        verdict = torch.where(self._frozen, FROZEN, verdict)
        self._pending[-1].verdict, self._pending[-1].grad_norm = verdict, grad_norm
        stats.nonfinite = stats.nonfinite + (verdict == NONFINITE)
        stats.spikes = stats.spikes + (verdict == SPIKE)
        stats.overflows = stats.overflows + (verdict == OVERFLOW)
        # A spike enters the statistics as the ceiling: a single one hardly moves them, but they follow a norm that has
        # risen for good.
        self._add_norm(torch.minimum(log_norm, ceiling), (verdict == APPLIED) | (verdict == SPIKE))
        one_more = torch.where((verdict == NONFINITE) | (verdict == SPIKE), stats.consecutive + 1, stats.consecutive)
        stats.consecutive = torch.where(verdict == APPLIED, 0, one_more)
        if self._scales:
            self._rescale(verdict)
        self._frozen = self._frozen | (stats.consecutive > self._config.max_skipped_steps)
        if self._config.on_nonfinite == "stop":
            self._frozen = self._frozen | (verdict == NONFINITE)
        return (verdict != APPLIED).float()

    def _ceiling(self) -> Tensor:
        """A log norm above this is a spike: infinite if spikes are applied, or too few norms are known."""
        stats, sigma = self._stats, self._config.skip_spikes_sigma
        known = stats.norm_count >= WARMUP_STEPS if sigma is not None else torch.zeros_like(self._frozen)
        deviation = stats.log_norm_variance.sqrt().clamp_min(MIN_DEVIATION)
        return torch.where(known, stats.log_norm_mean + (sigma or 0.0) * deviation, math.inf)

    def _add_norm(self, log_norm: Tensor, counts: Tensor) -> None:
        """Add a norm: to a plain mean and variance at first, to exponentially weighted ones later.

        Source: West 1979, "Updating mean and variance estimates: an improved method", with weights that decay.
        """
        stats = self._stats
        weight = (1 / (stats.norm_count + 1)).clamp_min(1 / MEMORY_STEPS)
        difference = torch.where(counts, log_norm - stats.log_norm_mean, 0.0)
        stats.log_norm_mean = stats.log_norm_mean + weight * difference
        variance = (1 - weight) * (stats.log_norm_variance + weight * difference.square())
        stats.log_norm_variance = torch.where(counts, variance, stats.log_norm_variance)
        stats.norm_count = stats.norm_count + counts

    def _rescale(self, verdict: Tensor) -> None:
        """Halve the loss scale at an overflow, double it after GROWTH_STEPS updates without one."""
        stats, finite = self._stats, (verdict == APPLIED) | (verdict == SPIKE)
        steps = torch.where(finite, stats.steps_at_scale + 1, 0)
        grows = steps >= GROWTH_STEPS
        factor = torch.where(verdict == OVERFLOW, 0.5, torch.where(grows, 2.0, 1.0))
        scale = (stats.loss_scale * factor).clamp(MIN_LOSS_SCALE, MAX_LOSS_SCALE)
        running = verdict != FROZEN
        stats.loss_scale = torch.where(running, scale, stats.loss_scale)
        stats.steps_at_scale = torch.where(running, torch.where(grows, 0, steps), stats.steps_at_scale)

    def sync(self) -> SkipStats:
        """Read the decisions since the last call from the device, and update `skipped` and `diverged`."""
        if not self._pending:
            return self._skips
        pending, self._pending = self._pending, []
        verdicts = torch.stack([step.verdict for step in pending]).tolist()
        numbers: dict[str, Any] = {}
        for dtype in (torch.int64, torch.float32):  # one read from the device each
            scalars = {name: scalar for name, scalar in vars(self._stats).items() if scalar.dtype == dtype}
            numbers |= zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True)
        self._skips = replace(self._skips, **numbers)
        self.diverged = bool(self._frozen)
        for step, verdict in zip(pending, verdicts, strict=True):
            if kind := SKIP_KINDS.get(verdict):
                self.skipped.append(SkippedStep(step.step, kind, step.grad_norm.item(), step.data, step.random))
        return self._skips
