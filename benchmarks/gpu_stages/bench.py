"""What stages share: the machine, the sizes, and how work is timed, counted and compared."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from myllm.config import ModelConfig, RunConfig
from myllm.distributed.collectives import DistContext
from myllm.distributed.device_info import device_name, has_triton
from myllm.planning.gpu_specs import GpuSpec, gpu_from_device_name
from myllm.planning.memory_estimate import HEADROOM, ComputeMode, predicted_bytes
from myllm.presets import get_preset
from myllm.training.preflight.device_memory import available_bytes, reset_peak

from .frame import Budget

PRESET = "lf-llm-269m"
MICRO_BATCHES = (32, 16, 8, 4, 2, 1)
ACCUMULATION = 2
"""Micro-steps of a step: the fewest with which gradients add up."""
NO_DROPOUT = {"dropout_embedding": 0.0, "dropout_attention_residual": 0.0, "dropout_ffn": 0.0}


@dataclass
class Bench:
    """The machine that is checked, and what stages have found about it so far."""

    process: DistContext
    budget: Budget
    out: Path
    """For files that are kept."""
    work: Path
    """For files that go away."""
    tiny: bool = False
    found: dict[str, float] = field(default_factory=dict)
    """Figures of one stage that later ones compare with."""

    @property
    def device(self) -> torch.device:
        return self.process.device

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def card(self) -> GpuSpec | None:
        return gpu_from_device_name(device_name(self.device)) if self.on_cuda else None

    def has_time(self, seconds: float) -> bool:
        """Whether a part of a stage that takes so long on a card fits into what is left."""
        return self.tiny or self.budget.left_s >= seconds

    def model(self, name: str = PRESET, layers: int | None = None) -> ModelConfig:
        """A preset's model at full width, with fewer layers if asked for; tiny ones keep its kinds of parts."""
        model = get_preset(name).model
        if self.tiny:
            grouped = 2 if model.kv_heads != model.n_heads else None
            model = replace(
                model, max_seq_len=32, d_model=32, n_layers=2, n_heads=4, n_kv_heads=grouped, head_dim=None, d_ff=48
            )
        return replace(model, n_layers=layers) if layers and not self.tiny else model

    def config(self, layers: int | None = None, micro_batch: int | None = None, **train: Any) -> RunConfig:
        """The reference run on this one device, `ACCUMULATION` micro-steps a step.

        Args:
            layers: fewer than the preset's.
            micro_batch: sequences; None: the most of `MICRO_BATCHES` that is predicted to fit.
            train: other settings of TrainConfig.
        """
        base = get_preset(PRESET)
        settings = {"device": self.device.type, "max_steps": 10_000}
        if self.tiny:
            settings |= {"compile": "on", "precision": "bfloat16"}
        model = self.model(layers=layers)
        sizes = (micro_batch,) if micro_batch else (2,) if self.tiny else MICRO_BATCHES
        configs = [
            replace(
                base,
                model=model,
                train=replace(
                    base.train,
                    **settings | train,
                    micro_batch_size=size,
                    batch_tokens=ACCUMULATION * size * model.max_seq_len,
                ),
            )
            for size in sizes
        ]
        if len(configs) == 1:
            return configs[0]
        limit = available_bytes(self.device) * (1 - HEADROOM)
        return next((config for config in configs if self.predicted_bytes(config) <= limit), configs[-1])

    def predicted_bytes(self, config: RunConfig) -> int:
        return predicted_bytes(config, ComputeMode.of(config, self.device.type, triton=has_triton(self.device)))


# -- time and memory --------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(device: torch.device, work: Callable[[], Any], repeats: int, warm_up: int = 1) -> float:
    """The median of several calls; on CUDA between events, so that the host is not part of it."""
    for _ in range(warm_up):
        work()
    synchronize(device)
    if device.type != "cuda":
        return statistics.median(_host_seconds(work) for _ in range(repeats))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    synchronize(device)
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1_000


def _host_seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def wall_seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """Of one call, until the device is done."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def fresh(device: torch.device) -> None:
    """Forget what was compiled, counted and held."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    reset_peak(device)


def graphs() -> int:
    """That Dynamo has made since `fresh`: a recompile is one more."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def graph_breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


@contextmanager
def no_compiler() -> Iterator[None]:
    """Graphs are traced and counted and then run as they are: what --tiny has no time to compile."""

    def run_as_traced(graph: torch.fx.GraphModule, inputs: list[Tensor], **_: Any) -> Any:
        return graph.forward

    real = torch.compile
    torch.compile = partial(real, backend=run_as_traced)
    try:
        yield
    finally:
        torch.compile = real


# -- comparing --------------------------------------------------------------------------------------------------------


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in float64; NaN where a number is not finite."""
    found, expected = found.double(), expected.double().to(found.device)
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error and whose it is; NaN is larger than any number."""
    errors = {name: relative_error(found[name], tensor) for name, tensor in expected.items()}
    name = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return errors[name], name
