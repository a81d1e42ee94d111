"""What the code uses of others that they do not promise, since nothing public does the same: noticed when it vanishes.

The tests of each use may pass without it, where the code does without what is not there.
"""

import ast
import re
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from operator import attrgetter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

PACKAGE = Path(__file__).parents[1] / "src" / "myllm"
PRIVATE = re.compile(r"(?:^|\.)_(?!_)[A-Za-z]")
NAMES = {
    "huggingface_hub.utils._http.default_client_factory",
    "torch._C._distributed_c10d._dump_fr_trace",
    "torch._dynamo.config",
    "torch._dynamo.mark_static_address",
    "torch._dynamo.exc.FailOnRecompileLimitHit",
    "torch.distributed.distributed_c10d._get_default_store",
    "torch.utils._triton.has_triton",
}
"""Of modules, by their full names. `_processes` of a pool is looked at below."""


@pytest.mark.parametrize("name", sorted(NAMES - {"torch._C._distributed_c10d._dump_fr_trace"}))
def test_private_name_exists(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(import_module(module), attribute)


@pytest.mark.skipif(not dist.is_available(), reason="torch without its distributed part")
def test_flight_recorder_exists() -> None:
    recorder = attrgetter("_C._distributed_c10d")(torch)
    assert hasattr(recorder, "_dump_fr_trace") or hasattr(recorder, "_dump_nccl_trace")


def test_process_pool_exposes_processes() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        done: Future[int] = pool.submit(abs, -1)
        assert done.result() == 1
        assert [process.is_alive() for process in pool._processes.values()] == [True]


def imported_privately(tree: ast.Module) -> Iterator[str]:
    """Private modules and names that a file takes from others."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_private_imports_are_listed() -> None:
    found = {
        name
        for file in PACKAGE.rglob("*.py")
        for name in imported_privately(ast.parse(file.read_text(encoding="utf-8")))
        if PRIVATE.search(name)
    }
    assert found <= NAMES, "use what is public; where there is nothing, name it above"
