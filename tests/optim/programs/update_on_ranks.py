"""Make the same updates with Muon on every number of ranks, with whole parameters and with FSDP2's shards.

update_on_ranks.py FOLDER    under torchrun; writes FOLDER/KIND-rank<N>.pt
"""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from myllm.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from myllm.distributed.collectives import DistContext, all_ranks, process_group
from myllm.distributed.parallelize import apply_fsdp, full_tensor, shard_like
from myllm.model.transformer import Transformer
from myllm.optim import muon
from myllm.optim.optimizer import ScheduledOptimizer

# 3 layers: 6 squares of 20, 6 of 10 x 20, 9 of 27 x 20. Neither they nor their rows can be divided by 2 and by 3.
MODEL = ModelConfig(vocab_size=50, max_seq_len=8, d_model=20, n_layers=3, n_heads=2, n_kv_heads=1, d_ff=27)
OPTIM = OptimConfig(optimizer="muon", warmup_steps=0, cautious_decay=True, muon_momentum_warmup_steps=4)


def run(kind: str, process: DistContext) -> dict[str, object]:
    config = RunConfig(model=MODEL, optim=OPTIM, train=TrainConfig(device="cpu", precision="float32"))
    if kind == "few":  # the 2 matrices of 10 x 20 are fewer than 3 ranks
        config = replace(config, model=replace(MODEL, n_layers=1))
    model = Transformer(config.model, 1)
    if kind != "whole":
        apply_fsdp(model, config, process)
    optimizer = ScheduledOptimizer(model.named_parameters(), model.hidden_matrices(), OPTIM, 40, all_ranks())
    generator = torch.Generator().manual_seed(3)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for step in range(4):
            for parameter in model.parameters():
                gradient = torch.randn(parameter.shape, generator=generator) * (torch.nan if step == 2 else 64.0)
                parameter.grad = shard_like(gradient, parameter)
            optimizer.step(step, skip=torch.tensor(float(step == 2)), grad_scale=torch.tensor(64.0))
    messages = Counter(event.name for event in seen.events() if event.name.startswith("gloo:"))
    state = {f"{name}/{key}": x for name, kinds in optimizer.state_dict().items() for key, x in kinds.items()}
    tensors = {name: full_tensor(tensor.detach()) for name, tensor in (state | optimizer.parameters).items()}
    return {"tensors": tensors, "messages": messages}


if __name__ == "__main__":
    muon.iteration_dtype = lambda device: torch.float32
    with process_group("cpu") as process:
        torch.set_num_threads(1)
        for kind in ("whole", "shards", "few"):
            torch.save(run(kind, process), Path(sys.argv[1]) / f"{kind}-rank{process.rank}.pt")
