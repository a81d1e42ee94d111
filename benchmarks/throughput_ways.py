"""The ways to train one model that throughput.py compares, each with the same weights, text and optimizer.

Shapes: B micro-batch, T sequence, V vocabulary.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from myllm.config import ModelConfig, RunConfig
from myllm.data.dataloader import BatchLoader, read_batch
from myllm.data.dataset import Dataset
from myllm.data.sampler import DataPosition, count_sequences, rank_rows, step_sequences, window_sequences
from myllm.data.transfer import Batch
from myllm.distributed.collectives import DistContext
from myllm.distributed.parallelize import sync_grads_on_last
from myllm.distributed.precision import autocast
from myllm.hub.architectures import CLASSES, select_architecture, transformers_config
from myllm.hub.weights import export_weights
from myllm.model.transformer import Transformer
from myllm.optim.optimizer import ScheduledOptimizer
from myllm.paths import RunPaths
from myllm.planning.batch import BatchPlan, batch_plan
from myllm.training.setup import RunContext, build
from myllm.training.step import train_step

REFERENCE_DROPOUT = {"dropout_attention_residual": 0.1, "dropout_ffn": 0.15}
REFERENCE_MICRO_BATCH = 16
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Way:
    """One way to train, ready to step."""

    name: str
    step: Callable[[], Tensor]
    """One optimizer update; gives this rank's mean loss, on the device, and waits for nothing."""
    wait_s: Callable[[], float]
    """Time so far that training stood waiting for a batch."""
    held_bytes: int
    """Weights and AdamW's two moments: what this way has in memory between steps."""
    batch: BatchPlan


# -- models that compute the same -------------------------------------------------------------------------------------


class KeptLogits(nn.Module):
    """The loss as the reference's loop takes it: of full logits, which the caller gets too."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """
        Shapes:
            tokens and targets (B, T); returns a scalar and (B, T, V)
        """
        logits = self.model(tokens)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits


class PeerLoss(nn.Module):
    """A causal model of transformers with the loss that it computes itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        # Our targets are one token ahead already; given labels alone it would shift them again.
        return self.model(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss, None


def reference_shape(model: ModelConfig) -> ModelConfig:
    """The same model with the reference's dropout, and no rows beyond the vocabulary."""
    return replace(model, vocab_multiple=1, **REFERENCE_DROPOUT)


def reference_model(model: ModelConfig, weights: Weights) -> KeptLogits:
    reference = Transformer(reference_shape(model))
    reference.load_state_dict({name: weights[name][: len(tensor)] for name, tensor in reference.state_dict().items()})
    return KeptLogits(reference)


def has_transformers() -> bool:
    try:
        import transformers  # noqa: F401 (only whether it is there)
    except ImportError:
        return False
    return True


def peer_model(model: ModelConfig, weights: Weights) -> PeerLoss:
    """What an export of the model opens as in transformers, with SDPA; Llama, or Qwen3 where it has QK-norm."""
    from transformers import AutoConfig, AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**transformers_config(model, 0, "float32")), attn_implementation="sdpa"
    )
    peer.load_state_dict(export_weights(select_architecture(model), model, weights), strict=not model.tie_embeddings)
    peer.tie_weights()
    return PeerLoss(peer)


# -- their steps ------------------------------------------------------------------------------------------------------


def ours(
    config: RunConfig, process: DistContext, dataset: Dataset, stack: ExitStack, say: Callable[[str], None]
) -> Way:
    """What pretrain.py's loop does between two log lines. Its choice of kernels holds for the whole process, so the
    other ways have it too."""
    batch = batch_plan(config, process.world_size)
    ctx = RunContext.create(config, process, RunPaths(dataset.folder.parent / "run"), say)
    trainer, state = stack.enter_context(build(ctx, dataset, batch))
    done = 0

    def step() -> Tensor:
        nonlocal done
        trainer.guard.record(replace(state, step=done))
        loss, _, _ = train_step(trainer, done)
        done += 1
        if done % config.train.log_every_steps == 0:
            trainer.guard.sync()
        return loss

    return Way("myllm", step, lambda: trainer.loader.wait_s, held_bytes(trainer.model), batch)


def reference(config: RunConfig, process: DistContext, dataset: Dataset, weights: Weights) -> Way:
    """The reference's loop around this project's model: no padding, dropout, logits kept, tables copied, no reading
    ahead; 16 sequences a micro-step on a GPU."""
    batch = batch_plan(config, process.world_size)
    if process.device.type != "cpu":
        sequences = batch.sequences // process.world_size
        batch = replace(batch, micro_batch_size=min(REFERENCE_MICRO_BATCH, sequences))
    model = reference_model(config.model, weights).to(process.device)
    loader = SynchronousLoader(dataset, batch, config.train.seed, process)
    # Its tables live on the host and travel with every call.
    tables = [(table, table.cpu()) for name, table in model.named_buffers() if "rotary" in name]

    def copy_tables() -> None:
        for table, source in tables:
            table.copy_(source)

    step = plain_step(model, loader, batch, config, process, copy_tables)
    return Way("the reference's way", step, lambda: loader.wait_s, held_bytes(model), batch)


def peer(config: RunConfig, process: DistContext, dataset: Dataset, weights: Weights, stack: ExitStack) -> Way:
    """transformers' model in a loop of the same size, with this project's loader and optimizer."""
    batch = batch_plan(config, process.world_size)
    model = peer_model(config.model, weights).to(process.device)
    position = DataPosition(0, 0, config.train.seed, dataset.fingerprint)
    loader = stack.enter_context(BatchLoader(dataset.order(batch), batch, position, process.rank, process.device))
    step = plain_step(model, loader, batch, config, process)
    name = f"transformers {CLASSES[select_architecture(config.model)]}"
    return Way(name, step, lambda: loader.wait_s, held_bytes(model), batch)


def plain_step(
    model: KeptLogits | PeerLoss,
    loader: "BatchLoader | SynchronousLoader",
    batch: BatchPlan,
    config: RunConfig,
    process: DistContext,
    before: Callable[[], None] = lambda: None,
) -> Callable[[], Tensor]:
    """The usual training step: accumulate, clip, update."""
    # AdamW, as peers use it.
    optimizer = ScheduledOptimizer(model.named_parameters(), {}, config.optim, config.train.max_steps)
    compiled = config.train.compile == "on" or (config.train.compile == "auto" and process.device.type == "cuda")
    runner: nn.Module = torch.compile(model, dynamic=False) if compiled else model
    if process.world_size > 1:
        devices = [process.device] if process.device.type == "cuda" else None
        runner = DistributedDataParallel(runner, devices, gradient_as_bucket_view=True)
    runner.train()
    done = 0

    def step() -> Tensor:
        nonlocal done
        total = torch.zeros((), device=process.device)
        for micro_step in range(batch.grad_accum_steps):
            tokens, targets = loader.next_batch()
            before()
            with sync_grads_on_last(runner, micro_step == batch.grad_accum_steps - 1):
                with autocast(config, process.device):
                    loss, _kept = runner(tokens, targets)
                loss = loss / batch.grad_accum_steps
                loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(optimizer.parameters.values(), config.optim.max_grad_norm)
        optimizer.step(done)
        optimizer.zero_grad()
        done += 1
        return total

    return step


class SynchronousLoader:
    """Batches that are read, converted and copied while training waits. The same ones as Loader's."""

    def __init__(self, dataset: Dataset, batch: BatchPlan, seed: int, process: DistContext) -> None:
        self.wait_s = 0.0
        self._order, self._batch, self._process = dataset.order(batch), batch, process
        self._n_sequences = count_sequences(dataset.train.tokens, batch.seq_len)
        self._position = DataPosition(0, 0, seed, dataset.fingerprint)
        self._micro_step = 0

    def next_batch(self) -> Batch:
        started = time.perf_counter()
        batch, process = self._batch, self._process
        window = window_sequences(batch.seq_len)
        step = step_sequences(self._position, batch.sequences, self._n_sequences, window)
        mine = rank_rows(self._micro_step, process.rank, process.world_size, batch.micro_batch_size)
        tokens, targets = read_batch(self._order, step[mine])
        self._micro_step += 1
        if self._micro_step == batch.grad_accum_steps:
            self._micro_step = 0
            self._position = self._position.advance(batch.sequences, self._n_sequences)
        rows = tokens.to(process.device), targets.to(process.device)
        self.wait_s += time.perf_counter() - started
        return rows


def held_bytes(model: nn.Module) -> int:
    """Of this rank: where FSDP spreads a matrix, its part."""
    parameters = (getattr(p, "to_local", lambda p=p: p)() for p in model.parameters())
    return sum(3 * p.numel() * p.element_size() for p in parameters)
