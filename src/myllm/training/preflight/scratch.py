"""A temporary folder on the disk of the runs, with random data. Nothing of it outlasts the rehearsal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from myllm import paths
from myllm.checkpoint.rng import get_rng_state, set_rng_state
from myllm.config import RunConfig
from myllm.data.dataset import FORMAT, MANIFEST, Dataset
from myllm.data.token_stream import Shard
from myllm.data.tokenizer.base import Tokenizer
from myllm.distributed import collectives as distributed
from myllm.distributed.collectives import DistContext
from myllm.files import file_sha256, nearest_existing, temporary_dir, write_json
from myllm.planning.batch import batch_plan

from .device_memory import reset_peak

DOCUMENT_TOKENS = 256


@contextmanager
def scratch_folder(dist: DistContext) -> Iterator[Path]:
    """A temporary folder, the same on all ranks. Afterwards the folder is gone, the random state is restored, and
    torch.compile has forgotten the shapes it saw. The folder of a killed rehearsal is removed by the next one.
    """
    rng_state = get_rng_state(dist.device)
    parent = nearest_existing(paths.runs_dir())
    try:
        with temporary_dir(parent / "preflight") if dist.is_rank_zero else nullcontext() as created:
            yield distributed.broadcast_object(created)
            distributed.barrier()  # not after an error, which may be this rank's alone
    finally:
        reset_compiler()
        reset_peak(dist.device)
        set_rng_state(rng_state, dist.device)


def reset_compiler() -> None:
    """Make torch.compile treat the next shape as the first one, as in the run."""
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch.compiler.reset()


def random_dataset(config: RunConfig, folder: Path, tokenizer: Tokenizer, dist: DistContext) -> Dataset:
    """Random tokens: enough for one training step, and for one validation batch on each rank."""
    batch = batch_plan(config, dist.world_size)
    tokens = {
        "train": batch.sequences * batch.seq_len + 1,
        "val": max(batch.micro_tokens, 8 * DOCUMENT_TOKENS) + 1,
    }
    folder = folder / "dataset"
    if dist.is_rank_zero:
        folder.mkdir(exist_ok=True)
        rng, shards = np.random.Generator(np.random.PCG64(config.train.seed)), []
        for split, count in tokens.items():
            array = rng.integers(min(tokenizer.vocab_size, config.model.vocab_size), size=count, dtype=tokenizer.dtype)
            array[::DOCUMENT_TOKENS] = tokenizer.end_of_text
            file, documents = folder / f"{split}_00000.npy", -(-count // DOCUMENT_TOKENS)
            np.save(file, array)
            shards.append(asdict(Shard(file.name, split, count, documents, file_sha256(file))))
        manifest = {"format": FORMAT, "fingerprint": "random", "source": "random", "tokenizer": tokenizer.describe()}
        write_json(folder / MANIFEST, manifest | {"shards": shards})
    distributed.barrier()
    return Dataset.open(folder)
