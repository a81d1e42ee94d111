"""Threads per process: from affinity, quota, number of ranks, and the user's setting."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from myllm.distributed import collectives, cpu_threads
from myllm.errors import UserError


@pytest.fixture
def nobody_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def system(folder: Path, siblings: list[str]) -> Path:
    for number, shared in enumerate(siblings):
        file = folder / f"cpu{number}" / "topology" / "thread_siblings_list"
        file.parent.mkdir(parents=True)
        file.write_text(shared)
    return folder


def test_counts_physical_cores(tmp_path: Path) -> None:
    folder = system(tmp_path, ["0,2", "1,3", "0,2", "1,3"])
    assert cpu_threads._physical({0, 1, 2, 3}, folder) == 2
    assert cpu_threads._physical({0, 2}, folder) == 1
    assert cpu_threads._physical({0, 1}, folder) == 2
    assert cpu_threads._physical({0, 9}, folder) == 2, "where the system does not say, all count"


def group(folder: Path, place: str, **files: str) -> None:
    (folder / place).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / place / name.replace("__", ".")).write_text(text + "\n")


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/", {}, 16),
        ("0::/", {"": {"cpu__max": "400000 100000"}}, 4),
        ("0::/", {"": {"cpu__max": "max 100000"}}, 16),
        ("0::/", {"": {"cpu__max": "150000 100000"}}, 1),
        ("0::/", {"": {"cpu__max": "50000 100000"}}, 1),
        ("0::/", {"": {"cpu__max": "6400000 100000"}}, 16),
        ("0::/pod/box", {"pod": {"cpu__max": "300000 100000"}, "pod/box": {"cpu__max": "max 100000"}}, 3),
        ("0::/pod/box", {"pod": {"cpu__max": "max 100000"}, "pod/box": {"cpu__max": "200000 100000"}}, 2),
        ("4:cpu,cpuacct:/box", {"cpu/box": {"cpu__cfs_quota_us": "200000", "cpu__cfs_period_us": "100000"}}, 2),
        ("4:cpu,cpuacct:/gone", {"cpu": {"cpu__cfs_quota_us": "300000", "cpu__cfs_period_us": "100000"}}, 3),
        ("4:cpu:/", {"cpu": {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}}, 16),
        ("4:memory:/", {"cpu": {"cpu__cfs_quota_us": "100000", "cpu__cfs_period_us": "100000"}}, 16),
        ("nonsense", {}, 16),
    ],
)
def test_container_quota_limits_cores(
    tmp_path: Path, own: str, files: dict[str, dict[str, str]], expected: int
) -> None:
    mine = tmp_path / "own"
    mine.write_text(own + "\n")
    for place, values in files.items():
        group(tmp_path / "control", place, **values)
    assert cpu_threads._within_quota(16, tmp_path / "control", mine) == expected


def test_no_control_groups(tmp_path: Path) -> None:
    assert cpu_threads._within_quota(16, tmp_path, tmp_path / "none") == 16


@pytest.mark.usefixtures("nobody_chose")
@pytest.mark.parametrize(("ranks", "expected"), [(1, 12), (2, 6), (5, 2), (8, 1), (40, 1)])
def test_local_ranks_share_cores(monkeypatch: pytest.MonkeyPatch, ranks: int, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(cpu_threads, "_physical", len)
    monkeypatch.setattr(cpu_threads, "_within_quota", lambda count: count)
    monkeypatch.setattr(cpu_threads, "local_world_size", lambda: ranks)
    assert cpu_threads.num_threads() == expected
    assert cpu_threads.threads_reason().startswith("12 usable core(s)")


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
@pytest.mark.usefixtures("nobody_chose")
def test_user_setting_takes_precedence(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "3")
    assert cpu_threads.num_threads() is None
    assert cpu_threads.threads_reason() == f"set by {name}"


# A launcher that is started with what the test gives it, and starts a rank as torchrun would.
LAUNCHER = """
import os, subprocess, sys
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
code = "from myllm.distributed import launcher; print(launcher.thread_count_variable())"
subprocess.run([sys.executable, "-c", code], check=True)
"""


def without_choice(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return kept | {"PYTHONPATH": str(ROOT / "src")} | more


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is told from /proc")
@pytest.mark.parametrize(("given", "expected"), [({}, "None"), ({"OMP_NUM_THREADS": "1"}, "OMP_NUM_THREADS")])
def test_recognizes_torchrun_default(given: dict[str, str], expected: str) -> None:
    words = [sys.executable, "-c", LAUNCHER]
    done = subprocess.run(words, env=without_choice(**given), capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.strip() == expected


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is told from /proc")
def test_replaces_torchrun_default() -> None:
    words = [
        sys.executable,
        "-m",
        "myllm.distributed.elastic",
        "--standalone",
        "--nproc_per_node=2",
        ROOT / "tests/support/six_cores.py",
    ]
    done = subprocess.run(words, env=without_choice(), capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.count("3 threads, 6 usable core(s) for 2 processes") == 2


def test_single_process_uses_all_cores() -> None:
    words = [sys.executable, ROOT / "tests/support/six_cores.py"]
    done = subprocess.run(words, env=without_choice(), capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.strip() == "6 threads, 6 usable core(s)"


def test_multiple_processes_on_mps_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with (
        pytest.raises(UserError, match="2 processes were started, but MPS is one device"),
        collectives.process_group("mps"),
    ):
        pass
