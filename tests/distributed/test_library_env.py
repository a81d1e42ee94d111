"""Environment variables that the programs set for libraries."""

import os
import platform
import subprocess
import sys

import pytest
from conftest import ROOT

from myllm.distributed import library_env

# What pretrain.py's and myllm's first moment leaves to be read by a library that is loaded next.
CODE = """
import os, sys
sys.path.insert(0, ROOT)
import pretrain
from myllm.cli import main as cli
start = pretrain.main if sys.argv[1] == "pretrain" else cli.main
sys.argv = ["program", "--help"]
try:
    start()
except SystemExit:
    pass
assert "torch" not in sys.modules
print(*(os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")), file=sys.stderr)
"""


@pytest.mark.parametrize("program", ["pretrain", "myllm"])
@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, "PASSIVE None None"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None None"),
        ({"GOMP_SPINCOUNT": "7"}, "None 7 None"),
        ({"KMP_BLOCKTIME": "5"}, "None None 5"),
    ],
    ids=["nothing", "policy", "spin count", "block time"],
)
def test_threads_sleep_while_waiting_by_default(program: str, chosen: dict[str, str], expected: str) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | chosen
    words = [sys.executable, "-c", CODE.replace("ROOT", repr(str(ROOT))), program]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == expected


@pytest.mark.parametrize(
    ("release", "chosen", "expected"),
    [
        ("6.8.0-45-generic", "", "expandable_segments:True"),
        ("6.8.0-45-generic", "backend:native", "backend:native"),
        ("5.15.167.4-microsoft-standard-WSL2", "", ""),
        ("5.15.167.4-microsoft-standard-WSL2", "expandable_segments:True", "expandable_segments:True"),
    ],
)
def test_cuda_segments_do_not_grow_in_wsl(
    monkeypatch: pytest.MonkeyPatch, release: str, chosen: str, expected: str
) -> None:
    """There the first allocation on some cards would fail."""
    monkeypatch.setattr(os, "environ", {"PYTORCH_ALLOC_CONF": chosen})
    monkeypatch.setattr(platform, "release", lambda: release)
    library_env.set_library_env()
    assert os.environ["PYTORCH_ALLOC_CONF"] == expected
