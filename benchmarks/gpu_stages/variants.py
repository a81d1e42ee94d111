"""What is left to choose: other ways to make the real step, with the same measurement, beside the run's own."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch

from myllm.config import RunConfig
from myllm.distributed.parallelize import compile_mode
from myllm.model import cross_entropy as head_loss
from myllm.model.transformer import Transformer

from .bench import NO_DROPOUT, Bench
from .frame import Check, noted, skipped
from .real import timed
from .steps import Steps, made_up, stage_folder

WIDER_CHUNK = 16_384
VARIANT_S = 45
"""That one way takes, compiler included."""


def run(bench: Bench) -> Iterator[Check]:
    for way in variants(bench, bench.config()):
        if bench.has_time(VARIANT_S):
            yield measured(bench, way)
        else:
            yield skipped(way.name, f"needs {VARIANT_S} s")


@dataclass(frozen=True)
class Variant:
    """Another way to train."""

    name: str
    config: RunConfig
    constants: dict[str, int] = field(default_factory=dict)
    """Of model/cross_entropy.py."""
    compile: Callable[[Steps], None] | None = None
    """What compiles the model; None: as training does."""


def variants(bench: Bench, config: RunConfig) -> Iterator[Variant]:
    """By worth."""
    yield Variant("without biases and dropout", replace(config, model=replace(config.model, bias=False, **NO_DROPOUT)))
    half = replace(config.model, residual_dtype="bfloat16")
    yield Variant("residual stream in bfloat16", replace(config, model=half))
    uncompiled = replace(config, train=replace(config.train, compile="off"))
    with torch.device("meta"):
        compiled = compile_mode(Transformer(config.model), config, bench.device)
    if compiled == "whole":
        yield Variant("compiled block by block", uncompiled, compile=by_block)
    else:
        yield Variant("compiled as one graph", uncompiled, compile=as_one_graph)
    yield Variant(f"chunks of {WIDER_CHUNK:,}", config, {"CPU_CHUNK": 48, "GPU_CHUNK": WIDER_CHUNK})


def by_block(steps: Steps) -> None:
    steps.trainer.model.compile_blocks(fullgraph=True, dynamic=False)


def as_one_graph(steps: Steps) -> None:
    compiled = torch.compile(steps.trainer.model, fullgraph=True, dynamic=False)
    steps.trainer = replace(steps.trainer, train_model=compiled)


def measured(bench: Bench, way: Variant) -> Check:
    """Of one way, and its speed as a multiple of the run's own, where `real` has measured that."""
    with stage_folder(bench) as folder, ExitStack() as stack:
        stack.enter_context(changed(way.constants))
        steps = Steps(way.config, bench.process, made_up(bench, way.config, folder), stack)
        if way.compile:
            way.compile(steps)
        found = timed(bench, steps)
    base_s = bench.found.get("step_s")
    times = f", {base_s / found.step_s:.3f} times as fast" if base_s else ""
    return noted(way.name, f"compiler {found.compile_s:.1f} s, {found}{times}", **vars(found))


@contextmanager
def changed(constants: dict[str, int]) -> Iterator[None]:
    before = {name: getattr(head_loss, name) for name in constants}
    try:
        for name, value in constants.items():
            setattr(head_loss, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(head_loss, name, value)
