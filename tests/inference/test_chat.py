"""Text as it streams: whole characters, and the spaces that a vocabulary puts between words."""

from pathlib import Path

import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from myllm.data.tokenizer.load import load_tokenizer
from myllm.inference.completion import stream_text

R50K = load_tokenizer()


@given(st.text() | st.text(alphabet="a é🙂日"))
def test_a_stream_makes_up_the_text(text: str) -> None:
    parts = list(stream_text(R50K.encode(text).tolist(), R50K))
    assert "".join(parts) == text
    assert all(parts)
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


def test_half_a_character_at_the_end() -> None:
    ids = R50K.encode("a🙂").tolist()
    assert "".join(stream_text(ids[:-1], R50K)) == "a\ufffd"


def test_words_of_a_vocabulary_that_marks_their_start(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("▁one", -1.0), ("▁two", -1.0)], unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert "".join(stream_text(ours.encode("one two two").tolist(), ours)) == " one two two"
