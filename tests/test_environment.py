"""The variables that are set for libraries, unless the user has."""

import os

import pytest

from myllm import environment
from myllm.environment import ALLOCATING, set_for_libraries

RANKS = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
THREADS = "TORCHINDUCTOR_COMPILE_THREADS"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(environment, "usable_cores", lambda: 96)


def test_ranks_share_the_cores_to_compile_on() -> None:
    """torch starts up to 32 processes a rank, whatever the number of ranks. A launcher is none, and says nothing."""
    set_for_libraries()
    assert THREADS not in os.environ
    os.environ.update(RANKS)
    set_for_libraries()
    assert os.environ[THREADS] == "12"
    os.environ.update({THREADS: "3", "LOCAL_WORLD_SIZE": "200"})
    set_for_libraries()
    assert os.environ[THREADS] == "3"


def test_cuda_memory_grows_in_place() -> None:
    set_for_libraries()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("name", ALLOCATING)
def test_the_users_allocator_stands(name: str) -> None:
    os.environ[name] = "max_split_size_mb:128"
    set_for_libraries()
    assert {each: os.environ[each] for each in ALLOCATING if each in os.environ} == {name: "max_split_size_mb:128"}
