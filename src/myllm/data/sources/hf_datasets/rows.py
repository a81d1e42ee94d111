"""The rows of one local file, as `datasets` reads them."""

import glob
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import IterableDataset


@contextmanager
def quiet() -> Iterator[None]:
    """Without the error messages of `datasets`: whoever reads the file reports its faults."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def open_rows(path: Path, module: str, options: dict[str, Any]) -> "IterableDataset":
    """The rows of a file. They are read as they are needed, and the cache of `datasets` is not used.

    Args:
        module: of `datasets`, such as "csv".
        options: its settings, where they are not the defaults.
    """
    import datasets  # takes seconds

    files = {"train": [glob.escape(str(path))]}
    return datasets.load_dataset(module, data_files=files, split="train", streaming=True, **options)
