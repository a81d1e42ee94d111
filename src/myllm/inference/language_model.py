"""A model with its tokenizer: the argument of everything that generates text."""

from typing import NamedTuple

from myllm.data.tokenizer.base import Tokenizer
from myllm.model.transformer import Transformer


class LanguageModel(NamedTuple):
    """A model and its tokenizer. Unpacks: `model, tokenizer = load_model(...)`."""

    model: Transformer
    tokenizer: Tokenizer
