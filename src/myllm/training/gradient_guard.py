"""Which updates are made: decided on the device, step by step, without asking the host.

An update is left out where the gradient is not finite or, if asked for, where its norm is a spike: far above its
running mean. Once it is time to stop, every later update is left out as well, so that weights and optimizer stay those
of the step that did it until the host, which looks at the next log line or save, can take that step apart.

The gradient norm is the same on all ranks, to the last bit, so all of them decide alike without a word.

float16 has no numbers below 6e-8, and a gradient is full of them. There the loss is multiplied by a scale, and the
gradient divided by it again: large, but not so large that something overflows. An overflow shows as a gradient that is
not finite. It leaves the update out and halves the scale, and is no bad number until the scale can fall no further.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from myllm.checkpoint.rng import get_rng_state
from myllm.checkpoint.state import SkipStats, TrainState
from myllm.config import TrainConfig
from myllm.data.sampler import DataPosition
from myllm.distributed.precision import needs_loss_scale

MEMORY_STEPS = 128
"""The statistics forget a step after about so many more."""
WARMUP_STEPS = 64
"""Norms to have seen before one can be called a spike."""
MIN_DEVIATION = 0.05
"""Of the log norm. A run whose norm hardly moves must not stumble over a few per cent."""

LEAST_LOSS_SCALE, LARGEST_LOSS_SCALE = 1.0, 2.0**24
"""What still overflows at the least is no matter of the scale: some number is bad. From the first scale it takes 16
steps to get there."""
GROWTH_STEPS = 2_000
"""Updates in a row after which the scale is doubled, to see whether it holds. Source: torch.amp.GradScaler, whose
factors 2 and 1/2 these are too; powers of two round nothing."""

APPLIED, NONFINITE, SPIKE, FROZEN, OVERFLOW = range(5)
_KINDS = {NONFINITE: "nonfinite", SPIKE: "spike", OVERFLOW: "overflow"}


@dataclass(frozen=True)
class SkippedStep:
    """A step whose update was left out, and what it takes to make it again."""

    step: int
    """The update's number, counted from 1: with it, this many would have been made."""
    kind: Literal["nonfinite", "spike", "overflow"]
    grad_norm: float
    data: DataPosition
    """Before the step."""
    random: dict[str, Tensor]
    """This rank's generators before the step."""


@dataclass
class PendingStep:
    step: int
    data: DataPosition
    random: dict[str, Tensor]
    verdict: Tensor | None = None
    grad_norm: Tensor | None = None


class GradientGuard:
    """Decides on each update, counts those left out, and remembers what their steps began with."""

    def __init__(self, config: TrainConfig, device: torch.device, skips: SkipStats | None = None) -> None:
        self._config, self._device = config, device
        self._skips = skips or SkipStats()
        self._attempts: list[PendingStep] = []  # since the host last looked
        self.skipped: list[SkippedStep] = []
        """Steps that the host has seen and not yet dealt with; who deals with them empties it."""
        self.diverged = False
        """Whether the last of them ends the run."""
        counts = (self._skips.nonfinite, self._skips.spikes, self._skips.consecutive, self._skips.norm_count)
        self._nonfinite, self._spikes, self._in_a_row, self._counted = torch.tensor(counts, device=device).unbind()
        numbers = (self._skips.log_norm_mean, self._skips.log_norm_variance)
        self._mean, self._variance = torch.tensor(numbers, dtype=torch.float32, device=device).unbind()
        self._frozen = torch.zeros((), dtype=torch.bool, device=device)
        self._overflows, self._scaled_steps = torch.tensor(
            (self._skips.overflows, self._skips.steps_at_scale), device=device
        ).unbind()
        self._scale = torch.tensor(self._skips.loss_scale, dtype=torch.float32, device=device)
        self._scales = needs_loss_scale(config.precision, device)

    @property
    def loss_scale(self) -> Tensor | None:
        """What the step that began last multiplies its loss by, a float32 scalar on the device; None: by nothing."""
        return self._scale if self._scales else None

    def record(self, state: TrainState) -> None:
        """Remember where the next step begins. Costs the host a few microseconds and the device nothing."""
        self._attempts.append(PendingStep(state.step + 1, state.data, get_rng_state(self._device)))

    @torch.no_grad()
    def check(self, grad_norm: Tensor) -> Tensor:
        """Whether to leave out the update of the step that began last.

        Args:
            grad_norm: before clipping, of the gradient without a loss scale; the same on every rank.

        Returns:
            1 to leave it out, 0 to make it: a float32 scalar on the device.
        """
        limit = self._config.skip_spikes_sigma
        finite, running = grad_norm.isfinite(), ~self._frozen
        overflow = ~finite & (self._scale > LEAST_LOSS_SCALE) & self._scales
        if self._scales:
            self._rescale(finite, overflow, running)
        log_norm = grad_norm.float().clamp_min(torch.finfo(torch.float32).tiny).log()
        known = self._counted >= WARMUP_STEPS
        ceiling = self._mean + (math.inf if limit is None else limit) * self._variance.sqrt().clamp_min(MIN_DEVIATION)
        spike = finite & known & (log_norm > ceiling)
        # A spike counts as if it had reached the ceiling and no more: one of them hardly moves the statistics, but a
        # norm that has risen for good is in time taken for what it is.
        self._remember(torch.where(known, torch.minimum(log_norm, ceiling), log_norm), running & finite)
        self._nonfinite = self._nonfinite + (running & ~finite & ~overflow)
        self._spikes = self._spikes + (running & spike)
        bad = spike | ~finite
        self._in_a_row = torch.where(running & ~overflow, (self._in_a_row + 1) * bad, self._in_a_row)
        stops = self._in_a_row > self._config.max_skipped_steps
        if self._config.on_nonfinite == "stop":
            stops = stops | (~finite & ~overflow)
        bad_kind = torch.where(overflow, OVERFLOW, NONFINITE)
        verdict = torch.where(finite, torch.where(spike, SPIKE, APPLIED), bad_kind)
        verdict = torch.where(running, verdict, FROZEN)
        self._frozen = self._frozen | stops
        self._attempts[-1].verdict, self._attempts[-1].grad_norm = verdict, grad_norm
        return (verdict != APPLIED).float()

    def _remember(self, log_norm: Tensor, counts: Tensor) -> None:
        """One more norm: a plain mean and variance at first, exponentially weighted ones later.

        Source: West 1979, "Updating mean and variance estimates: an improved method", with weights that decay.
        """
        weight = (1 / (self._counted + 1)).clamp_min(1 / MEMORY_STEPS)
        difference = torch.where(counts, log_norm - self._mean, 0.0)
        self._mean = self._mean + weight * difference
        variance = (1 - weight) * (self._variance + weight * difference.square())
        self._variance = torch.where(counts, variance, self._variance)
        self._counted = self._counted + counts

    def _rescale(self, finite: Tensor, overflow: Tensor, running: Tensor) -> None:
        """Halve the loss scale at an overflow, double it after enough updates without one."""
        steps = (self._scaled_steps + 1) * finite
        grows = steps >= GROWTH_STEPS
        scale = torch.where(overflow, self._scale / 2, torch.where(grows, self._scale * 2, self._scale))
        self._scale = torch.where(running, scale.clamp(LEAST_LOSS_SCALE, LARGEST_LOSS_SCALE), self._scale)
        self._scaled_steps = torch.where(running, steps * ~grows, self._scaled_steps)
        self._overflows = self._overflows + (running & overflow)

    def sync(self) -> SkipStats:
        """Read from the device what was decided since the last look: into `left_out`, `frozen` and the counts."""
        if not self._attempts:
            return self._skips
        attempts, self._attempts = self._attempts, []
        verdicts = torch.stack([each.verdict for each in attempts]).tolist()
        counts = (self._nonfinite, self._spikes, self._in_a_row, self._counted, self._overflows, self._scaled_steps)
        nonfinite, spikes, in_a_row, counted, overflows, steps, frozen = torch.stack(
            (*counts, self._frozen.long())
        ).tolist()
        mean, variance, scale = torch.stack((self._mean, self._variance, self._scale)).tolist()
        scaling = (overflows, scale, steps) if self._scales else ()
        self._skips = SkipStats(nonfinite, spikes, in_a_row, counted, mean, variance, *scaling)
        self.diverged = bool(frozen)
        for each, verdict in zip(attempts, verdicts, strict=True):
            if kind := _KINDS.get(verdict):
                self.skipped.append(SkippedStep(each.step, kind, each.grad_norm.item(), each.data, each.random))
        return self._skips
