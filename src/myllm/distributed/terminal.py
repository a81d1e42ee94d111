"""Progress bars and log lines, as wide as the terminal."""

import os
import shutil
import sys
import textwrap
from importlib import util
from typing import Any

from tqdm import tqdm

LINE_WIDTH = 100
"""Longest line, whatever the width of the terminal."""
ERASE = "\x1b[K"
"""Clears the rest of a line: where a bar was, it may have the ^C of a user."""
ROOM = len("^C") + 1
"""Columns right of a bar: a ^C that begins another line would stay there."""


def in_notebook() -> bool:
    """True in a notebook that can draw a bar of its own; ipywidgets does that. tqdm.auto warns where it is missing."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None  # of a terminal or a notebook; None in a plain program
    return "IPKernelApp" in getattr(shell, "config", ()) and util.find_spec("ipywidgets") is not None


def shows_bars() -> bool:
    """True if stderr is a terminal that can redraw a line, or this process is a notebook.

    In a shell inside Emacs, whose TERM is dumb, a bar would be a line for each of its states.
    """
    return in_notebook() or (sys.stderr.isatty() and _redraws())


def progress_bar(total: int, **options: Any) -> tqdm:
    """A bar that is drawn at once, and disappears when it is closed."""
    if in_notebook():
        return _notebook_bar(total, **options)
    bar = tqdm(total=total, leave=False, ncols=_size()[0], **options)
    bar.dynamic_ncols = lambda file: _size()
    return bar


def _notebook_bar(total: int, **options: Any) -> tqdm:
    from tqdm import notebook

    class Bar(notebook.tqdm):
        def close(self) -> None:
            self.total = self.n  # one that ended before its total would stay, in red
            super().close()

    return Bar(total=total, leave=False, **options)


def _size() -> tuple[int, int]:
    columns, rows = shutil.get_terminal_size()
    return columns - ROOM, rows


def print_line(line: str) -> None:
    """Print a line on stdout, above a progress bar if there is one; wrapped, if it is a terminal."""
    is_terminal = sys.stdout.isatty()
    line = wrap(line) if is_terminal else line
    tqdm.write(line.replace("\n", f"{ERASE}\n") + ERASE if is_terminal and _redraws() else line)
    sys.stdout.flush()


def wrap(line: str) -> str:
    """Wrap a line to the width of the terminal, or to what is easy to read."""
    width = min(shutil.get_terminal_size().columns, LINE_WIDTH)
    options: dict[str, Any] = {"subsequent_indent": "    ", "break_long_words": False, "break_on_hyphens": False}
    parts = line.split("\n")
    return "\n".join(textwrap.fill(part, width, **options) if len(part) > width else part for part in parts)


def _redraws() -> bool:
    return os.environ.get("TERM") != "dumb"
