"""What counts as out of memory, and which settings help."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from myllm.config import RunConfig
from myllm.errors import UserError

from .collectives import DistContext
from .device_info import device_name

ERROR_TEXTS = (
    "out of memory",  # allocators of CUDA, HIP and MPS, the CUDA runtime (cudaErrorMemoryAllocation), Triton, NCCL
    "can't allocate memory",  # the CPU's allocator
    "not enough memory",
    "std::bad_alloc",
    "ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER, cuFFT
    "ALLOCATION_FAILED",  # cuDNN, from version 9
    "NOT_INITIALIZED when calling `cublasCreate",  # if torch's allocator has left nothing for the handle
    "Failed to CUDA calloc",  # NCCL
)
"""In a RuntimeError that means out of memory. Source: torch's c10/cuda, ATen/cuda/Exceptions and c10d."""


@contextmanager
def explain_out_of_memory(config: RunConfig, dist: DistContext) -> Iterator[None]:
    """For training without a preflight.

    Raises:
        UserError: training, or an evaluation in it, ran out of memory; says which settings to change.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(_out_of_memory_message(error, config, dist)) from error


def _out_of_memory_message(error: Exception, config: RunConfig, dist: DistContext) -> str:
    train, remedies = config.train, ["end other programs on this device (nvidia-smi lists them)"]
    if train.micro_batch_size != 1:
        remedies.append(
            f"lower train.micro_batch_size {train.micro_batch_size}, or set it to auto, which finds the largest that "
            "fits (the batch, and with it the loss, stays the same)"
        )
    if not train.activation_checkpointing:
        remedies.append("set train.activation_checkpointing")
    if dist.world_size > 1 and train.parallel != "fsdp":
        remedies.append("set train.parallel to fsdp")
    remedies.append("lower model.max_seq_len, model.n_layers or model.d_model in a new run")
    return (
        f"out of memory on {device_name(dist.device)}: {out_of_memory_reason(error)}. What helps, in this order: "
        f"{'; '.join(remedies)}. The same command then resumes from the newest checkpoint"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """True if the device or the host refused memory, or if the error was raised because of that."""
    return _refusal(error) is not None


def out_of_memory_reason(error: BaseException) -> str:
    """What was refused, in torch's words, without its advice on settings of its allocator."""
    refusal = _refusal(error) or error
    first_line = str(refusal).partition("\n")[0]
    return first_line.partition(" Of the allocated")[0].removesuffix(".") or type(refusal).__name__


def _refusal(error: BaseException) -> BaseException | None:
    """The error itself, or the one that caused it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return error
    if isinstance(error, RuntimeError) and any(text in str(error) for text in ERROR_TEXTS):
        return error
    # A compiler that tries its kernels wraps the error of one of them.
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return cause and _refusal(cause)
