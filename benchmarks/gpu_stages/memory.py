"""Out of memory: refused in time, known for what it is, and all of it given back."""

from collections.abc import Iterator

import torch

from myllm.training.preflight.batch_size import measure_peak_bytes
from myllm.training.preflight.device_memory import is_out_of_memory, memory_limit_bytes

from .bench import Bench
from .frame import Check, bounded, correct
from .steps import made_up, stage_folder

LAYERS = 2
TOO_LITTLE = 0.6
"""Of what two steps need, as a limit."""
LEFT_BYTES = 64 * 2**20
"""That may stay behind: handles and workspaces."""


def run(bench: Bench) -> Iterator[Check]:
    yield refusal(bench)
    config = bench.config(LAYERS, micro_batch=2 if bench.tiny else 8, compile="off")
    with stage_folder(bench) as folder:
        dataset, limit = made_up(bench, config, folder), memory_limit_bytes(bench.process)
        before = allocated(bench)
        need = measure_peak_bytes(config, dataset, bench.process, limit)
        yield correct("with all memory", need is not None, f"{(need or 0) / 2**30:.2f} GiB", "fits")
        if need is None:
            return
        refused = measure_peak_bytes(config, dataset, bench.process, int(TOO_LITTLE * need)) is None
        measured = "refused" if refused else "fits"
        yield correct(f"with {TOO_LITTLE:.0%} of that", refused, measured, "refused")
        left = allocated(bench) - before
        yield bounded("left behind", left / 2**20, None, LEFT_BYTES / 2**20 if bench.on_cuda else None, "MiB")
        again = measure_peak_bytes(config, dataset, bench.process, limit)
        yield correct("afterwards", again is not None, f"{(again or 0) / 2**30:.2f} GiB", "fits again")


def refusal(bench: Bench) -> Check:
    """The device's own answer to a request for more than there is."""
    try:
        torch.empty(2**50, dtype=torch.uint8, device=bench.device)
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        return correct("a petabyte", is_out_of_memory(error), said, "known as out of memory")
    return correct("a petabyte", False, "given", "refused")


def allocated(bench: Bench) -> int:
    return torch.cuda.memory_allocated(bench.device) if bench.on_cuda else 0
