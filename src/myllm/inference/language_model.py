"""A model with its vocabulary: what everything that makes text takes."""

from typing import NamedTuple

from myllm.data.tokenizer.base import Tokenizer
from myllm.model.transformer import Transformer


class LanguageModel(NamedTuple):
    """A model and the tokenizer that it was trained with; `model, tokenizer = load_model(...)` takes them apart."""

    model: Transformer
    tokenizer: Tokenizer
