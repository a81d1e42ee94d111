"""A vocabulary as a fast tokenizer of `transformers`: tokenizer.json and what stands beside it.

The ids are those of training, on any text: a prompt begins with the end-of-text token, and the literal text
`<|endoftext|>` in it is text, not the token (`split_special_tokens`; `tokenizer(text, split_special_tokens=False)` has
it otherwise).
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
    """The same ids from the `tokenizers` library, with the end-of-text token in front of every text."""
    if tokenizer.is_default:
        fast = tokenizers.Tokenizer(_byte_pairs(tokenizer.file.read_bytes()))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        fast.decoder = decoders.ByteLevel()
        ending = "<|endoftext|>"
    else:
        fast = tokenizers.Tokenizer.from_str(tokenizer.file.read_text(encoding="utf-8"))
        fast.no_truncation()
        fast.no_padding()
        if getattr(fast.model, "dropout", None):
            fast.model.dropout = None
        ending = fast.id_to_token(tokenizer.end_of_text)
    fast.add_special_tokens([ending])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{ending} $A", pair=f"{ending} $A {ending}:1 $B:1", special_tokens=[(ending, tokenizer.end_of_text)]
    )
    assert fast.token_to_id(ending) == tokenizer.end_of_text
    return fast


def _byte_pairs(content: bytes) -> models.BPE:
    """tiktoken's ranks as merges: a token's merge is of the two parts that lower ranks make of its bytes."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
    alphabet = byte_alphabet()

    def shown(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            first, second = _halves(token, ranks)
            merges.append((shown(first), shown(second)))
    return models.BPE(vocab={shown(token): rank for token, rank in ranks.items()}, merges=merges)


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def tokenizer_files(tokenizer: Tokenizer, max_seq_len: int) -> dict[str, str]:
    """File name to content: tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    fast = fast_tokenizer(tokenizer)
    ending = fast.id_to_token(tokenizer.end_of_text)
    special: dict[str, Any] = {"bos_token": ending, "eos_token": ending}
    if unknown := getattr(fast.model, "unk_token", None):
        special["unk_token"] = unknown
    settings = {
        # Named so since version 4; any other class would build a vocabulary of its own kind from the file.
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
