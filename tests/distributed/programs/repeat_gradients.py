"""The gradient of one batch, three times in a row, on each engine: are they equal from the first step on?

repeat_gradients.py FOLDER    writes FOLDER/rank<N>.json: for each engine, whether all three were the same to the bit
"""

import json
import sys
from pathlib import Path

import torch

from myllm.config import ModelConfig, RunConfig, TrainConfig
from myllm.distributed.collectives import process_group
from myllm.distributed.parallelize import full_tensor, parallelize, shard, sync_grads_on_last, zero_grad
from myllm.model.transformer import Transformer

# Gradients of 3.1 MB: more than DDP's first bucket takes, which is what makes it cut them again.
MODEL = ModelConfig(vocab_size=8_000, max_seq_len=32, d_model=64, n_layers=4, n_heads=2, d_ff=256, bias=True)

if __name__ == "__main__":
    with process_group("cpu") as process:
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, 8_000, (process.world_size, 2, 2, 33), generator=generator)[process.rank]
        found = {}
        for engine in ("ddp", "fsdp"):
            train = TrainConfig(micro_batch_size=2, parallel=engine, device="cpu")
            config = RunConfig(model=MODEL, train=train)
            model = Transformer(MODEL, 1)
            shard(model, config, process)
            runner, gradients = parallelize(model, config, process), []
            for _ in range(3):
                for micro_step in range(2):
                    with sync_grads_on_last(runner, micro_step == 1):
                        runner(tokens[micro_step, :, :-1], tokens[micro_step, :, 1:]).backward()
                gradients.append([full_tensor(parameter.grad).clone() for parameter in model.parameters()])
                zero_grad(runner)
            found[engine] = [all(map(torch.equal, gradients[0], other)) for other in gradients[1:]]
        Path(sys.argv[1], f"rank{process.rank}.json").write_text(json.dumps(found))
