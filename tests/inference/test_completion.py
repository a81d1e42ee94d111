"""Text from text: stop strings, finish reasons, seeds, and the two lines of the README."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from myllm.config import ModelConfig
from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.load import load_tokenizer
from myllm.errors import UserError
from myllm.inference.completion import TextStream, complete, generate
from myllm.inference.generate import stream_tokens
from myllm.inference.load import LanguageModel
from myllm.inference.sampling_params import SamplingParams
from myllm.model.transformer import Transformer

R50K = load_tokenizer()
CONFIG = ModelConfig(max_seq_len=32, d_model=16, n_layers=1, n_heads=2, d_ff=32)
FREE = SamplingParams(1.0, 0, seed=3)


@pytest.fixture(scope="module")
def pair() -> LanguageModel:
    return LanguageModel(Transformer(CONFIG).eval(), R50K)


# -- text from tokens -------------------------------------------------------------------------------------------------


def pieces(ids: Iterable[int], tokenizer: Tokenizer) -> list[str]:
    stream = TextStream(tokenizer)
    return [text for text in [*map(stream.feed, ids), stream.end()] if text]


@given(st.text() | st.text(alphabet="a é🙂日"))
def test_streamed_pieces_concatenate_to_text(text: str) -> None:
    parts = pieces(R50K.encode(text).tolist(), R50K)
    assert "".join(parts) == text
    assert all(parts)
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


def test_incomplete_final_character() -> None:
    ids = R50K.encode("a🙂").tolist()
    assert "".join(pieces(ids[:-1], R50K)) == "a\ufffd"


def test_metaspace_vocabulary(tmp_path: Path) -> None:
    trained = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("▁one", -1.0), ("▁two", -1.0)], unk_id=0))
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trained.add_special_tokens(["</s>"])
    trained.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert "".join(pieces(ours.encode("one two two").tolist(), ours)) == " one two two"


@given(st.text(alphabet="abc🙂"), st.lists(st.text(alphabet="abc🙂", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_first_stop_string(text: str, stops: list[str]) -> None:
    stream, released = TextStream(R50K, stops), ""
    # One byte a token: every stop string is split over tokens.
    for byte in text.encode():
        released += stream.feed(R50K.encode(chr(byte))[0] if byte < 128 else byte_token(byte))
        assert text.startswith(released)
        if stream.stopped:
            break
    released += stream.end()
    ends = [text.find(stop) for stop in stops if stop in text]
    assert stream.stopped == bool(ends)
    assert len(released) <= len(text)
    if not ends:
        assert released == text
    assert not any(stop in released for stop in stops)


def byte_token(byte: int) -> int:
    return next(token for token in range(256) if R50K.decode_bytes([token]) == bytes([byte]))


def test_stop_string_ends_sample(pair: LanguageModel) -> None:
    (full,) = complete(pair, ["the river"], 20, FREE)
    assert (full.finish_reason, full.tokens, full.seed) == ("length", 20, 3)
    stop = full.text[len(full.text) // 2 :][:5]
    (cut,) = complete(pair, ["the river"], 20, FREE, stop=["never there", stop])
    assert (cut.finish_reason, cut.text) == ("stop", full.text[: full.text.find(stop)])
    assert cut.tokens < 20


def test_end_of_text_finishes_completion(pair: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, tokens = "the river", R50K.encode_document("the river").tolist()
    drawn = list(stream_tokens(pair.model, tokens, 9, FREE))
    ending = next(token for token in drawn[3:] if token not in drawn[:3])
    at = drawn.index(ending)
    monkeypatch.setattr(R50K, "encode_document", lambda _: np.array(tokens))  # as it was with the real end of text
    monkeypatch.setattr(R50K, "end_of_text", ending)
    (completion,) = complete(pair, [prompt], 9, FREE)
    assert completion.finish_reason == "end_of_text"
    assert (completion.tokens, completion.text) == (at, R50K.decode(drawn[:at]))


# -- batches and seeds ------------------------------------------------------------------------------------------------


def test_text_independent_of_batch_size(pair: LanguageModel) -> None:
    prompts = ["the river", "", "a much longer prompt of several words " * 5]
    together = list(complete(pair, prompts, 12, FREE, num_samples=2))
    assert list(complete(pair, prompts, 12, FREE, num_samples=2, batch_size=1)) == together
    assert [(completion.prompt, completion.seed) for completion in together] == [
        (prompt, seed) for prompt in prompts for seed in (3, 4)
    ]
    assert list(complete(pair, prompts[2:], 12, FREE, num_samples=2)) == together[4:]
    assert together[0].text != together[1].text


def test_on_text_receives_full_text(pair: LanguageModel) -> None:
    received = ["", "", ""]

    def listen(number: int, text: str) -> None:
        received[number] += text

    completions = list(complete(pair, ["a", "b", "c"], 10, FREE, batch_size=2, on_text=listen))
    assert received == [completion.text for completion in completions]


def test_samples_are_yielded_in_order(pair: LanguageModel) -> None:
    """Of three made together, the first ends early, the last too, the second late."""
    full = [completion.text for completion in complete(pair, ["a", "b", "c"], 30, FREE)]
    stop = next(text for at in range(1, 40) if (text := full[0][at : at + 2]) in full[2][:60] and text not in full[1])
    events: list[tuple[str, int]] = []
    completions = complete(
        pair, ["a", "b", "c"], 30, FREE, stop=[stop], on_text=lambda number, _: events.append(("text", number))
    )
    for number, completion in enumerate(completions):
        events.append(("done", number))
        assert completion.finish_reason == ("length" if number == 1 else "stop")
    first, second, third = (events.index(("done", number)) for number in range(3))
    assert ("text", 1) in events[first:second]  # the first did not wait for the second,
    assert ("text", 2) not in events[second:]  # but the third did
    assert third == second + 1 == len(events) - 1


def test_generate_returns_prompt_and_continuation(pair: LanguageModel) -> None:
    text = generate(pair, "the river", 8, temperature=0)
    assert text.startswith("the river")
    assert len(text) > len("the river")
    assert generate(pair, ["the river", "a"], 8, temperature=0)[0] == text
    assert generate(pair, "the river", 8, temperature=0, stop=text[9:11]) == "the river"
    with pytest.raises(UserError, match="unknown setting tempreature"):
        generate(pair, "x", tempreature=1)
    with pytest.raises(UserError, match=r"top_p 1\.5"):
        generate(pair, "x", top_p=1.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_samples": 0}, "num_samples is 0"), ({"batch_size": 0}, "batch_size is 0"), ({"stop": [""]}, "is empty"),
     ({"max_new_tokens": -1}, "max_new_tokens is -1"), ({"sampling": SamplingParams(top_p=0)}, "top_p 0")],
)  # fmt: skip
def test_invalid_settings_raise_immediately(pair: LanguageModel, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        complete(pair, ["x"], **settings)
