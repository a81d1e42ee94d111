"""What a run shows in terminals of several widths, read from the screen of a terminal emulator."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import command, launch, with_train, write_run_config
from support.terminal import run_in_terminal

from myllm.config import RunConfig

BAR = re.compile(r"\[\d+:\d\d|\d%\||█")
"""What only a progress bar contains."""


@pytest.fixture
def config(tiny: RunConfig, tmp_path: Path) -> Path:
    evals = replace(tiny.eval, cloze_every_steps=0)
    return write_run_config(replace(with_train(tiny, save_every_steps=100), eval=evals), tmp_path / "tiny.json")


@pytest.mark.parametrize(
    "columns", [pytest.param(40, marks=pytest.mark.slow), 80, pytest.param(200, marks=pytest.mark.slow)]
)
def test_run_output_in_terminal(config: Path, columns: int) -> None:
    """The data set is prepared too."""
    session = run_in_terminal(command("--config", config), columns)
    assert session.exit_code == 0, "\n".join(session.final)
    assert session.screens[0] == ["starting the run tiny"]
    assert session.seen("tokenizing")
    bar = "0/12 [00:0" if columns < 60 else "0%|"
    assert any(bar in line and "validation]" in line for screen in session.screens for line in screen)
    assert any(re.search(r"[1-9]\d?/12 \[.*loss ", line) for screen in session.screens for line in screen)
    end = session.final.index(next(line for line in session.final if line.startswith("ended: complete")))
    for screen in session.screens:
        assert sum(bool(BAR.search(line)) for line in screen) <= 1, "one bar at a time"
    assert not [line for line in session.final if BAR.search(line)]
    assert max(map(len, session.final[:end])) <= min(columns, 100)
    steps = [line for line in session.final if line.startswith("step ")]
    assert len(steps) == 12
    assert columns < 80 or all("loss" in line and "eta" in line for line in steps)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
def test_ctrl_c_clears_progress_bar(tiny: RunConfig, tmp_path: Path, columns: int) -> None:
    config = write_run_config(with_train(tiny, max_steps=10**6, save_every_steps=0), tmp_path / "tiny.json")
    session = run_in_terminal(command("--config", config), columns, stop_at="step      9/1,000,000")
    assert session.exit_code == 130
    assert not [line for line in session.final if BAR.search(line)]
    assert session.final[-1].startswith("stopped after step ")
    assert not session.seen("Traceback")


@pytest.mark.slow
def test_dumb_terminal_prints_plain_lines(config: Path) -> None:
    session = run_in_terminal(command("--config", config), 80, TERM="dumb", NO_COLOR="1")
    assert session.exit_code == 0
    assert not [line for screen in session.screens for line in screen if BAR.search(line)]
    assert b"\x1b" not in session.written
    assert b"\r" not in session.written.replace(b"\r\n", b"")


@pytest.mark.slow
def test_non_terminal_output_is_plain_lines(config: Path) -> None:
    done = launch("--config", config)
    assert done.returncode == 0
    assert not BAR.search(done.stdout + done.stderr)
    assert "\r" not in done.stdout + done.stderr
    assert done.stdout.startswith("starting the run tiny\n")
    assert max(len(line) for line in done.stdout.splitlines() if line.startswith("step ")) <= 100
