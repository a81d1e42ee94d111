"""`myllm doctor` on this machine, and on a network with correct, missing and wrong ranks."""

import os
import re
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist
from conftest import ROOT
from support.ports import unused_port

from myllm.cli import doctor
from myllm.cli.main import main
from myllm.distributed.network_check import check_network
from myllm.errors import UserError

pytestmark = pytest.mark.slow  # real processes, half a minute and more in all


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")} | environment
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=240, check=False, env=environment
    )


def test_doctor_reports_machine_and_problems(temp_data, capsys, monkeypatch):
    main(["doctor"])
    output = capsys.readouterr().out
    for word in ("python", "torch 2.", "cores for this process", "GB are available", str(temp_data), "attention"):
        assert word in output
    assert output.endswith("no problems found\n")
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 10**18)
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 2
    output = capsys.readouterr().err
    assert "no-such-package is not installed: run src/environment.sh" in output
    assert f"are free for {temp_data}: free some space, or set MYLLM_DATA" in output


def test_two_ranks():
    done = run(
        "-m",
        "myllm.distributed.elastic",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "myllm",
        "doctor",
        "--distributed",
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"rank {rank}: {socket.gethostname()}, local rank {rank}, " in done.stdout
    assert len(re.findall(r"KiB|MiB", done.stdout)) == 4
    assert float(re.search(r"25 MiB .* ms +([0-9.]+) GB/s", done.stdout)[1]) > 0
    assert done.stdout.count("the sums are correct on all 2 ranks") == 1


def test_missing_rank_reported():
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port()), "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    done = run("-m", "myllm", "doctor", "--distributed", "--timeout-s", "10", RANK="0", **place)
    assert done.returncode == 2, done.stderr
    assert "2 of 3 ranks did not connect within 10 s: 1, 2;" in done.stderr
    assert f"rank 0: {socket.gethostname()}" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_all_reduce_sums_raise(monkeypatch):
    assert list(check_network("cpu", 10))[-1] == "one rank: no network traffic"
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *_, **__: tensor.numel() > 1 and tensor[:3].add_(1))
    with pytest.raises(UserError, match=r"all-reduce of 4,096 bytes gave wrong sums: . on rank 0"):
        list(check_network("cpu", 10))
    assert not dist.is_initialized()
