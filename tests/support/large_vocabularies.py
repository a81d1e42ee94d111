"""tokenizer.json files in the layout and of the size of Llama 3's and Qwen3's, trained here on a few words.

Sources: meta-llama/Llama-3.2-1B and Qwen/Qwen3-0.6B, tokenizer.json: steps, patterns, added tokens and their order.
"""

import json
import random
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = (
    "The old river ran under the stone bridge, and children counted boats until evening. I'll say we've 1234567 or "
    "3.14159; été, Straße, naïve, 日本語の言葉, Привет мир, مرحبا, 🙂🙃\n\n\tdef f(x):\r\n        return x != 2\n"
)
WORD_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST_PATTERN = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = rf"{WORD_PATTERN}|\p{{N}}{{1,3}}|{REST_PATTERN}"
QWEN3_PATTERN = rf"{WORD_PATTERN}|\p{{N}}|{REST_PATTERN}"
LLAMA3_ADDED = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(254))]
QWEN3_ADDED = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>",
    "</think>",
]  # fmt: skip
QWEN3_ROWS = 151_936
"""Of the embedding, for 151,669 tokens."""


@cache
def llama3_json() -> str:
    """128,256 tokens. Whole words are looked up before the merges (`ignore_merges`)."""
    made = _trained(LLAMA3_PATTERN)
    start = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128_000)])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), start])
    return _with_size(made, 128_000, LLAMA3_ADDED, ignore_merges=True)


@cache
def qwen3_json() -> str:
    """151,669 tokens."""
    made = _trained(QWEN3_PATTERN)
    made.normalizer = normalizers.NFC()
    made.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    return _with_size(made, 151_643, QWEN3_ADDED)


def _trained(pattern: str) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=sorted(alphabet), show_progress=False)
    made.train_from_iterator([WORDS * 4 + "x.\n\ny!\n\n" * 50], trainer)
    return made


def _with_size(made: Tokenizer, size: int, added: list[str], ignore_merges: bool = False) -> str:
    """The file with the trained tokens at random ids below `size`, words that no merge reaches at the others, and the
    added tokens behind them."""
    spec: dict[str, Any] = json.loads(made.to_str())
    trained = list(spec["model"]["vocab"])
    ids = random.Random(3).sample(range(size), len(trained))
    tokens = [f"Ġword{i}" for i in range(size)]
    for token, index in zip(trained, ids, strict=True):
        tokens[index] = token
    spec["model"] |= {"vocab": {token: index for index, token in enumerate(tokens)}, "ignore_merges": ignore_merges}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"] = [
        {"id": size + i, "content": token, **flags, "special": token.startswith("<|") or ignore_merges}
        for i, token in enumerate(added)
    ]
    return json.dumps(spec, ensure_ascii=False)
