"""Tensors by name in a folder, each rank's share in a file of its own, in torch.distributed.checkpoint's format.

Its planners and its files are PyTorch's; the collectives between them are ours, so that a save can run in the
background on a group of its own, an error is the same on every rank, and one process needs no group at all.
Source: torch/distributed/checkpoint, _save_state_dict and _load_state_dict.
"""

import dataclasses
import enum
import pickle
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from myllm.distributed import collectives as distributed
from myllm.errors import UserError

METADATA = ".metadata"
"""The one file of a folder that says which tensor is where in the others."""
_MADE_OF = {
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
    """Write every rank's tensors into one folder; rank 0 writes `.metadata` after all others are flushed to the disk.

    Args:
        folder: on a file system that all ranks share.
        tensors: on the CPU. A DTensor is the same on all ranks by name and each writes its part; a plain tensor is
            written once, whoever has it.
        group: whose ranks all call this; None is the default one, or this process alone where there is none.

    Raises:
        Exception: what went wrong here, or `RemoteRankError` where it did so on another rank.
    """
    # Nothing is copied ahead: that is for tensors on a GPU, and would wait for training's work there.
    planner, writer = DefaultSavePlanner(), _Writer(folder, sync_files=True, per_thread_copy_ahead=0)
    metadata: Metadata | None = None

    def planned() -> Any:
        planner.set_up_planner(tensors, is_coordinator=distributed.is_first(group))
        writer.set_up_storage_writer(distributed.is_first(group))
        return writer.prepare_local_plan(planner.create_local_plan())

    def dealt_out() -> Any:
        nonlocal metadata
        if not distributed.is_first(group):
            return None
        plans, metadata = planner.create_global_plan(wishes)
        return writer.prepare_global_plan(plans)

    def written() -> Any:
        return writer.write_data(planner.finish_plan(plans[distributed.group_rank(group)]), planner).wait()

    def finished() -> None:
        if distributed.is_first(group):
            writer.finish(metadata, results)

    wishes = distributed.run_on_all_ranks(planned, group)
    plans = distributed.run_on_all_ranks(dealt_out, group)[0]
    results = distributed.run_on_all_ranks(written, group)
    distributed.run_on_all_ranks(finished, group)


def read_into(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, on any device, with those of the same names in a folder; of a DTensor, this rank's part alone.

    Raises:
        UserError: other names or other shapes there.
    """
    reader, planner = _Reader(folder), DefaultLoadPlanner()
    metadata = reader.read_metadata()
    saved = {name: tuple(each.size) for name, each in metadata.state_dict_metadata.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if odd := sorted(saved.items() ^ wanted.items()):
        names = ", ".join(dict.fromkeys(name for name, _ in odd[:6]))
        raise UserError(f"the tensors in {folder} do not fit this model: {names} differ in name or shape")
    planner.set_up_planner(tensors, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    with torch.no_grad():
        reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All of a folder's tensors, whole, on the CPU, in one process."""
    metadata = _Reader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in metadata.items()}
    read_into(folder, tensors)
    return tensors


def tensor_names(folder: Path) -> list[str]:
    return list(_Reader(folder).read_metadata().state_dict_metadata)


def rank_tensors(tensors: dict[K, Tensor], rank: int, world_size: int) -> dict[K, Tensor]:
    """What this rank writes: its part of each DTensor, and of plain tensors, which all ranks have, about an equal
    number of bytes. Every rank deals them out in the same way, without a word."""
    mine = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    whole = [(name, tensor.nbytes) for name, tensor in tensors.items() if name not in mine]
    load = [0] * world_size
    for name, n_bytes in sorted(whole, key=lambda one: -one[1]):  # the largest first, each to whoever has least
        least = min(range(world_size), key=load.__getitem__)
        load[least] += n_bytes
        if least == rank:
            mine[name] = tensors[name]
    return mine


def copy_to_host(tensors: dict[K, Tensor], before: dict[K, Tensor]) -> dict[K, Tensor]:
    """Copies in host memory, which what training does next leaves alone.

    Args:
        before: copies that are needed no more: their memory is used again, which is several times as fast.
    """
    copies = {}
    for name, tensor in tensors.items():
        # From CUDA, what does not block goes into pinned memory. Elsewhere it would only come too late.
        beside = tensor.is_cuda
        if name in before:
            local_tensor(before[name]).copy_(local_tensor(tensor.detach()), non_blocking=beside)
            copies[name] = before[name]
        else:
            copies[name] = tensor.detach().to("cpu", non_blocking=beside, copy=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return copies


def strip_wrapper_prefixes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by the model's own names, without the prefixes of wrappers: compiling, DDP, activation checkpointing."""
    wrappers = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
    return {".".join(part for part in name.split(".") if part not in wrappers): tensor for name, tensor in tensors}


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _Writer(FileSystemWriter):
    """Without a save's own number and folder in `.metadata`: the same tensors make the same bytes."""

    def storage_meta(self) -> None:
        return None


class _Reader(FileSystemReader):
    """Takes nothing from `.metadata`, which is a pickle, but plain data about tensors: reading it runs no code."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            metadata = _PlainUnpickler(file).load()
        tensors = isinstance(metadata, Metadata) and metadata.state_dict_metadata
        if not isinstance(tensors, dict) or not all(isinstance(x, TensorStorageMetadata) for x in tensors.values()):
            raise UserError(f"{Path(self.path) / METADATA} describes something else than tensors")
        return dataclasses.replace(metadata, planner_data=None)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # early releases of Python 3.11 write an enum's members so
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in _MADE_OF.get(module, ()):
            raise UserError(f"a checkpoint's {METADATA} asks for {module}.{name}, which is not what one is made of")
        return super().find_class(module, name)


def _enum_member(kind: Any, name: Any) -> enum.Enum:
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__):
        raise UserError(f"a checkpoint's {METADATA} asks for {name!r} of {kind!r}, which is not what one is made of")
    return kind[name]
