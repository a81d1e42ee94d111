"""Large matrices on huge pages, so that reading a whole one, as each new token does, looks up few addresses.

With pages of 4 KB a processor that reads 13 MB has to find 3,200 of them, in a virtual machine twice over. Linux gives
pages of 2 MB to memory that asks for them.
"""

import mmap

import torch
from torch import Tensor, nn

HUGE = 2 << 20
"""Bytes of a huge page on x86-64 and, mostly, on ARM64."""


def use_huge_pages(module: nn.Module) -> None:
    """Move a module's large parameters, where the system knows huge pages. Nothing else about them changes."""
    for parameter in module.parameters():
        parameter.data = on_huge_pages(parameter.data)


def on_huge_pages(x: Tensor) -> Tensor:
    """A copy of a large tensor in such memory, or the tensor itself where there is nothing to gain or to be had."""
    # A tensor of another type only stands for one, or keeps its numbers in a way of its own.
    if type(x) is not Tensor or x.device.type != "cpu" or x.nbytes < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return x
    room = mmap.mmap(-1, x.nbytes + HUGE)
    start = -torch.frombuffer(room, dtype=torch.uint8, count=1).data_ptr() % HUGE
    try:  # not of the end, which would take a whole page for a part of one
        room.madvise(mmap.MADV_HUGEPAGE, start, x.nbytes // HUGE * HUGE)
    except OSError:  # a kernel built without them
        return x
    there = torch.frombuffer(room, dtype=x.dtype, count=x.numel(), offset=start).view_as(x)
    return there.copy_(x)
