"""Loading the tokenizer that a config names."""

from pathlib import Path

from myllm import paths
from myllm.errors import UserError, did_you_mean
from myllm.paths import user_path

from .base import Tokenizer
from .gpt2 import NAME, VOCAB_FILE, GPT2Tokenizer
from .huggingface import HuggingFaceTokenizer

TOKENIZER_FILE = "tokenizer.json"


def trained_vocab_size(spec: str) -> int | None:
    """N if the tokenizer is train:N, to be learned from the source's own text (prepare.spec); else None.

    Raises:
        UserError: N is not a number of tokens.
    """
    kind, colon, number = spec.partition(":")
    if kind != "train" or not colon:
        return None
    if not number.isdecimal():
        raise UserError(f"the tokenizer {spec!r} has no number of tokens; expected train:N, such as train:8192")
    return int(number)


def load_tokenizer(spec: str | Path | None = None) -> Tokenizer:
    """
    Args:
        spec: `r50k_base` (also for None), the path of a tokenizer.json, or a folder that holds one. A relative path is
            looked up in the current folder, then in temp_data/.

    Raises:
        UserError: not found, damaged, or unusable for training.
    """
    if spec is None or str(spec) == NAME:
        return GPT2Tokenizer()
    if trained_vocab_size(str(spec)):
        raise UserError(f"the tokenizer {spec} exists only once data is prepared with it; give a tokenizer.json here")
    path = user_path(spec)
    if not path.exists():
        path = _below_temp_data(path) or path
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if file.is_file():
        return GPT2Tokenizer(file) if file.name == VOCAB_FILE else HuggingFaceTokenizer(file)
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())[:8]
        raise UserError(
            f"the folder {path} has no {TOKENIZER_FILE}; it has {', '.join(names) or 'nothing'}. transformers writes "
            "one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    siblings = path.parent.glob("*") if path.parent != Path(".") else ()
    raise UserError(
        f"no tokenizer {str(spec)!r}{did_you_mean(str(spec), [NAME, *map(str, siblings)])}; expected {NAME}, or the "
        f"path of a {TOKENIZER_FILE}, such as one that `myllm tokenizer train SOURCE` wrote"
    )


def _below_temp_data(path: Path) -> Path | None:
    """The file that `paths.portable` named, or that an absolute path led to before temp_data/ was moved."""
    relative = Path(*path.parts[-3:]) if path.is_absolute() else path  # such as runs/NAME/tokenizer.json
    found = paths.temp_data() / relative
    return found if relative.parts[:1] in (("datasets",), ("runs",), ("tokenizers",)) and found.exists() else None
