"""Two machines with two ranks each, simulated by two launchers on loopback with separate temp_data."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, losses, with_train, write_run_config
from support.ports import unused_port

from myllm.config import RunConfig

pytestmark = pytest.mark.slow  # real processes, half a minute and more in all

SCRIPT = Path(__file__).parent / "programs/report_rank.py"


def two_launchers(config: RunConfig, tmp_path: Path, machines: list[Path]) -> tuple[list[int], list[str]]:
    """Run two ranks on each of two machines, with these folders; returns exit codes and output."""
    path = write_run_config(config, tmp_path / "config.json")
    port = unused_port()
    meeting = ["--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_id=two", "--local-addr=127.0.0.1"]
    launchers = []
    for number, machine in enumerate(machines):
        where = [f"--rdzv_endpoint=127.0.0.1:{port}", f"--rdzv_conf=is_host={1 - number}"]
        words = [
            sys.executable,
            "-m",
            "myllm.distributed.elastic",
            *meeting,
            *where,
            str(SCRIPT),
            str(path),
            str(tmp_path),
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "MYLLM_DATA": str(machine)}
        with (tmp_path / f"{machine.name}.txt").open("w") as file:
            launchers.append(subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment))
    try:
        codes = [launcher.wait(timeout=200) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()  # which it hands on to its ranks
    return codes, [(tmp_path / f"{machine.name}.txt").read_text() for machine in machines]


@pytest.fixture
def small(tiny: RunConfig) -> RunConfig:
    evals = replace(tiny.eval, cloze_every_steps=0, sample_every_steps=0)
    return replace(with_train(tiny, max_steps=2, batch_tokens=256), eval=evals)


def test_unshared_runs_folder_raises(small: RunConfig, tmp_path: Path) -> None:
    """Each rank writes a shard of a checkpoint, so a separate folder is an error before the first step."""
    codes, outputs = two_launchers(small, tmp_path, [tmp_path / "one", tmp_path / "two"])
    assert 2 in codes, outputs
    assert any("is not the folder that rank 0 has there" in output for output in outputs), outputs
    assert not any("step      1/2" in output for output in outputs)


def test_global_and_local_rank_roles(small: RunConfig, tmp_path: Path) -> None:
    """Only global rank 0 writes the run, the first rank of each machine prepares data, local ranks select devices."""
    machines = [tmp_path / "one", tmp_path / "two"]
    for machine in machines:  # data of their own, runs on a disk that they share
        machine.mkdir()
        (machine / "runs").symlink_to(tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    codes, outputs = two_launchers(small, tmp_path, machines)
    assert codes == [0, 0], outputs

    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert [report["rank"] for report in found] == [0, 1, 2, 3]
    assert [report["local_rank"] for report in found] == [0, 1, 0, 1]
    assert [report["device"] for report in found] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert [report["main"] for report in found] == [True, False, False, False]
    assert {report["world_size"] for report in found} == {4}
    assert {report["step"] for report in found} == {2}
    first, second = Path(found[0]["machine"]), Path(found[2]["machine"])
    assert {first, second} == set(machines)  # which of them has rank 0 is torchrun's choice
    assert [Path(report["machine"]) for report in found] == [first, first, second, second]
    for report in found:  # every machine has its own data
        assert Path(report["dataset"]).is_relative_to(report["machine"])
        assert (Path(report["dataset"]) / "manifest.json").is_file()
    assert losses(tmp_path / "runs/tiny").keys() == {1, 2}
