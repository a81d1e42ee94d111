"""Started by torchrun: `save FOLDER` trains a small model whole on each rank and one in parts, saves both, and says
what each holds; `load FOLDER` reads each of the two into a model of each kind and compares."""

import errno
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from myllm.checkpoint import dcp as sharded
from myllm.checkpoint import format as checkpoint
from myllm.checkpoint.async_saver import AsyncSaver
from myllm.checkpoint.state import TrainState
from myllm.config import ModelConfig, OptimConfig, RunConfig
from myllm.data.sampler import DataPosition
from myllm.data.tokenizer.load import load_tokenizer
from myllm.distributed import collectives as distributed
from myllm.distributed.collectives import DistContext, process_group
from myllm.errors import TrainingDiverged, UserError
from myllm.model.transformer import Transformer
from myllm.optim.optimizer import ScheduledOptimizer
from myllm.optim.ranks import local
from myllm.paths import RunPaths

KINDS = ("whole", "parts")
MODEL = ModelConfig(vocab_size=250, max_seq_len=16, d_model=24, n_layers=3, n_heads=2, d_ff=40, bias=True)


def make(kind: str, seed: int) -> tuple[Transformer, ScheduledOptimizer]:
    model = Transformer(MODEL, seed)
    if kind == "parts":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, ScheduledOptimizer(model.named_parameters(), model.hidden_matrices(), OptimConfig(warmup_steps=0), 10)


def step(model: Transformer, optimizer: ScheduledOptimizer, number: int) -> None:
    tokens = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(number))
    model(tokens, tokens).backward()
    optimizer.step(number)
    optimizer.zero_grad()


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    full = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in tensors.items()}
    return {name: each.detach().clone() for name, each in full.items()}


def contents(model: Transformer, optimizer: ScheduledOptimizer) -> dict[str, dict[str, torch.Tensor]]:
    moments = sharded.flatten_moments(optimizer.state_dict())
    return {"weights": whole(model.state_dict()), "optimizer": whole(moments)}


def save(folder: Path, process: DistContext) -> None:
    for kind in KINDS:
        model, optimizer = make(kind, seed=3)
        config = replace(RunConfig(name=kind, model=MODEL), train=replace(RunConfig().train, keep_last=2))
        run = RunPaths(folder / kind)
        with AsyncSaver(config, run, model, optimizer, load_tokenizer("r50k_base"), process) as saver:
            for number in range(3):
                step(model, optimizer, number)
                at_save = contents(model, optimizer)
                saver.save(TrainState(number + 1, 0, DataPosition(0, 0, 0, "x")))
                # What training does now must not show in what was just saved.
                step(model, optimizer, 100 + number)
            saver.wait()
            assert saver.written_step == 3
            if process.is_rank_zero:
                torch.save(at_save, folder / f"{kind}.pt")
            fails_alike(saver, run, model, process)


def fails_alike(saver: AsyncSaver, run: RunPaths, model: Transformer, process: DistContext) -> None:
    """What goes wrong on rank 1 alone, or in its share alone, is said by both, and leaves nothing behind."""
    real, state = checkpoint._write_rank_files, TrainState(9, 0, DataPosition(0, 0, 0, "x"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint._write_rank_files = full if process.rank == 1 else real
    saver.save(state)
    said = ""
    try:
        saver.wait()
    except UserError as error:
        said = str(error)
    assert "no space to save step 9" in said, said
    checkpoint._write_rank_files = real
    weight = local(model.blocks[2].feed_forward.down_proj.weight.detach())
    before = weight.clone()
    if process.rank == 1 or not isinstance(model.norm.weight, DTensor):
        weight.view(-1)[0] = float("nan")
    saw = ""
    try:
        saver.save(state)
    except TrainingDiverged as error:
        saw = str(error)
    assert "blocks.2.feed_forward.down_proj.weight" in saw, saw
    weight.copy_(before)
    distributed.barrier()
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_00000002", "step_00000003"]


def load(folder: Path) -> None:
    for saved in KINDS:
        expected = torch.load(folder / f"{saved}.pt", weights_only=True)
        found = checkpoint.load_latest(folder / saved / "checkpoints", print)
        assert found is not None
        for kind in KINDS:
            model, optimizer = make(kind, seed=4)
            sharded.read_into(found.folder / "weights", model.state_dict())
            moments = optimizer.zero_state()
            sharded.read_into(found.folder / "optimizer", sharded.flatten_moments(moments))
            optimizer.load_state_dict(moments)
            here = contents(model, optimizer)
            for part, tensors in expected.items():
                assert here[part].keys() == tensors.keys()
                for name, tensor in tensors.items():
                    assert torch.equal(here[part][name], tensor), (saved, kind, name)


if __name__ == "__main__":
    with process_group("cpu") as this:
        root = Path(sys.argv[2])
        if sys.argv[1] == "save":
            save(root, this)
        load(root)
