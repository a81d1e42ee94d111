"""GPT-2's tokenizer compared with tiktoken's and Hugging Face's, and on hostile texts."""

import subprocess
import sys
import sysconfig
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.gpt2 import END_OF_TEXT, SHIPPED_VOCABULARY, VOCAB_FILE, GPT2Tokenizer
from myllm.data.tokenizer.load import load_tokenizer
from myllm.errors import UserError


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


def test_known_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.encode("hello world").tolist() == [31373, 995]
    assert tokenizer.encode("").tolist() == []
    assert tokenizer.encode_document("Hello world").tolist() == [50256, 15496, 995]
    assert tokenizer.encode("Hello").dtype == np.uint16
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50_257, 50_256)


TEXTS = (
    st.text()
    | st.text(alphabet=" \n\ta1'é🙂<|endoftext>", max_size=80)
    | st.text(alphabet=" \n\r\u3000\xa0\x1c\x01\x02\x03\x08\ufddes.", max_size=80)
)


@given(TEXTS)
def test_ids_match_tiktoken_and_round_trip(tokenizer: Tokenizer, reference: tiktoken.Encoding, text: str) -> None:
    ids = tokenizer.encode(text).tolist()
    assert ids == reference.encode_ordinary(text)
    assert END_OF_TEXT not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()


@given(st.lists(TEXTS | st.sampled_from(["<|endoftext|>", " " * 200, "a\ud800b", " \n"]), min_size=1, max_size=8))
def test_batch_matches_single_documents(tokenizer: Tokenizer, reference: tiktoken.Encoding, texts: list[str]) -> None:
    encoded = tokenizer.encode_documents(texts)
    alone = [[END_OF_TEXT, *reference.encode_ordinary(text)] for text in texts]
    assert [document.tolist() for document in encoded] == alone
    assert all(document.dtype == np.uint16 for document in encoded)


def test_batch_with_long_run_of_spaces(tokenizer: Tokenizer) -> None:
    texts = ["one", " " * (300_000), "two "]
    encoded = tokenizer.encode_documents(texts)
    assert [tokenizer.decode(document[1:]) for document in encoded] == texts
    assert [document[0] for document in encoded] == [END_OF_TEXT] * 3


@given(st.text(alphabet=st.characters() | st.characters(categories=["Cs"])))
def test_lone_surrogates_become_replacement_character(tokenizer: Tokenizer, text: str) -> None:
    pairs_joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    expected = "".join("\ufffd" if 0xD800 <= ord(c) < 0xE000 else c for c in pairs_joined)
    assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_lone_surrogate_preserves_surrounding_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("\ufeffa\ud800b\udfffc\ud83d\ude42")) == "\ufeffa\ufffdb\ufffdc🙂"


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|endoftext|>b", "<|endoftext|>" * 3])
def test_special_token_string_encodes_as_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_document(text)
    assert ids[0] == END_OF_TEXT
    assert END_OF_TEXT not in ids[1:]
    assert tokenizer.decode(ids[1:]) == text


def huggingface_gpt2(reference: tiktoken.Encoding) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer in Hugging Face's implementation; its merges follow from the ranks."""
    # GPT-2's printable stand-ins for the 256 bytes. Source: openai/gpt-2, src/encoder.py, bytes_to_unicode.
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    shown = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}

    def show(token: bytes) -> str:
        return "".join(shown[byte] for byte in token)

    ranks = {reference.decode_single_token_bytes(i): i for i in range(50_256)}
    merges = []
    for token, rank in ranks.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((show(parts[0]), show(parts[1])))
    model = tokenizers.models.BPE({show(token): rank for token, rank in ranks.items()}, merges)
    peer = tokenizers.Tokenizer(model)
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return peer


def test_ids_match_hugging_face_gpt2(tokenizer: Tokenizer, reference: tiktoken.Encoding) -> None:
    peer = huggingface_gpt2(reference)
    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / name).read_text(encoding="utf-8") for name in ("argparse.py", "this.py", "html/entities.py")]
    texts += [
        "It's 3.14159, they'll say; WE'LL don't\t\n  \n x",
        "日本語と中文 — été Straße Ünïcödé 🙂🙃",
        "a\x00b\x00",
    ]
    for text in texts:
        assert tokenizer.encode(text).tolist() == peer.encode(text).ids


@pytest.mark.parametrize("space", [" ", "\n", "\t", " \n", "\u3000", "\x1c\x85"])
def test_million_spaces_round_trip(tokenizer: Tokenizer, space: str) -> None:
    text = "a" + space * (1_200_000 // len(space)) + "b"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("count", [1, 2, 3, 99_999])
@pytest.mark.parametrize("text", ["x{}y", "{}y", "x{}", "{}", "x{}'s", "1{}2", "!{}!", "x\n{}\ny"])
def test_runs_of_spaces(tokenizer: Tokenizer, reference: tiktoken.Encoding, text: str, count: int) -> None:
    whole = text.format(" " * count)
    assert tokenizer.encode(whole).tolist() == reference.encode_ordinary(whole)


def test_many_long_runs_take_linear_time(tokenizer: Tokenizer) -> None:
    text = ("x" + " " * 99_999) * 5
    started = time.process_time()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.process_time() - started < 10


def test_every_character_next_to_whitespace(tokenizer: Tokenizer, reference: tiktoken.Encoding) -> None:
    """White space is what the pattern says, not what Python says; any character may serve as a mark."""
    characters = [chr(code) for code in range(0x20000) if not 0xD800 <= code < 0xE000]
    texts = [f"a{one}{one}b {one}  {one}" for one in characters]
    for first in range(0, len(texts), 5_000):
        encoded = tokenizer.encode_documents(texts[first : first + 5_000])
        for text, document in zip(texts[first : first + 5_000], encoded, strict=True):
            assert document[1:].tolist() == reference.encode_ordinary(text), f"{text!r}"


def test_many_control_characters_match_tiktoken(reference: tiktoken.Encoding) -> None:
    """Every text lacks some character to use as a mark."""
    tokenizer = load_tokenizer()
    for count in (1, 2, 7, 8, 9, 20):
        text = "".join(f"{chr(code)}  word{chr(code)} " for code in (*range(1, 9), *range(0xFDD0, 0xFDE0)))[
            : 10 * count
        ]
        assert tokenizer.encode(text).tolist() == reference.encode_ordinary(text)


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "\x00" * 10_000, "x" * 300_000, "!" * 300_000, "\ufeffbom"])
def test_unusual_texts_match_tiktoken(tokenizer: Tokenizer, reference: tiktoken.Encoding, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.tolist() == reference.encode_ordinary(text)
    assert tokenizer.decode(ids) == text


def test_gpt2_description(tokenizer: Tokenizer) -> None:
    assert tokenizer.describe() == {
        "kind": "tiktoken",
        "name": "r50k_base",
        "sha256": "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        "vocab_size": 50_257,
        "end_of_text": 50_256,
    }
    assert tokenizer.is_default
    assert load_tokenizer("r50k_base").describe() == tokenizer.describe()


def test_partial_character_decodes_to_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂")
    assert len(ids) > 1
    assert tokenizer.decode(ids[:1]) == "\ufffd"
    assert tokenizer.decode_bytes(ids) == "🙂".encode()


def test_token_bytes(tokenizer: Tokenizer, reference: tiktoken.Encoding) -> None:
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (50_257,)
    assert lengths[END_OF_TEXT] == 0
    assert lengths[:END_OF_TEXT].tolist() == [len(reference.decode_single_token_bytes(i)) for i in range(END_OF_TEXT)]


@pytest.mark.parametrize("damage", ["missing", "folder", "empty", "one byte", "cut short", "not base64"])
def test_damaged_vocabulary_raises(damage: str, tmp_path: Path) -> None:
    content = SHIPPED_VOCABULARY.read_bytes()
    path = tmp_path / VOCAB_FILE
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        changed = {
            "empty": b"",
            "one byte": content[:5_000] + bytes([content[5_000] ^ 1]) + content[5_001:],
            "cut short": content[:-1_000],
            "not base64": b"%%% 0\n",
        }
        path.write_bytes(changed[damage])
    with pytest.raises(UserError, match="restore it with git checkout") as caught:
        GPT2Tokenizer(path)
    assert str(path) in str(caught.value)


def test_no_network_and_no_cache() -> None:
    """Audit events show what Python opens for writing, connects to or creates: nothing."""
    code = """
import sys
seen = []
def watch(event, args):
    writing = event == "open" and (isinstance(args[1], str) and set(args[1]) & set("wax+") or args[2] & 3)
    if writing or event.startswith("socket.") or event in ("os.mkdir", "os.rename"):
        seen.append((event, args))
import tiktoken, numpy, myllm.data.tokenizer.load
sys.addaudithook(watch)
assert myllm.data.tokenizer.load.load_tokenizer().encode("Hello world").tolist() == [15496, 995]
assert not seen, seen
open("/dev/null", "w").close()
assert len(seen) == 1, "the watch does not work"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
