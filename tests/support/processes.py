"""Processes that may end at any moment."""

from collections.abc import Iterable

import psutil


def with_words(processes: Iterable[psutil.Process], words: str) -> list[psutil.Process]:
    """Those whose command line contains the words. Processes that have ended, zombies included, have none."""
    found = []
    for process in processes:
        try:
            if words in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found
