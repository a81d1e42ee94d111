"""Vocabularies of the size and layout of Llama 3's and Qwen3's, compared with transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.large_vocabularies import LLAMA3_ADDED, QWEN3_ADDED, WORDS, llama3_json, qwen3_json
from transformers import PreTrainedTokenizerFast

from myllm.data.tokenizer import huggingface
from myllm.data.tokenizer.base import Tokenizer, split_text
from myllm.data.tokenizer.huggingface import SPACE_OR_LINE, WORD_START
from myllm.data.tokenizer.load import load_tokenizer
from myllm.errors import UserError

SIZES = {"llama3": (128_256, 128_001), "qwen3": (151_669, 151_643)}
PIECES = [
    " ", "\n", "\t", "\r\n", "\u3000", "\x1c", "_", "'", "'LL", "n't", "river", "Straße", "言葉", "e\u0301", "🙂",
    "1234", "٣", ".", "!?\n", "word7", " word70000", "<|", "|>", *LLAMA3_ADDED[:3], *QWEN3_ADDED[:3], "<think>",
]  # fmt: skip
TEXTS = st.text() | st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, PreTrainedTokenizerFast]]:
    """By kind: ours, and the peer, which is told to read special tokens in a text as text."""
    folder, found = tmp_path_factory.mktemp("large"), {}
    for kind, content in (("llama3", llama3_json()), ("qwen3", qwen3_json())):
        file = folder / f"{kind}.json"
        file.write_text(content, encoding="utf-8")
        peer = PreTrainedTokenizerFast(tokenizer_file=str(file), split_special_tokens=True)
        found[kind] = load_tokenizer(file), peer
    return found


@pytest.mark.parametrize("kind", SIZES)
def test_sizes_and_dtype(pairs: dict, kind: str) -> None:
    ours, peer = pairs[kind]
    assert (ours.vocab_size, ours.end_of_text) == SIZES[kind]
    assert ours.vocab_size == len(peer)
    ids = ours.encode_document(WORDS)
    assert ids.dtype == ours.encode(WORDS).dtype == ours.encode("").dtype == np.uint32
    assert ids[0] == ours.end_of_text
    assert ids[1:].min() < 65_536 < ids[1:].max()
    assert ours.token_bytes()[ids].sum() == len(WORDS.encode())


@given(text=TEXTS)
def test_ids_match_transformers(pairs: dict, text: str) -> None:
    for kind, (ours, peer) in pairs.items():
        ids = ours.encode(text).tolist()
        assert ids == peer.encode(text, add_special_tokens=False), kind
        assert not {peer.convert_ids_to_tokens(i) for i in ids} & {*LLAMA3_ADDED, *QWEN3_ADDED[:3]}
        if kind == "llama3":  # Qwen3 composes characters
            assert ours.decode(ids) == text


@given(text=TEXTS, size=st.integers(4, 12))
def test_boundary_split_preserves_ids(pairs: dict, text: str, size: int) -> None:
    pieces = list(split_text(text, size, SPACE_OR_LINE))
    at = np.cumsum([len(piece) for piece in pieces])[:-1]
    if all(SPACE_OR_LINE.match(text, int(i)) for i in at):
        for ours, _ in pairs.values():
            parts = [ours.encode(piece).tolist() for piece in pieces]
            assert [index for part in parts for index in part] == ours.encode(text).tolist()


def test_split_keeps_line_breaks_with_punctuation(pairs: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "MAX_PIECE_CHARS", 50)
    text = "They left for x.\n\nThen y came!\n\n" * 40
    for ours, peer in pairs.values():
        ids = peer.encode(text, add_special_tokens=False)
        assert ours.encode(text).tolist() == ids
        parts = [ours.encode(piece).tolist() for piece in split_text(text, 50, WORD_START)]
        assert [index for part in parts for index in part] != ids, "the text tests nothing"


def test_missing_end_of_text_token_raises(tmp_path: Path) -> None:
    spec = json.loads(llama3_json())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<|end_of_text|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"no token that ends a document.*<\|begin_of_text\|>.*<\|end_of_text\|>"):
        load_tokenizer(tmp_path)
