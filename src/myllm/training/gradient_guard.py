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
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from myllm.checkpoint.rng import get_rng_state
from myllm.checkpoint.state import SkipStats, TrainState
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
        counts = (self._skips.nonfinite, self._skips.spikes, self._skips.consecutive, self._skips.norm_count)
        self._nonfinite, self._spikes, self._consecutive, self._norm_count = torch.tensor(
            counts, device=device
        ).unbind()
        numbers = (self._skips.log_norm_mean, self._skips.log_norm_variance)
        self._mean, self._variance = torch.tensor(numbers, dtype=torch.float32, device=device).unbind()
        self._frozen = torch.zeros((), dtype=torch.bool, device=device)
        self._overflows, self._steps_at_scale = torch.tensor(
            (self._skips.overflows, self._skips.steps_at_scale), device=device
        ).unbind()
        self._scale = torch.tensor(self._skips.loss_scale, dtype=torch.float32, device=device)
        self._scales = needs_loss_scale(config.precision, device)

    @property
    def loss_scale(self) -> Tensor | None:
        """For the current step: a float32 scalar on the device; None: no scale."""
        return self._scale if self._scales else None

    def record(self, state: TrainState) -> None:
        """Keep the state before the next step. Takes a few microseconds on the host and nothing on the device."""
        self._pending.append(PendingStep(state.step + 1, state.data, get_rng_state(self._device)))

    @torch.no_grad()
    def check(self, grad_norm: Tensor) -> Tensor:
        """Decide on the update of the recorded step.

        Args:
            grad_norm: before clipping and without the loss scale; the same on every rank.

        Returns:
            1 to skip the update, 0 to apply it: a float32 scalar on the device.
        """
        limit = self._config.skip_spikes_sigma
        finite, running = grad_norm.isfinite(), ~self._frozen
        overflow = ~finite & (self._scale > MIN_LOSS_SCALE) & self._scales
        if self._scales:
            self._rescale(finite, overflow, running)
        log_norm = grad_norm.float().clamp_min(torch.finfo(torch.float32).tiny).log()
        known = self._norm_count >= WARMUP_STEPS
        ceiling = self._mean + (math.inf if limit is None else limit) * self._variance.sqrt().clamp_min(MIN_DEVIATION)
        spike = finite & known & (log_norm > ceiling)
        # A spike enters the statistics as the ceiling: a single one hardly moves them, but they follow a norm that has
        # risen for good.
        self._add_norm(torch.where(known, torch.minimum(log_norm, ceiling), log_norm), running & finite)
        self._nonfinite = self._nonfinite + (running & ~finite & ~overflow)
        self._spikes = self._spikes + (running & spike)
        bad = spike | ~finite
        self._consecutive = torch.where(running & ~overflow, (self._consecutive + 1) * bad, self._consecutive)
        stops = self._consecutive > self._config.max_skipped_steps
        if self._config.on_nonfinite == "stop":
            stops = stops | (~finite & ~overflow)
        bad_kind = torch.where(overflow, OVERFLOW, NONFINITE)
        verdict = torch.where(finite, torch.where(spike, SPIKE, APPLIED), bad_kind)
        verdict = torch.where(running, verdict, FROZEN)
        self._frozen = self._frozen | stops
        self._pending[-1].verdict, self._pending[-1].grad_norm = verdict, grad_norm
        return (verdict != APPLIED).float()

    def _add_norm(self, log_norm: Tensor, counts: Tensor) -> None:
        """Add a norm: to a plain mean and variance at first, to exponentially weighted ones later.

        Source: West 1979, "Updating mean and variance estimates: an improved method", with weights that decay.
        """
        weight = (1 / (self._norm_count + 1)).clamp_min(1 / MEMORY_STEPS)
        difference = torch.where(counts, log_norm - self._mean, 0.0)
        self._mean = self._mean + weight * difference
        variance = (1 - weight) * (self._variance + weight * difference.square())
        self._variance = torch.where(counts, variance, self._variance)
        self._norm_count = self._norm_count + counts

    def _rescale(self, finite: Tensor, overflow: Tensor, running: Tensor) -> None:
        """Halve the loss scale at an overflow, double it after GROWTH_STEPS updates without one."""
        steps = (self._steps_at_scale + 1) * finite
        grows = steps >= GROWTH_STEPS
        scale = torch.where(overflow, self._scale / 2, torch.where(grows, self._scale * 2, self._scale))
        self._scale = torch.where(running, scale.clamp(MIN_LOSS_SCALE, MAX_LOSS_SCALE), self._scale)
        self._steps_at_scale = torch.where(running, steps * ~grows, self._steps_at_scale)
        self._overflows = self._overflows + (running & overflow)

    def sync(self) -> SkipStats:
        """Read the decisions since the last call from the device, and update `skipped` and `diverged`."""
        if not self._pending:
            return self._skips
        pending, self._pending = self._pending, []
        verdicts = torch.stack([step.verdict for step in pending]).tolist()
        counts = (self._nonfinite, self._spikes, self._consecutive, self._norm_count)
        scaling = (self._overflows, self._steps_at_scale)
        nonfinite, spikes, consecutive, norm_count, overflows, steps_at_scale, frozen = torch.stack(
            (*counts, *scaling, self._frozen.long())
        ).tolist()
        mean, variance, scale = torch.stack((self._mean, self._variance, self._scale)).tolist()
        scaled = (overflows, scale, steps_at_scale) if self._scales else ()
        self._skips = SkipStats(nonfinite, spikes, consecutive, norm_count, mean, variance, *scaled)
        self.diverged = bool(frozen)
        for step, verdict in zip(pending, verdicts, strict=True):
            if kind := SKIP_KINDS.get(verdict):
                self.skipped.append(SkippedStep(step.step, kind, step.grad_norm.item(), step.data, step.random))
        return self._skips
