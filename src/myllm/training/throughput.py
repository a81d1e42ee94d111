"""The numbers of a log line and of the training rows of metrics.jsonl: loss, speed, MFU, and where the time went."""

import shutil
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from myllm.checkpoint.state import SkipStats, TrainState
from myllm.data.dataloader import BatchLoader
from myllm.data.mixture.component_losses import ComponentLosses
from myllm.data.sample_digest import SampleDigest
from myllm.distributed import collectives as distributed
from myllm.distributed.device_info import device_name
from myllm.distributed.precision import needs_loss_scale
from myllm.distributed.terminal import LINE_WIDTH, ROOM
from myllm.formatting import format_clock, format_si
from myllm.planning.flops import flops_per_token
from myllm.planning.gpu_specs import peak_flops
from myllm.runs.logs import TRAINING, Stopwatch

from .setup import RunContext

MIN_SHOWN_WAIT = 0.01
"""A log line shows the wait for data from this fraction of a step on."""
MIN_SHOWN_FRACTION = 0.0005
"""The summary of the time leaves out what took less than this fraction."""


class ThroughputMeter:
    """Reads from the device only when a row is written."""

    def __init__(
        self, ctx: RunContext, loader: BatchLoader, step: int, components: ComponentLosses | None = None
    ) -> None:
        self._ctx, self._loader, self._components = ctx, loader, components
        self._stopwatch = Stopwatch(ctx.dist.device)
        self._stopwatch.seconds["starting"] = time.monotonic() - ctx.started
        self._written: Mapping[str, float] = {}
        self._logged_step, self._wait_s = step, 0.0
        self._digested = loader.digest_sums.copy()
        peak = peak_flops(device_name(ctx.dist.device))
        self._peak_flops = peak * ctx.dist.world_size if peak else None

    def timed(self, activity: str) -> AbstractContextManager[None]:
        """Count a `with` block under a name of its own, not in step_s and tokens_per_s."""
        return self._stopwatch.timed(activity)

    def overhead(self, step: int) -> list[dict[str, Any]]:
        """A row with the seconds of each activity since the last such row; no row if there were none."""
        seconds = {name: value for name, value in self._stopwatch.seconds.items() if name != TRAINING}
        new = {name: value - self._written.get(name, 0.0) for name, value in seconds.items()}
        self._written = seconds
        new = {name: value for name, value in new.items() if value > 0}
        return [{"kind": "overhead", "step": step, "seconds": new}] if new else []

    def finish(self, step: int) -> None:
        """Write the last row, and log where the time went since this process began."""
        self._stopwatch.lap()
        # Without a training row there is nothing to draw, so this does not create the file.
        if self._ctx.dist.is_rank_zero and self._ctx.metrics.path.is_file():
            for row in self.overhead(step):
                self._ctx.metrics.append(row)
        self._ctx.log(time_line(self._stopwatch.seconds, self._loader.wait_s))

    def with_digest(self, state: TrainState) -> TrainState:
        """The state with a digest of all samples so far. Every rank calls this at the same steps."""
        new = self._loader.digest_sums - self._digested
        self._digested = self._loader.digest_sums.copy()
        # The sums are on the host, so this does not wait for the device.
        sums = distributed.all_reduce_sum(torch.from_numpy(new)).numpy()
        return replace(state, sample_digest=(state.sample_digest or SampleDigest()).add(sums))

    def measure(self, state: TrainState, loss: Tensor, grad_norm: Tensor, lr: float) -> dict[str, Any]:
        """A row of metrics.jsonl: one all-reduce and one read from the device.

        Args:
            lr: AdamW's; Muon's is in the same proportion to its peak.
        """
        world_size, model, digest = self._ctx.dist.world_size, self._ctx.config.model, state.sample_digest
        optim = self._ctx.config.optim
        assert digest is not None  # see `with_digest`
        own = torch.stack((loss.float() / world_size, grad_norm.float() / world_size))
        if self._components:
            own = torch.cat((own, self._components.take_sums(state.data)))
        mean_loss, mean_norm, *component_sums = distributed.all_reduce_sum(own).cpu().tolist()
        steps, self._logged_step = state.step - self._logged_step, state.step
        step_s = self._stopwatch.lap() / steps
        tokens_per_s = self._ctx.config.train.batch_tokens / step_s
        wait_s, self._wait_s = (self._loader.wait_s - self._wait_s) / steps, self._loader.wait_s
        return {
            "kind": "train",
            "step": state.step,
            "tokens": state.tokens_seen,
            "loss": mean_loss,
            **(self._components.figures(component_sums) if self._components else {}),
            "lr": lr,
            **({"muon_lr": optim.muon_lr * lr / optim.max_lr} if optim.optimizer == "muon" else {}),
            "grad_norm": mean_norm,
            "step_s": step_s,
            "tokens_per_s": tokens_per_s,
            "mfu": flops_per_token(model) * tokens_per_s / self._peak_flops if self._peak_flops else None,
            "data_wait_s": wait_s,
            **self._skipped(state),
            "sample_digest": digest.digest,
            "sample_digest_since_step": digest.since_step,
        }

    def _skipped(self, state: TrainState) -> dict[str, float]:
        """Skipped updates, if the config skips any, and the loss scale, if there is one."""
        train, skips = self._ctx.config.train, state.skips or SkipStats()
        counts: dict[str, float] = {}
        if train.on_nonfinite != "stop" or train.skip_spikes_sigma is not None:
            counts = {"skipped_nonfinite": skips.nonfinite, "skipped_spikes": skips.spikes}
        if needs_loss_scale(train.precision, self._ctx.dist.device):
            counts |= {"loss_scale": skips.loss_scale, "skipped_overflows": skips.overflows}
        return counts


def console_line(row: dict[str, Any], max_steps: int) -> str:
    """What fits into a line of the terminal or of a log; metrics.jsonl has all."""
    wait = row["data_wait_s"] / row["step_s"]
    parts = {
        "step": f"step {row['step']:>6,}/{max_steps:,}",
        "loss": f"loss {row['loss']:.4f}",
        "lr": f"lr {row['lr']:.2e}",
        "muon": f"muon {row['muon_lr']:.2e}" if "muon_lr" in row else "",
        "norm": f"norm {row['grad_norm']:.2f}",
        "time": f"{row['step_s'] * 1000:,.0f} ms",
        "speed": f"{format_si(row['tokens_per_s'])} tok/s",
        "mfu": f"mfu {row['mfu']:.1%}" if row["mfu"] else "",
        "wait": f"data wait {wait:.0%}" if wait >= MIN_SHOWN_WAIT else "",
        "eta": f"eta {_eta(row, max_steps)}",
    }
    width = min(shutil.get_terminal_size((LINE_WIDTH, 0)).columns, LINE_WIDTH)
    for least in ("time", "norm", "muon", "wait", "mfu"):
        line = "  ".join(part for part in parts.values() if part)
        if len(line) <= width:
            return line
        del parts[least]
    return "  ".join(parts.values())


def _eta(row: dict[str, Any], max_steps: int) -> str:
    return format_clock((max_steps - row["step"]) * row["step_s"])


def time_line(seconds: Mapping[str, float], wait_s: float) -> str:
    """Where the time went, the longest activity first.

    Args:
        seconds: by activity.
        wait_s: how long training waited for the loader.
    """
    total = sum(seconds.values())
    fractions = sorted(((value / total, name) for name, value in seconds.items()), reverse=True)
    shown = ", ".join(f"{name} {fraction:.1%}" for fraction, name in fractions if fraction >= MIN_SHOWN_FRACTION)
    return f"time: {format_clock(total)} since the start: {shown}; waiting for the loader {wait_s / total:.1%}"


def progress_text(row: dict[str, Any], max_steps: int) -> str:
    """The text beside the progress bar: what fits into the terminal."""
    texts = [
        f"loss {row['loss']:.3f}",
        f"eta {_eta(row, max_steps)}",
        f"{format_si(row['tokens_per_s'])} tok/s",
        *([f"mfu {row['mfu']:.1%}"] if row["mfu"] else []),
        f"lr {row['lr']:.1e}",
    ]
    room = shutil.get_terminal_size().columns - ROOM - len(f"100%|#####| {max_steps}/{max_steps} [00:00:00, ]")
    while len(texts) > 1 and len(", ".join(texts)) > room:
        texts.pop()
    return ", ".join(texts)
