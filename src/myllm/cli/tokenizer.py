"""`myllm tokenizer train`: a vocabulary of one's own, and what it gains over GPT-2's."""

import shlex
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from myllm import paths
from myllm.config import DataConfig
from myllm.errors import UserError
from myllm.files import check_writable
from myllm.paths import user_path

if TYPE_CHECKING:
    from myllm.data.sources.source import Source
    from myllm.data.tokenizer.base import Tokenizer

Positional = tyro.conf.Positional

SHOWN_DOCUMENTS = 20
SHOWN_CHARS = 100_000
"""Of each: enough to measure, however large documents are."""


def tokenizer_train(
    source: Positional[str],
    vocab_size: int = 32_000,
    documents: int = 100_000,
    text_column: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Train a byte-level BPE tokenizer on a source's text.

    Args:
        source: a name of `myllm data list`, hub:NAMESPACE/NAME[:GLOB], or files:PATH.
        vocab_size: tokens, 257 to 65536.
        documents: learn from at most so many, in the seeded order of the source's files; 0: from all.
        text_column: column or key that holds the text; None: the source's own.
        out: the file; None: temp_data/tokenizers/SOURCE-SIZE/tokenizer.json.
        overwrite: replace a file that is there.
    """
    from myllm.data.prepare.spec import DatasetSpec
    from myllm.data.sources.source import find_source
    from myllm.data.tokenizer.load import TOKENIZER_FILE, load_tokenizer
    from myllm.data.tokenizer.train import train_tokenizer

    if documents < 0:
        raise UserError(f"--documents is {documents}, but must be at least 0 (0: all)")
    found = find_source(source, text_column, hashed=False)
    if out is None:
        out = paths.tokenizers_dir() / f"{found.name}-{vocab_size}"
    out = user_path(out)
    if out.suffix != ".json":
        out = out / TOKENIZER_FILE
    if out.exists() and not overwrite:
        raise UserError(
            f"there is a vocabulary at {out} already, which data sets and runs may have been made with; --overwrite "
            "replaces it, --out FILE writes another"
        )
    check_writable(out, "--out")
    last: deque[str] = deque(maxlen=SHOWN_DOCUMENTS)

    def remembered() -> Iterator[str]:
        for text in _documents(found, documents):
            last.append(text[:SHOWN_CHARS])
            yield text

    # The library's bars leave empty lines on the standard output of a program that no one watches.
    file = train_tokenizer(remembered(), vocab_size, out, progress=sys.stderr.isatty())
    tokenizer = load_tokenizer(file)
    print(tokenizer.file)
    print(f"  {tokenizer.vocab_size:,} tokens; the sha256 of the file is {tokenizer.sha256[:12]}...")
    if tokenizer.vocab_size < vocab_size:
        print(f"  the text has no more than that to learn: {vocab_size:,} were asked for; add text to get more")
    _compare(tokenizer, load_tokenizer(), list(last))
    # What the first command makes, the second one trains on, by its whole name: another may begin alike.
    config = DataConfig(source=source, tokenizer=str(tokenizer.file), text_column=text_column)
    dataset = DatasetSpec(find_source(source, text_column), tokenizer, config).folder.name
    column = f" --text-column {shlex.quote(text_column)}" if text_column is not None else ""
    print("prepare data with it, then train on them:")
    print(f"  myllm data prepare {shlex.quote(source)} --tokenizer {shlex.quote(str(tokenizer.file))}{column}")
    print(f"  python pretrain.py PRESET --data.dataset {dataset} --model.vocab-size {tokenizer.vocab_size}")


def _compare(tokenizer: "Tokenizer", default: "Tokenizer", texts: list[str]) -> None:
    """Say how much text a token holds, beside what one of GPT-2's does."""
    n_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    print(f"  bytes per token on the last {len(texts):,} document(s) of the text it learned from:")
    for name, each in (("this", tokenizer), (default.name, default)):
        n_tokens = sum(len(each.encode(text)) for text in texts)
        print(f"    {name:<10} {n_bytes / max(n_tokens, 1):.2f}")


def _documents(found: "Source", limit: int) -> Iterator[str]:
    """The source's first documents, in the seeded order of its files. Downloads are deleted again."""
    from myllm.data.prepare.work_items import order_files
    from myllm.data.sources.download import download_file
    from myllm.data.sources.read_task import SkipLog
    from myllm.data.sources.source import read_documents

    def every() -> Iterator[str]:
        with tempfile.TemporaryDirectory(dir=paths.tokenizers_dir()) as folder:
            for file in order_files(found.files, shuffle=True, seed=0):
                path = download_file(file, Path(folder))
                yield from read_documents(found, file, path, SkipLog())
                if file.remote:
                    path.unlink()

    paths.tokenizers_dir().mkdir(parents=True, exist_ok=True)
    return islice(every(), limit or None)
