"""`myllm tokenizer train`: train a tokenizer on a source's text, and compare it with GPT-2's."""

import shlex
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from myllm import paths
from myllm.config import DataConfig
from myllm.errors import UserError
from myllm.paths import check_writable, user_path

if TYPE_CHECKING:
    from myllm.data.tokenizer.base import Tokenizer

COMPARED_DOCUMENTS = 20
COMPARED_CHARS = 100_000
"""Per document."""


def tokenizer_train(
    source: tyro.conf.Positional[str],
    vocab_size: int = 32_000,
    documents: int = 100_000,
    text_column: str | None = None,
    suffix: tuple[str, ...] = (),
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Train a byte-level BPE tokenizer on a source's text.

    Args:
        source: a name from `myllm data list`, hub:NAMESPACE/NAME[:GLOB], datasets:NAME[:CONFIG][:SPLIT], or files:PATH.
        vocab_size: number of tokens, at least 257; more than 65536 take four bytes each in shards, not two.
        documents: learn from at most this many documents, in the seeded order of the source's files (0: all).
        text_column: column or key that holds the text (default: the source's own).
        suffix: also read local files with these suffixes, such as .rst .html, as plain text.
        out: output file (default: temp_data/tokenizers/SOURCE-SIZE/tokenizer.json).
        overwrite: replace an existing file.
    """
    from myllm.data.prepare.spec import first_documents
    from myllm.data.sources.source import find_source
    from myllm.data.tokenizer.load import TOKENIZER_FILE, load_tokenizer
    from myllm.data.tokenizer.train import train_tokenizer

    if documents < 0:
        raise UserError(f"--documents is {documents}, expected at least 0 (0: all)")
    found = find_source(source, text_column, with_digests=False, suffixes=suffix)
    out = user_path(out or paths.tokenizers_dir() / f"{found.name}-{vocab_size}")
    if out.suffix != ".json":
        out = out / TOKENIZER_FILE
    if out.exists() and not overwrite:
        raise UserError(
            f"{out} already exists, and data sets and runs may depend on it; --overwrite replaces it, --out FILE "
            "writes another file"
        )
    check_writable(out, "--out")
    sample: deque[str] = deque(maxlen=COMPARED_DOCUMENTS)

    def texts() -> Iterator[str]:
        for text in first_documents(found, documents):
            sample.append(text[:COMPARED_CHARS])
            yield text

    # Without a terminal, the library's progress bars leave empty lines.
    tokenizer = load_tokenizer(train_tokenizer(texts(), vocab_size, out, progress=sys.stderr.isatty()))
    print(tokenizer.file)
    print(f"  {tokenizer.vocab_size:,} tokens; the sha256 of the file is {tokenizer.sha256[:12]}...")
    if tokenizer.vocab_size < vocab_size:
        print(f"  the text is too short for the requested {vocab_size:,} tokens")
    _print_comparison(tokenizer, load_tokenizer(), list(sample))
    _print_next_commands(DataConfig(source, tokenizer=str(tokenizer.file), text_column=text_column, suffixes=suffix))


def _print_comparison(tokenizer: "Tokenizer", gpt2: "Tokenizer", texts: list[str]) -> None:
    num_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    print(f"  bytes per token on the last {len(texts):,} document(s) of the training text:")
    for name, compared in (("this", tokenizer), (gpt2.name, gpt2)):
        num_tokens = sum(len(compared.encode(text)) for text in texts)
        print(f"    {name:<10} {num_bytes / max(num_tokens, 1):.2f}")


def _print_next_commands(config: DataConfig) -> None:
    from myllm.data.prepare.spec import make_spec

    # The second command needs the full name of what the first one creates: other names may begin alike.
    spec = make_spec(config)
    words = [config.source, "--tokenizer", config.tokenizer]
    words += ["--text-column", config.text_column] if config.text_column is not None else []
    words += ["--suffix", *config.suffixes] if config.suffixes else []
    print("prepare data with it, then train on them:")
    print(f"  myllm data prepare {shlex.join(words)}")
    name, vocab_size = spec.folder.name, spec.tokenizer.vocab_size
    print(f"  python pretrain.py PRESET --data.dataset {name} --name {name} --model.vocab-size {vocab_size}")
