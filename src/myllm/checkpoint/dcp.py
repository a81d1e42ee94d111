"""Store named tensors in a folder, in the format of torch.distributed.checkpoint (DCP). Each rank writes its own files.

The planners and the files are PyTorch's. The collectives between them are ours, so that a save can run in the
background on its own process group, errors are the same on every rank, and a single process needs no group.
Source: torch/distributed/checkpoint, _save_state_dict and _load_state_dict.
"""

import dataclasses
import enum
import pickle
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from myllm.distributed.collectives import group_rank, run_on_all_ranks
from myllm.errors import UserError
from myllm.optim.optimizer import ScheduledOptimizer
from myllm.optim.ranks import local

from .layout import METADATA, OPTIMIZER, WEIGHTS

ALLOWED_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}  # fmt: skip

K = TypeVar("K", bound=Hashable)


def write_tensors(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Write the tensors of all ranks into one folder. Rank 0 writes `.metadata` once all files are flushed.

    Args:
        folder: on a file system that all ranks share.
        tensors: on the CPU. Of a DTensor, which all ranks have, each writes its shard. A plain tensor must be given by
            one rank only.
        group: all of its ranks call this. None: the default group, or this process alone.

    Raises:
        Exception: the error of this rank, or `RemoteRankError` if another rank failed.
    """
    first = group_rank(group) == 0
    # Copying ahead is for GPU tensors, and would wait for work that training has queued there.
    planner, writer = DefaultSavePlanner(), _Writer(folder, sync_files=True, per_thread_copy_ahead=0)
    metadata: Metadata | None = None

    def plan_locally() -> Any:
        planner.set_up_planner(tensors, is_coordinator=first)
        writer.set_up_storage_writer(first)
        return writer.prepare_local_plan(planner.create_local_plan())

    def plan_globally() -> Any:
        nonlocal metadata
        if not first:
            return None
        plans, metadata = planner.create_global_plan(local_plans)
        return writer.prepare_global_plan(plans)

    local_plans = run_on_all_ranks(plan_locally, group)
    plan = run_on_all_ranks(plan_globally, group)[0][group_rank(group)]
    results = run_on_all_ranks(lambda: writer.write_data(planner.finish_plan(plan), planner).wait(), group)
    run_on_all_ranks(lambda: writer.finish(metadata, results) if metadata is not None else None, group)


def read_into(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, on any device, with those of the same names in a folder. Of a DTensor, only this rank's shard.

    Raises:
        UserError: the names or shapes differ.
    """
    reader, planner = _Reader(folder), DefaultLoadPlanner()
    metadata = reader.read_metadata()
    saved = {name: tuple(entry.size) for name, entry in _entries(metadata).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if different := sorted(saved.items() ^ expected.items()):
        names = ", ".join(dict.fromkeys(name for name, _ in different[:6]))
        raise UserError(f"the tensors in {folder} do not fit this model: {names} differ in name or shape")
    planner.set_up_planner(tensors, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    with torch.no_grad():
        reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()


def read_weights(folder: Path, model: nn.Module) -> None:
    """Read a checkpoint's weights into a model, which may be sharded: each rank reads its own part.

    Raises:
        UserError: the checkpoint is of another model.
    """
    read_into(folder / WEIGHTS, model.state_dict())


def read_moments(folder: Path, optimizer: ScheduledOptimizer) -> None:
    """Read a checkpoint's moments into an optimizer, as `read_weights`.

    Raises:
        UserError: the checkpoint is of another model or optimizer.
    """
    moments = optimizer.state_dict()
    if moments.keys() != optimizer.parameters.keys():  # no step yet
        moments = optimizer.zero_state()
    read_into(folder / OPTIMIZER, flatten_moments(moments))
    optimizer.load_state_dict(moments, copy=False)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors in a folder, unsharded, to the CPU, in one process."""
    entries = _entries(_Reader(folder).read_metadata())
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    read_into(folder, tensors)
    return tensors


def tensor_names(folder: Path) -> list[str]:
    return list(_Reader(folder).read_metadata().state_dict_metadata)


def rank_tensors(tensors: dict[K, Tensor], rank: int, world_size: int) -> dict[K, Tensor]:
    """What this rank writes: all DTensors (its shard of each), and a share of the plain tensors, which all ranks have.

    Plain tensors are shared out by size, largest first, to the rank with the fewest bytes: a pure function, so all
    ranks reach the same decision without communication.
    """
    own: dict[K, Tensor] = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    plain = [(name, tensor.nbytes) for name, tensor in tensors.items() if name not in own]
    load = [0] * world_size
    for name, n_bytes in sorted(plain, key=lambda item: -item[1]):
        target = min(range(world_size), key=load.__getitem__)
        load[target] += n_bytes
        if target == rank:
            own[name] = tensors[name]
    return own


def copy_to_host(tensors: dict[K, Tensor], buffers: dict[K, Tensor]) -> dict[K, Tensor]:
    """Copy tensors to host memory.

    Args:
        buffers: copies of an earlier call that may be overwritten; reusing them is several times as fast.
    """
    copies = {}
    for name, tensor in tensors.items():
        # From CUDA, a non-blocking copy goes to pinned memory. On other devices it would only finish too late.
        non_blocking = tensor.is_cuda
        if name in buffers:
            local(buffers[name]).copy_(local(tensor.detach()), non_blocking=non_blocking)
            copies[name] = buffers[name]
        else:
            copies[name] = tensor.detach().to("cpu", non_blocking=non_blocking, copy=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return copies


def flatten_moments(moments: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """{parameter: {"exp_avg": tensor}} to {"parameter.exp_avg": tensor}."""
    return {f"{name}.{kind}": tensor for name, kinds in moments.items() for kind, tensor in kinds.items()}


def unflatten_moments(moments: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Reverses `flatten_moments`."""
    nested: dict[str, dict[str, Tensor]] = {}
    for name, tensor in moments.items():
        parameter, _, kind = name.rpartition(".")
        nested.setdefault(parameter, {})[kind] = tensor
    return nested


class _Writer(FileSystemWriter):
    """Leaves the ID and folder of the save out of `.metadata`, so that equal tensors give equal bytes."""

    def storage_meta(self) -> None:
        return None


class _Reader(FileSystemReader):
    """Reads only plain data from `.metadata`, which is a pickle: no code in it runs."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            metadata = _PlainUnpickler(file).load()
        tensors = isinstance(metadata, Metadata) and metadata.state_dict_metadata
        if not isinstance(tensors, dict) or not all(isinstance(x, TensorStorageMetadata) for x in tensors.values()):
            raise UserError(f"{Path(self.path) / METADATA} does not describe tensors")
        return dataclasses.replace(metadata, planner_data=None)


def _entries(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """By name: `_Reader` lets nothing but tensors through."""
    return cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # how early releases of Python 3.11 pickle enum members
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in ALLOWED_CLASSES.get(module, ()):
            raise UserError(f"a checkpoint's {METADATA} asks for {module}.{name}, which a checkpoint does not contain")
        return super().find_class(module, name)


def _enum_member(kind: Any, name: Any) -> enum.Enum:
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__):
        raise UserError(f"a checkpoint's {METADATA} asks for {name!r} of {kind!r}, which a checkpoint does not contain")
    return kind[name]
