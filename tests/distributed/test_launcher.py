"""The launcher's variables are checked at once, so that leftover ones do not cost half an hour."""

import os
import subprocess
import sys

import pytest
from support.ports import unused_port

STARTED = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
}  # fmt: skip
CHECK = "from myllm.cli.errors import exit_on_error; exit_on_error().__enter__(); print('fine')"
VARIABLES = ("GROUP_RANK", "TORCHELASTIC_RUN_ID", *STARTED)


def environment(**changes: str | None) -> dict[str, str]:
    values = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return values | {name: value for name, value in (STARTED | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"RANK": "x"}, "RANK is 'x', expected a whole number"),
        ({"RANK": "x", "LOCAL_RANK": None, "MASTER_ADDR": None}, "RANK is 'x', expected a whole number"),
        ({"RANK": None, "LOCAL_RANK": "x", "WORLD_SIZE": None}, "LOCAL_RANK is 'x', expected a whole number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1', expected a whole number"),
        ({"GROUP_RANK": "1.0"}, "GROUP_RANK is '1.0', expected a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', expected a whole number"),
        ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE is 'two', expected a whole number"),
        ({"RANK": "2"}, "RANK is 2, which does not fit WORLD_SIZE 2"),
        ({"LOCAL_RANK": "5"}, "LOCAL_RANK is 5, which does not fit LOCAL_WORLD_SIZE 2"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE is 8, which does not fit WORLD_SIZE 2"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is None"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is ''"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
    ],
)
def test_invalid_environment_variables_report_error(changes: dict[str, str | None], expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env=environment(**changes), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert "torchrun" in done.stderr


@pytest.mark.parametrize(
    "changes", [{"RANK": ""}, {"LOCAL_RANK": ""}, {"RANK": None}, {"WORLD_SIZE": "", "LOCAL_WORLD_SIZE": ""}]
)
def test_empty_variables_count_as_unset(changes: dict[str, str | None]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env=environment(**changes), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
    half = {"RANK", "LOCAL_RANK"} & changes.keys()
    assert ("this process runs alone" in done.stderr) == bool(half), done.stderr


def test_waiting_reports_missing_processes() -> None:
    port = str(unused_port())
    code = "from myllm.distributed.collectives import process_group; process_group('cpu').__enter__()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(MASTER_PORT=port), stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
    finally:
        process.kill()
        process.communicate()
    assert line.startswith(f"rank 0 waits for the other 1 of 2 processes at 127.0.0.1:{port}")
    assert "unset RANK LOCAL_RANK WORLD_SIZE" in line
