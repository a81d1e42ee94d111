"""What a preparation says of itself where nobody watches: lines, not a bar that is drawn over and over."""

import io
import sys
from pathlib import Path

import pytest

from myllm.data.prepare.progress import ProgressLines, progress_bar


def test_progress_lines_logged_periodically(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with ProgressLines(1_000_000, "tokenizing", clock=lambda: now[0]) as bar:
        for second in range(100):
            now[0] = float(second)
            bar.set_postfix_str(f"{second}M tokens", refresh=False)
            bar.update(10_000)
            bar.refresh()
    output = capsys.readouterr().err
    assert "\r" not in output
    assert output.isascii()
    assert output.splitlines() == [
        "tokenizing: 31% of 1.00MB, 10.3kB/s, 01:06 left, 30M tokens",
        "tokenizing: 61% of 1.00MB, 10.2kB/s, 00:38 left, 60M tokens",
        "tokenizing: 91% of 1.00MB, 10.1kB/s, 00:08 left, 90M tokens",
    ]


def test_unknown_size_avoids_division_by_zero(capsys: pytest.CaptureFixture[str]) -> None:
    now = iter([0.0, 31.0, 62.0])
    bar = ProgressLines(0, "tokenizing", clock=lambda: next(now))
    bar.refresh()
    bar.update(1_000)
    before, after = capsys.readouterr().err.splitlines()
    assert before.endswith("% of 0.00B, 00:31 so far"), "no speed, and no end in sight"
    assert " left" in after


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_shows_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar(100, progress=True) as bar:
        bar.update(50)
        bar.refresh()
    assert "50%" in sys.stderr.getvalue()


def test_preparation_log_has_plain_lines(preparations, mixed_corpus: Path) -> None:
    # However long it takes, no line of progress is due.
    setup = "from myllm.data.prepare import progress\nprogress.LOG_EVERY_S = float('inf')\n"
    process = preparations.start(setup, source=f"files:{mixed_corpus}", val_tokens=500, workers=1)
    _, output = process.communicate(timeout=240)
    assert process.returncode == 0
    assert "\r" not in output
    assert [line[:10] for line in output.splitlines()] == ["preparing "]
