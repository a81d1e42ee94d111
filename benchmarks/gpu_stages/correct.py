"""Whether the card computes what the model says: losses and every gradient, against float64, of four kinds of models.

Shapes: B sequences, T tokens of each, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from myllm.config import ModelConfig, RunConfig
from myllm.data.transfer import Batch
from myllm.model.transformer import Transformer
from myllm.planning.batch import batch_plan
from myllm.training.kernels import fast_kernels
from myllm.training.preflight.device_memory import available_bytes
from myllm.training.step import accumulate_gradients

from .bench import NO_DROPOUT, Bench, fresh, graph_breaks, graphs, worst_error
from .frame import Check, correct, skipped

SEQUENCES = 3
"""A micro-batch: more tokens than one chunk of the loss has, and no whole number of chunks."""
SECONDS = 30
"""That one kind of model takes."""
GRADIENT = {"float32": 2e-5, "bfloat16": 1e-1}
"""Relative error of one tensor's gradient that the type explains (on a CPU 3e-6 and 3e-2, QK-norm's weights at most);
of a loss far less, a mean over thousands."""
LOSS = {"float32": 5e-6, "bfloat16": 2e-3}
WAYS = {"eager float32": "", "eager bfloat16": "", "whole bfloat16": "model", "compiled bfloat16": "block"}
"""And what is compiled in each; the last one's graphs are counted. As a whole, only the reference: that takes long."""
COMPILED_SLACK = 2.5
"""Compiled gradients may be this many times as far off as those of single operations."""
Gradients = dict[str, Tensor]


def kinds(bench: Bench) -> dict[str, ModelConfig]:
    """Two layers each, at full width, without dropout: between them they have every part that a preset uses."""
    models = {
        "reference": bench.model("lf-llm-269m", 2),  # RoPE, RMSNorm, SwiGLU, biases
        "modern": bench.model("default-150m", 2),  # QK-norm
        "gpt2": bench.model("gpt2-124m", 2),  # learned positions, LayerNorm, GELU
    }
    grouped = replace(models["modern"], n_kv_heads=models["modern"].n_heads // 2, activation="relu2")
    models["grouped"] = replace(grouped, tie_embeddings=False)
    small = {"vocab_size": 300} if bench.tiny else {}
    return {name: replace(model, **NO_DROPOUT, **small) for name, model in models.items()}


def run(bench: Bench) -> Iterator[Check]:
    for name, model in kinds(bench).items():
        if not bench.has_time(SECONDS):
            yield skipped(name, f"needs {SECONDS} s")
            continue
        yield from compare(name, model, bench)
        fresh(bench.device)


def compare(name: str, model: ModelConfig, bench: Bench) -> Iterator[Check]:
    """Eager float32, then eager and compiled bfloat16, each against float64."""
    ways = {way: unit for way, unit in WAYS.items() if unit != "model" or name == "reference"}
    batch = tokens_and_targets(model, bench.device, SEQUENCES if bench.tiny or roomy(bench) else 1)
    expected_loss, expected = reference(model, batch, bench.device)
    losses, errors, worst = {}, {}, {}
    for way, unit in ways.items():
        fresh(bench.device)
        loss, gradients = ours(bench, model, batch, way.split()[1], "on" if unit else "off", unit=unit or "block")
        losses[way] = abs(loss - expected_loss) / expected_loss
        errors[way], worst[way] = worst_error(gradients, expected)
    count, breaks = graphs(), graph_breaks()
    # A compiler fuses, and so rounds elsewhere.
    by_compiler = min(GRADIENT["bfloat16"], COMPILED_SLACK * errors["eager bfloat16"] + GRADIENT["float32"])
    limits = {way: by_compiler if unit else GRADIENT[way.split()[1]] for way, unit in ways.items()}
    yield within(f"{name}, loss", losses, {way: LOSS[way.split()[1]] for way in losses}, float64=expected_loss)
    yield within(f"{name}, {len(expected)} gradients", errors, limits, worst=worst)
    yield correct(f"{name}, graphs", breaks == 0 and count in (1, 2), f"{count}, {breaks} breaks", "1 or 2, 0 breaks")


def roomy(bench: Bench) -> bool:
    """Whether float64's scores and logits of several sequences fit."""
    return available_bytes(bench.device) >= 40 * 2**30


def within(name: str, errors: dict[str, float], limits: dict[str, float], **values: Any) -> Check:
    """Several ways' relative errors in one row."""
    right = all(errors[way] <= limits[way] for way in errors)  # NaN is not
    measured = ", ".join(f"{way} {error:.1e}" for way, error in errors.items())
    expected = "up to " + ", ".join(f"{limit:.0e}" for limit in limits.values())
    return correct(name, right, measured, expected, errors=errors, limits=limits, **values)


def tokens_and_targets(model: ModelConfig, device: torch.device, sequences: int = SEQUENCES) -> Batch:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(model.vocab_size, (sequences, model.max_seq_len + 1), generator=generator).to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def rough_weights(model: ModelConfig) -> dict[str, Tensor]:
    """Weights that no part is indifferent to: fresh norms are 1, fresh biases 0."""
    weights, generator = Transformer(model).state_dict(), torch.Generator().manual_seed(0)
    for tensor in weights.values():
        tensor += (0.02 if tensor.ndim == 2 else 0.2) * torch.randn(tensor.shape, generator=generator)
    return weights


def reference(model: ModelConfig, batch: Batch, device: torch.device) -> tuple[float, Gradients]:
    """In float64, through full logits and autograd's own cross-entropy: none of this project's loss is in it."""
    transformer = Transformer(model).to(device)
    transformer.load_state_dict(rough_weights(model))
    transformer.double()
    tokens, targets = batch
    logits = transformer(tokens)  # (B, T, V)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in transformer.named_parameters()}


class OneBatch:
    """In place of a loader: the same micro-batch for ever."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def next_batch(self) -> Batch:
        return self._batch


def ours(
    bench: Bench,
    model: ModelConfig,
    batch: Batch,
    precision: str,
    compiled: str,
    loss_scale: Tensor | None = None,
    unit: str = "block",
) -> tuple[float, Gradients]:
    """A step's loss and gradients by the functions that training calls, twice: a recompile would be counted.

    Args:
        loss_scale: that the gradients are multiplied by; None: nothing.
    """
    base, sequences = bench.config(), len(batch[0])
    train = replace(
        base.train, precision=precision, compile=compiled, compile_unit=unit, micro_batch_size=sequences,
        batch_tokens=2 * sequences * model.max_seq_len,
    )  # fmt: skip
    config: RunConfig = replace(base, model=model, train=train)
    transformer = Transformer(model).to(bench.device)
    transformer.load_state_dict(rough_weights(model))
    steps = batch_plan(config, 1)
    with fast_kernels(transformer, config, bench.process) as runner:
        for _ in range(2):
            transformer.zero_grad(set_to_none=True)
            loss = accumulate_gradients(
                runner, OneBatch(batch), steps, config, bench.process.device, loss_scale=loss_scale
            )
    return loss.item(), {name: parameter.grad for name, parameter in transformer.named_parameters()}
