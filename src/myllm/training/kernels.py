"""Which kernels a run computes with: chosen for as long as it lasts, and said in its log."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from myllm.config import RunConfig
from myllm.distributed import launcher as ranks
from myllm.distributed.collectives import DistContext
from myllm.distributed.parallelize import compile_mode, parallelize
from myllm.distributed.precision import allow_tf32, compute_dtype, describe_precision, has_bfloat16, may_use_tf32
from myllm.model import attention_backend as sdpa
from myllm.model.transformer import Transformer


@contextmanager
def fast_kernels(
    model: Transformer, config: RunConfig, process: DistContext, log: Callable[[str], None] = lambda line: None
) -> Iterator[nn.Module]:
    """What training calls, and for the length of a `with` block the fastest kernels that compute what the config asks
    for.

    They come together, so that a run, its rehearsal, the trials of a micro-batch and a benchmark compile under the same
    settings: what is compiled is for those it was compiled under, and others would mean other kernels, made once more.
    """
    if config.train.deterministic:
        ranks.make_cublas_deterministic()
    with allow_tf32(config, process.device), sdpa.use_newer_flash(config.model, process.device) as remark:
        log_kernels(model, config, process, log)
        if remark:
            log(f"attention: {remark}")
        yield parallelize(model, config, process)


def log_kernels(model: Transformer, config: RunConfig, process: DistContext, log: Callable[[str], None]) -> None:
    device = process.device
    dtype = compute_dtype(config.train.precision, device)
    choice = sdpa.selected_backend(config.model, device, dtype, config.train)
    products = describe_precision(config.train.precision, device)
    if dtype is not torch.float32 and device.type == "cuda":
        products += ", TF32 for what is left in float32" if may_use_tf32(config, device) else ", the rest in float32"
    compiled = {"": "nothing compiled", "whole": "compiled as one graph", "block by block": "compiled block by block"}
    how = compiled[compile_mode(model, config, device)]
    repeats = "; steps repeat themselves bit for bit" if config.train.deterministic else ""
    log(f"kernels: attention by the {choice.name} kernel; matrix products in {products}; {how}{repeats}")
    if dtype is torch.bfloat16 and device.type == "cuda" and not has_bfloat16(device):
        log(
            "warning: this card has no bfloat16 arithmetic, and what stands in for it is many times slower: leave "
            "train.precision at auto, which is float16 with a loss scale here"
        )
    if choice.name == "math" and device.type == "cuda" and config.train.attention != "math":
        why = "".join(f"\n  - {refusal}" for refusal in choice.rejections)
        log(
            "warning: attention runs on torch's math path, which holds all T x T scores and is many times slower than "
            f"a fused kernel. Torch refuses the others for this model{':' if why else ', and does not say why'}{why}"
        )
