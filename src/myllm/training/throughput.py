"""Time and numbers between two log lines."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from myllm.checkpoint.state import TrainState
from myllm.config import RunConfig
from myllm.data.dataloader import BatchLoader
from myllm.data.sample_digest import SampleDigest
from myllm.distributed import collectives as distributed
from myllm.distributed.collectives import DistContext
from myllm.distributed.device_info import device_name
from myllm.distributed.precision import needs_loss_scale
from myllm.formatting import format_clock
from myllm.planning.flops import flops_per_token
from myllm.planning.gpu_specs import peak_flops
from myllm.runs.logs import TRAINING, JsonlFile, Log, Stopwatch

WORTH_SAYING = 0.01
"""Of a step, spent waiting for data: from here on a log line says so."""
WORTH_A_SHARE = 0.0005
"""Of the whole: less is left out where it says where the time went."""


class ThroughputMeter:
    """Time and numbers between two log lines. Reads from the device only when a row is written or a save is due."""

    def __init__(self, config: RunConfig, process: DistContext, loader: BatchLoader, step: int, started: float) -> None:
        """
        Args:
            started: by the monotonic clock, when this process began.
        """
        self._config, self._process, self._loader = config, process, loader
        self._stopwatch = Stopwatch(process.device)
        self._stopwatch.seconds["starting"] = time.monotonic() - started
        self._told: dict[str, float] = {}
        self._logged_step, self._wait_s = step, 0.0
        self._digested = loader.digest_sums.copy()
        peak = peak_flops(device_name(process.device))
        self._peak_flops = peak * process.world_size if peak else None

    def timed(self, what: str) -> AbstractContextManager[None]:
        """Count a `with` block apart from training, under a name: it is no part of step_s and tokens_per_s."""
        return self._stopwatch.doing(what)

    def overhead(self, step: int) -> list[dict[str, Any]]:
        """A row of metrics.jsonl with the seconds that were counted apart since the last such row; none if there were
        none."""
        seconds = {name: each for name, each in self._stopwatch.seconds.items() if name != TRAINING}
        fresh = {name: each - self._told.get(name, 0.0) for name, each in seconds.items()}
        self._told = seconds
        fresh = {name: each for name, each in fresh.items() if each > 0}
        return [{"kind": "apart", "step": step, "seconds": fresh}] if fresh else []

    def finish(self, step: int, metrics: JsonlFile, log: Log) -> None:
        """The last row, and a line about where the time went since this process began."""
        self._stopwatch.lap()
        # Before the first row there is no file, and none is begun for this: a report could not be drawn from it.
        if self._process.is_rank_zero and metrics.path.is_file():
            for row in self.overhead(step):
                metrics.append(row)
        log(time_line(self._stopwatch.seconds, self._loader.wait_s))

    def with_digest(self, state: TrainState) -> TrainState:
        """The state with a receipt for everything trained on so far. Every rank must ask at the same steps."""
        fresh = self._loader.digest_sums - self._digested
        self._digested = self._loader.digest_sums.copy()
        # On the host, where the sums are: it never waits for the device.
        sums = distributed.all_reduce_sum(torch.from_numpy(fresh)).numpy()
        return replace(state, sample_digest=(state.sample_digest or SampleDigest()).add(sums))

    def measure(self, state: TrainState, loss: Tensor, grad_norm: Tensor, rate: float) -> dict[str, Any]:
        """One row of metrics.jsonl: one reduction, one read from the device."""
        mean_loss, norm = (
            (distributed.all_reduce_sum(torch.stack((loss.float(), grad_norm.float()))) / self._process.world_size)
            .cpu()
            .tolist()
        )
        steps = state.step - self._logged_step
        step_s = self._stopwatch.lap() / steps
        tokens_per_s = self._config.train.batch_tokens / step_s
        wait_s, self._wait_s = (self._loader.wait_s - self._wait_s) / steps, self._loader.wait_s
        self._logged_step = state.step
        flops = flops_per_token(self._config.model) * tokens_per_s
        return {
            "kind": "train",
            "step": state.step,
            "tokens": state.tokens_seen,
            "loss": mean_loss,
            "lr": rate,
            "grad_norm": norm,
            "step_s": step_s,
            "tokens_per_s": tokens_per_s,
            "mfu": flops / self._peak_flops if self._peak_flops else None,
            "data_wait_s": wait_s,
            **_skipped(self._config, state, self._process.device),
            "sample_digest": state.sample_digest.digest,
            "sample_digest_since_step": state.sample_digest.since_step,
        }


def _skipped(config: RunConfig, state: TrainState, device: torch.device) -> dict[str, float]:
    """How many updates were left out so far, where the config leaves any out, and the loss scale where there is one."""
    scaling = {}
    if needs_loss_scale(config.train.precision, device):
        scaling = {"loss_scale": state.skips.loss_scale, "skipped_overflows": state.skips.overflows}
    if config.train.on_nonfinite == "stop" and config.train.skip_spikes_sigma is None:
        return scaling
    return {"skipped_nonfinite": state.skips.nonfinite, "skipped_spikes": state.skips.spikes, **scaling}


def console_line(row: dict[str, Any], max_steps: int) -> str:
    left = (max_steps - row["step"]) * row["step_s"]
    mfu = f"  mfu {row['mfu']:.1%}" if row["mfu"] else ""
    waiting = row["data_wait_s"] / row["step_s"]
    waited = f"  data wait {waiting:.0%}" if waiting >= WORTH_SAYING else ""
    return (
        f"step {row['step']:>6,}/{max_steps:,}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
        f"norm {row['grad_norm']:.2f}  {row['step_s'] * 1000:,.0f} ms  "
        f"{row['tokens_per_s']:,.0f} tok/s{mfu}{waited}  eta {format_clock(left)}"
    )


def time_line(seconds: Mapping[str, float], wait_s: float) -> str:
    """Where the time went.

    Args:
        seconds: by what was being done.
        wait_s: of the training, how long it stood waiting for the loader.
    """
    total = sum(seconds.values())
    longest_first = sorted(seconds.items(), key=lambda each: -each[1])
    shares = [f"{name} {each / total:.1%}" for name, each in longest_first if each / total >= WORTH_A_SHARE]
    return (
        f"time: {format_clock(total)} since the start: {', '.join(shares)}; waiting for the loader {wait_s / total:.1%}"
    )


def progress(row: dict[str, Any]) -> str:
    """What stands beside the progress bar."""
    return f"loss {row['loss']:.3f}, {1 / row['step_s']:.3g} steps/s, {row['tokens_per_s']:,.0f} tok/s"
