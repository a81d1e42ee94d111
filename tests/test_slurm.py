"""docs/slurm/train.sbatch on a machine whose Slurm and python only write down what they are asked."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SBATCH = ROOT / "docs/slurm/train.sbatch"
FAKE_SRUN = """#!/usr/bin/env bash
while [ "$1" != bash ]; do echo "$1" >>"$LOG.srun"; shift; done
SLURM_PROCID=0 exec "$@"
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
case "$1" in
  show) printf 'node-a\\nnode-b\\n' ;;
  *) echo "scontrol $*" >>"$LOG" ;;
esac
"""
FAKE_PYTHON = """#!/usr/bin/env bash
trap 'echo told >>"$LOG"; exit 75' USR1
echo "$*" >>"$LOG"
if [ "$2" = myllm ]; then exit "$STATUS"; fi
if [ -n "${LONG:-}" ]; then while :; do sleep 0.1; done; fi
exit "$LAUNCHER"
"""


class Slurm:
    def __init__(self, folder: Path) -> None:
        self.log = folder / "log.txt"
        files = {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL, "python": FAKE_PYTHON}
        files["src/environment.sh"] = f"#!/bin/sh\necho '{folder / 'python'}'\n"
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        self.env = {
            "PATH": f"{folder}:/usr/bin:/bin", "LOG": str(self.log), "SLURM_SUBMIT_DIR": str(folder), "RUN": "my run",
            "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
            "SLURM_RESTART_COUNT": "1",
        }  # fmt: skip

    def start(self, status: int, launcher: int = 0, **env: str) -> subprocess.Popen[str]:
        env = self.env | {"STATUS": str(status), "LAUNCHER": str(launcher)} | env
        words = ["bash", str(SBATCH), "lf-llm-269m", "--hub.license", "two words"]
        return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


@pytest.mark.parametrize(
    ("status", "launcher", "code", "requeued"),
    [(0, 0, 0, False), (75, 0, 0, True), (143, 143, 0, True), (2, 2, 2, False), (1, 1, 1, False), (1, 0, 1, False)],
)
def test_requeue_depends_on_run_status(slurm: Slurm, status: int, launcher: int, code: int, requeued: bool) -> None:
    process = slurm.start(status, launcher)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    launch, status_call, *rest = slurm.lines()
    meeting = "--rdzv_backend=c10d --rdzv_id=7-1 --rdzv_endpoint=node-a:29500 --rdzv_conf=is_host=1,join_timeout=600"
    assert launch == (
        f"-m myllm.distributed.elastic --nnodes=2 --nproc_per_node=8 {meeting} pretrain.py lf-llm-269m --hub.license "
        "two words --name my run"
    )
    assert status_call == "-m myllm status my run"
    assert rest == (["scontrol requeue 7"] if requeued else [])


@pytest.mark.parametrize(("cores", "expected"), [("64", ["--cpus-per-task=64"]), ("", [])])
def test_ranks_get_the_cores_of_the_job(slurm: Slurm, cores: str, expected: list[str]) -> None:
    """Which srun no longer inherits from sbatch."""
    output, _ = slurm.start(0, SLURM_CPUS_PER_TASK=cores).communicate(timeout=240)
    options = Path(f"{slurm.log}.srun").read_text().split()
    assert options == ["--export=ALL", "--kill-on-bad-exit=1", *expected], output


def test_time_limit_signal_reaches_launcher(slurm: Slurm) -> None:
    process = slurm.start(75, LONG="yes")
    deadline = time.monotonic() + 240
    while not slurm.lines():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert slurm.lines()[1:] == ["told", "-m myllm status my run", "scontrol requeue 7"]


def test_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run([shellcheck, SBATCH], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout
