"""Write the first step's gradient for several micro-batch sizes. Run under torchrun.

write_gradients.py CONFIG.json FOLDER SIZE...    writes FOLDER/micro<SIZE>-rank<N>.pt
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from myllm.config import RunConfig, load_config
from myllm.data.dataloader import BatchLoader
from myllm.data.prepare.prepare import prepare
from myllm.data.sampler import DataPosition
from myllm.distributed.collectives import process_group
from myllm.distributed.parallelize import parallelize
from myllm.model.transformer import Transformer
from myllm.planning.batch import batch_plan
from myllm.training.step import accumulate_gradients


def main(path: str, folder: str, *sizes: str) -> None:
    base = load_config(Path(path), RunConfig())
    dataset = prepare(base.data, progress=False)
    with process_group("cpu") as process:
        torch.set_num_threads(1)
        for size in map(int, sizes):
            config = replace(base, train=replace(base.train, micro_batch_size=size))
            model = Transformer(config.model, config.train.seed)
            batch = batch_plan(config, process.world_size)
            position = DataPosition(0, 0, config.train.seed, dataset.fingerprint)
            with BatchLoader(dataset.order(batch), batch, position, process.rank, process.device) as loader:
                accumulate_gradients(parallelize(model, config, process), loader, batch, config, process.device)
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            torch.save(gradients, Path(folder) / f"micro{size}-rank{process.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
