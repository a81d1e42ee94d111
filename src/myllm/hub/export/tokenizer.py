"""Convert a vocabulary to a fast tokenizer of `transformers`: tokenizer.json and its settings.

It gives the ids of training for any text: a prompt starts with the end-of-text token, and `<|endoftext|>` inside a text
is encoded as text, not as the token. (`tokenizer(text, split_special_tokens=False)` encodes it as the token.)
"""

import base64
import json
from itertools import pairwise
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.huggingface import byte_alphabet

TOKENIZER_FILE = "tokenizer.json"


def fast_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer with the same ids that puts the end-of-text token before every text."""
    if tokenizer.is_default:
        fast = tokenizers.Tokenizer(_byte_pairs(tokenizer.file.read_bytes()))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        fast.decoder = decoders.ByteLevel()
        end_token = "<|endoftext|>"
    else:
        fast = tokenizers.Tokenizer.from_str(tokenizer.file.read_text(encoding="utf-8"))
        fast.no_truncation()
        fast.no_padding()
        if getattr(fast.model, "dropout", None):
            fast.model.dropout = None
        end_token = str(fast.id_to_token(tokenizer.end_of_text))
    fast.add_special_tokens([end_token])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{end_token} $A",
        pair=f"{end_token} $A {end_token}:1 $B:1",
        special_tokens=[(end_token, tokenizer.end_of_text)],
    )
    assert fast.token_to_id(end_token) == tokenizer.end_of_text
    return fast


def _byte_pairs(content: bytes) -> models.BPE:
    """Convert tiktoken's ranks to merges. A token is merged from the two parts that merges of lower rank give."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
    alphabet = byte_alphabet()

    def to_text(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            first, second = _halves(token, ranks)
            merges.append((to_text(first), to_text(second)))
    return models.BPE(vocab={to_text(token): rank for token, rank in ranks.items()}, merges=merges)


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def tokenizer_files(tokenizer: Tokenizer, max_seq_len: int) -> dict[str, str]:
    """Contents of tokenizer.json, tokenizer_config.json and special_tokens_map.json, by file name."""
    fast = fast_tokenizer(tokenizer)
    end_token = fast.id_to_token(tokenizer.end_of_text)
    special: dict[str, Any] = {"bos_token": end_token, "eos_token": end_token}
    if unknown := getattr(fast.model, "unk_token", None):
        special["unk_token"] = unknown
    settings = {
        # Name since version 4. Any other class would rebuild the vocabulary in its own way.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": max_seq_len,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {
        TOKENIZER_FILE: fast.to_str(pretty=True),
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json(special),
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
