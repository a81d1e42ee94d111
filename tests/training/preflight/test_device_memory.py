"""What counts as a refusal of memory, and what becomes of a rank that is refused alone."""

import time
from dataclasses import replace
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

from myllm.distributed import collectives as distributed
from myllm.distributed.collectives import DistContext
from myllm.errors import UserError
from myllm.training.preflight import device_memory
from myllm.training.preflight.device_memory import OutOfMemory, is_out_of_memory, run_within_memory

PAIR = DistContext(0, 0, 2, torch.device("cpu"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("std::bad_alloc"),
        dist.DistBackendError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"),
        dist.DistBackendError("ncclUnhandledCudaError\nLast error:\nFailed to CUDA calloc async 608 bytes"),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_refusals_of_memory(error: BaseException) -> None:
    assert is_out_of_memory(error)
    wrapped = RuntimeError("backend='inductor' raised:")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED"),
        ValueError("out of memory"),
        OSError(28, "No space left on device"),
        KeyError("memory"),
    ],
    ids=str,
)
def test_other_errors_are_no_refusals(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def refused() -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def store(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """What two ranks share; the other one is not there."""
    shared = dist.HashStore()
    monkeypatch.setattr(distributed, "shared_store", lambda: shared)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(distributed, "gather_object", lambda value: [value])
    monkeypatch.setattr(device_memory, "OTHER_RANKS_S", 0.2)
    return shared


def test_a_rank_that_runs_out_alone_ends_the_trial(store: dist.Store) -> None:
    """The others wait for it in a collective, for half an hour if it went to wait for them in another."""
    started = time.monotonic()
    with pytest.raises(UserError, match=r"out of memory on rank 0 .* alone: .* lower train\.micro_batch_size"):
        run_within_memory(refused, PAIR, 2**40)
    assert time.monotonic() - started < 60


def test_ranks_that_run_out_together_go_on(store: dist.Store) -> None:
    for trial in (1, 2):
        store.set(f"memory/1/{trial}", "here")
        with pytest.raises(OutOfMemory):
            run_within_memory(refused, PAIR, 2**40)
    assert run_within_memory(lambda: "done", PAIR, 2**40)[0] == "done"  # waits for nobody here
    assert run_within_memory(lambda: "done", replace(PAIR, rank=0), 2**40)[0] == "done"
