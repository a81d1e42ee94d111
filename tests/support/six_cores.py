"""Prints its threads as a rank of a run, on a machine that seems to have six cores."""

import torch

from myllm.distributed import cpu_threads as cores
from myllm.distributed.collectives import process_group

if __name__ == "__main__":
    cores._affinity, cores._physical = lambda: set(range(6)), len
    with process_group("cpu"):
        print(f"{torch.get_num_threads()} threads, {cores.threads_reason()}", flush=True)
