"""A run that is stopped and resumed: always the same text, and the same losses if kernels add in a fixed order."""

from collections.abc import Iterator
from contextlib import ExitStack

import torch

from myllm.config import RunConfig
from myllm.paths import RunPaths

from .bench import Bench
from .frame import Check, correct, skipped
from .steps import Steps, made_up, save, stage_folder

LAYERS = 4
BEFORE, AFTER = 3, 3
"""Steps on each side of the stop."""
SECONDS = 30
"""That one of the two ways takes, compiler included."""
LOSS_ERROR = 2e-3
"""By how much a loss may differ, relatively, after three steps with kernels that add in any order."""


def run(bench: Bench) -> Iterator[Check]:
    size = 2 if bench.tiny else 8
    yield from resumed(bench, bench.config(LAYERS, size), "default", bit_for_bit=not bench.on_cuda)
    if not bench.has_time(SECONDS):
        yield skipped("deterministic", f"needs {SECONDS} s")
        return
    yield from resumed(bench, bench.config(LAYERS, size, deterministic=True), "deterministic", bit_for_bit=True)


def resumed(bench: Bench, config: RunConfig, name: str, bit_for_bit: bool) -> Iterator[Check]:
    """Steps at one go; and as many, a save, new parts of a run, a load, and the rest."""
    with stage_folder(bench) as folder:
        dataset, run = made_up(bench, config, folder), RunPaths(folder)
        with ExitStack() as stack:
            steps = Steps(config, bench.process, dataset, stack)
            steps.losses(BEFORE)
            save(steps, run)
            expected, receipt = steps.losses(AFTER), steps.sample_digest
            del steps
        torch.compiler.reset()
        with ExitStack() as stack:
            again = Steps(config, bench.process, dataset, stack, run)
            found, same_text = again.losses(AFTER), again.sample_digest == receipt
    yield correct(f"{name}, receipt of all text", same_text, "equal" if same_text else "differs", "equal")
    worst = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
    right = worst == 0 if bit_for_bit else worst <= LOSS_ERROR
    limit = "bit for bit" if bit_for_bit else f"up to {LOSS_ERROR:.0e}"
    measured = "bit for bit" if worst == 0 else f"off by {worst:.1e}"
    yield correct(f"{name}, losses after the stop", right, measured, limit, found=found, expected_losses=expected)
