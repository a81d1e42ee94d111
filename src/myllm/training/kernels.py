"""The kernels that training computes with: torch.compile, or eager."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from myllm.config import RunConfig
from myllm.distributed import launcher as ranks
from myllm.distributed.collectives import DistContext
from myllm.distributed.parallelize import compile_mode, parallelize
from myllm.distributed.precision import allow_tf32, compute_dtype, describe_precision, has_bfloat16, may_use_tf32
from myllm.errors import UserError
from myllm.model import attention_backend as sdpa
from myllm.model.transformer import Transformer
from myllm.planning.batch import batch_plan
from myllm.planning.forecast import MPS_TOKENS


@contextmanager
def fast_kernels(
    model: Transformer, config: RunConfig, dist: DistContext, log: Callable[[str], None] = lambda line: None
) -> Iterator[nn.Module]:
    """The model to train, wrapped and compiled. Inside the `with` block torch uses the fastest kernels that compute
    what the config asks for.

    Both come from here because compiled code depends on the settings it was compiled under: a run, its rehearsal and
    the micro-batch trial must have the same, or they would compile again.

    Raises:
        UserError: the micro-batch is too large for MPS.
    """
    if dist.device.type == "mps":
        check_mps_tokens(config)
    if config.train.deterministic:
        ranks.make_cublas_deterministic()
    with allow_tf32(config, dist.device), sdpa.use_newer_flash(config.model, dist.device) as remark:
        log_kernels(model, config, dist.device, log)
        if remark:
            log(f"attention: {remark}")
        yield parallelize(model, config, dist)


def check_mps_tokens(config: RunConfig) -> None:
    """
    Raises:
        UserError: gradients would be wrong, without an error of torch's.
    """
    size, length = config.train.micro_batch_size, config.model.max_seq_len
    tokens = batch_plan(config, 1).micro_tokens
    if tokens > MPS_TOKENS:
        raise UserError(
            f"train.micro_batch_size {size} x model.max_seq_len {length:,} is {tokens:,} tokens, but on MPS the "
            f"gradients of more than {MPS_TOKENS:,} may be wrong (https://github.com/pytorch/pytorch/issues/195163); "
            "set train.micro_batch_size to auto, or lower model.max_seq_len"
        )


def log_kernels(model: Transformer, config: RunConfig, device: torch.device, log: Callable[[str], None]) -> None:
    dtype = compute_dtype(config.train.precision, device)
    choice = sdpa.selected_backend(config.model, device, dtype, config.train)
    products = describe_precision(config.train.precision, device)
    if dtype is not torch.float32 and device.type == "cuda":
        products += ", TF32 for what is left in float32" if may_use_tf32(config, device) else ", the rest in float32"
    names = {"": "torch.compile off", "whole": "compiled as one graph", "block by block": "compiled block by block"}
    compiled = names[compile_mode(model, config, device)]
    deterministic = "; deterministic" if config.train.deterministic else ""
    log(f"kernels: attention by the {choice.name} kernel; matrix products in {products}; {compiled}{deterministic}")
    if dtype is torch.bfloat16 and device.type == "cuda" and not has_bfloat16(device):
        log(
            "warning: this GPU has no bfloat16 arithmetic, and torch's emulation is many times slower: set "
            "train.precision to auto, which is float16 with a loss scale here"
        )
    if choice.name == "math" and device.type == "cuda" and config.train.attention != "math":
        rejections = "".join(f"\n  - {rejection}" for rejection in choice.rejections) or " no reason given"
        log(
            "warning: attention runs on torch's math backend, which stores all T x T scores and is many times slower "
            f"than a fused kernel. Torch rejects the fused kernels for this model:{rejections}"
        )
