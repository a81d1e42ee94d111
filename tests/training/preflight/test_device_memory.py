"""What counts as a refusal of memory, and what becomes of a rank that is refused alone."""

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist
from conftest import with_train

from myllm.cli.errors import exit_on_error
from myllm.cli.launch import RunArgs
from myllm.cli.plan import describe_dry_run
from myllm.config import RunConfig
from myllm.data.prepare.prepare import prepare
from myllm.distributed import collectives as distributed
from myllm.distributed.collectives import DistContext
from myllm.distributed.out_of_memory import explain_out_of_memory, is_out_of_memory
from myllm.errors import UserError
from myllm.presets import get_preset
from myllm.runs.heartbeat import status
from myllm.training.loop import train
from myllm.training.preflight import device_memory
from myllm.training.preflight.device_memory import OutOfMemory, check_memory, run_within_memory

PAIR = DistContext(0, 0, 2, torch.device("cpu"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
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
def test_recognizes_out_of_memory_errors(error: BaseException) -> None:
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
def test_other_errors_are_not_out_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 5.00 MiB is "
    "free. Including non-PyTorch memory, this process has 79.08 GiB memory in use. Of the allocated memory 77.00 GiB "
    "is allocated by PyTorch, and 1.00 GiB is reserved by PyTorch but unallocated. If reserved but unallocated"
)


def test_out_of_memory_suggests_settings() -> None:
    config = get_preset("small-50m")
    alone = DistContext(0, 0, 1, torch.device("cpu"))
    wrapped = RuntimeError("backend='inductor' raised:")
    wrapped.__cause__ = torch.OutOfMemoryError(CUDA)
    with pytest.raises(UserError) as caught, explain_out_of_memory(config, PAIR):
        raise wrapped
    message = str(caught.value)
    assert "79.08 GiB memory in use. What helps" in message
    assert "reserved" not in message
    assert "lower train.micro_batch_size 16, or set it to auto" in message
    assert "train.activation_checkpointing" in message
    assert "train.parallel to fsdp" in message
    frugal = replace(config, train=replace(config.train, micro_batch_size=1, activation_checkpointing=True))
    with pytest.raises(UserError) as caught, explain_out_of_memory(frugal, alone):
        raise torch.OutOfMemoryError(CUDA)
    assert not re.search("micro_batch|checkpointing|fsdp", str(caught.value))
    with pytest.raises(KeyError), explain_out_of_memory(config, alone):
        raise KeyError("memory")


def test_status_reports_out_of_memory(tiny: RunConfig, prepared_data: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: object) -> NoReturn:
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr("myllm.training.loop.train_step", step)
    with pytest.raises(UserError, match="out of memory on"):
        train(tiny, prepare(tiny.data, progress=False), DistContext(0, 0, 1, torch.device("cpu")))
    line, code = status("tiny", 60.0)
    assert (line.startswith("step 0: failed: out of memory on"), code) == (True, 2)


def test_out_of_memory_exits_with_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_error():
        raise torch.OutOfMemoryError(CUDA)
    assert caught.value.code == 2
    stderr = capsys.readouterr().err
    assert re.match(r"error: out of memory: CUDA .*MiB is free.*; end other programs .*--batch-size", stderr)


def refused() -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def store(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """What two ranks share; the other one is not there."""
    shared = dist.HashStore()
    monkeypatch.setattr(distributed, "shared_store", lambda: shared)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(distributed, "all_gather_object", lambda value: [value])
    monkeypatch.setattr(device_memory, "OTHER_RANKS_S", 0.2)
    return shared


def test_out_of_memory_on_single_rank_raises(store: dist.Store) -> None:
    """The others wait for it in a collective, for half an hour if it went to wait for them in another."""
    started = time.monotonic()
    with pytest.raises(UserError, match=r"out of memory on rank 0 .* alone: .* lower train\.micro_batch_size"):
        run_within_memory(refused, PAIR, 2**40)
    assert time.monotonic() - started < 60


def test_out_of_memory_on_all_ranks_continues(store: dist.Store) -> None:
    for trial in (1, 2):
        store.set(f"memory/1/{trial}", "here")
        with pytest.raises(OutOfMemory):
            run_within_memory(refused, PAIR, 2**40)
    assert run_within_memory(lambda: "done", PAIR, 2**40)[0] == "done"  # waits for nobody here
    assert run_within_memory(lambda: "done", replace(PAIR, rank=0), 2**40)[0] == "done"


def test_insufficient_host_memory_is_rejected(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory.sys, "platform", "linux")
    monkeypatch.setattr(device_memory, "available_bytes", lambda device: 2**30)
    huge = with_train(tiny, micro_batch_size=10_000, batch_tokens=10_000 * 64)
    with pytest.raises(UserError, match=r"micro_batch_size 10,000 needs about .* GiB .* only 1.00 GiB is available"):
        check_memory(huge, torch.device("cpu"), 1)
    for fits in (tiny, with_train(huge, micro_batch_size="auto")):
        check_memory(fits, torch.device("cpu"), 1)
    check_memory(huge, torch.device("cuda"), 1)
    assert "memory       warning: train.micro_batch_size 10,000 needs" in describe_dry_run(RunArgs(huge))
    monkeypatch.setattr(device_memory.sys, "platform", "darwin")
    check_memory(huge, torch.device("cpu"), 1)


def test_container_file_cache_counts_as_available(tmp_path: Path) -> None:
    (tmp_path / "memory.stat").write_text("anon 100\nfile 900\ninactive_file 800\nactive_file 100\n")
    assert device_memory._file_cache_bytes(str(tmp_path)) == 800
