"""Train a few steps on each engine and save the results. Alone or under torchrun.

train_sharded.py FOLDER [CASE...]    writes FOLDER/CASE-rank<N>.pt for each of CASES, or for those that are named
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from myllm.checkpoint.state import TrainState
from myllm.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from myllm.data.sampler import DataPosition
from myllm.distributed.collectives import DistContext, all_ranks, all_reduce_sum, process_group
from myllm.distributed.parallelize import full_params, full_tensor, parallelize, shard, zero_grad
from myllm.model.transformer import Transformer
from myllm.optim.optimizer import ScheduledOptimizer
from myllm.planning.batch import batch_plan
from myllm.training.gradient_guard import GradientGuard
from myllm.training.setup import RunContext, Trainer
from myllm.training.step import accumulate_gradients, train_step

SEQUENCES, SEQ_LEN, STEPS = 8, 32, 5
MODEL = ModelConfig(
    vocab_size=300, max_seq_len=SEQ_LEN, d_model=16, n_layers=3, n_heads=2, d_ff=24, qk_norm=True, bias=True
)
TRAIN = TrainConfig(batch_tokens=SEQUENCES * SEQ_LEN, micro_batch_size=2, device="cpu")
BASE = RunConfig(model=MODEL, train=TRAIN, optim=OptimConfig(max_lr=1e-2, warmup_steps=0, eps=1e-4, max_grad_norm=0.1))
CASES = {
    "ddp": {},
    "fsdp": {"parallel": "fsdp"},
    "ddp-muon": {},
    "fsdp-muon": {"parallel": "fsdp"},
    "modern": {"parallel": "fsdp"},
    "ddp-bfloat16": {"precision": "bfloat16"},
    "fsdp-bfloat16": {"parallel": "fsdp", "precision": "bfloat16"},
    "ddp-compiled": {"compile": "on"},
    "ddp-compiled-recomputed": {"compile": "on", "activation_checkpointing": True},
    "fsdp-compiled": {"parallel": "fsdp", "compile": "on"},
    "fsdp-compiled-recomputed": {"parallel": "fsdp", "compile": "on", "activation_checkpointing": True},
}


class Numbers:
    """The same sequences in the same global order for any number of ranks, as the real loader deals them out."""

    def __init__(self, process: DistContext, micro_batch_size: int) -> None:
        self.generator = torch.Generator().manual_seed(5)
        self.process, self.size, self.queue = process, micro_batch_size, []

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.queue:
            step = torch.randint(0, MODEL.vocab_size, (SEQUENCES, SEQ_LEN + 1), generator=self.generator)
            self.queue = list(step.split(self.size))[self.process.rank :: self.process.world_size]
        tokens = self.queue.pop(0)
        return tokens[:, :-1], tokens[:, 1:]


def run(case: str, process: DistContext) -> dict[str, object]:
    config = replace(BASE, train=replace(TRAIN, **CASES[case]))
    if case.endswith("muon"):
        config = replace(config, optim=replace(config.optim, optimizer="muon"))
    if case == "modern":
        parts = replace(MODEL, tie_embeddings=False, embedding_norm=True, residual_scales=True, activation="relu2")
        config = replace(config, model=parts)
    model = Transformer(config.model, 1)
    whole = shard(model, config, process)
    optimizer = ScheduledOptimizer(model.named_parameters(), model.hidden_matrices(), config.optim, STEPS, all_ranks())
    runner, batch = parallelize(model, config, process), batch_plan(config, process.world_size)
    loader, guard = Numbers(process, TRAIN.micro_batch_size), GradientGuard(config.train, process.device)
    accumulate_gradients(runner, loader, batch, config, process.device)
    gradients = {name: full_tensor(parameter.grad).clone() for name, parameter in model.named_parameters()}
    zero_grad(runner)
    ctx = RunContext.create(config, process)
    trainer = Trainer(ctx, None, batch, model, whole, runner, optimizer, loader, guard)
    losses, norms, scores = [], [], []
    for step in range(STEPS):
        guard.record(TrainState(step, 0, DataPosition(0, 0, 0, "")))
        loss, norm, _ = train_step(trainer, step)
        losses.append(float(all_reduce_sum(loss)) / process.world_size)
        norms.append(float(norm))
        with full_params(model, whole):
            for _ in range(1 + process.rank):  # as often as each rank likes
                tokens = torch.arange(SEQ_LEN).unsqueeze(0)
                scores.append(whole.evaluate(tokens, tokens)[0].sum().item())
    with full_params(model, whole):
        weights = {name: weight.clone() for name, weight in whole.state_dict().items()}
    kept = sum(parameter.untyped_storage().nbytes() for parameter in whole.parameters())
    part = sum(getattr(p.detach(), "_local_tensor", p.detach()).numel() for p in model.parameters())
    moments = {name: full_tensor(next(reversed(state.values()))) for name, state in optimizer.state_dict().items()}
    return {
        "config": asdict(config.train), "gradients": gradients, "losses": losses, "norms": norms, "weights": weights,
        "moments": moments, "scores": scores[:: 1 + process.rank], "kept_bytes": kept, "part": part,
    }  # fmt: skip


if __name__ == "__main__":
    folder, *cases = sys.argv[1:]
    with process_group("cpu") as process:
        torch.set_num_threads(1)
        for case in cases or CASES:
            torch.save(run(case, process), Path(folder) / f"{case}-rank{process.rank}.pt")
