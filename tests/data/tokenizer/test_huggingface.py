"""tokenizer.json files of four kinds, built with Hugging Face's library and compared with it."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from myllm.data.tokenizer.base import Tokenizer, split_text
from myllm.data.tokenizer.huggingface import END_OF_TEXT_TOKENS, MAX_PIECE_CHARS, WORD_START, byte_alphabet
from myllm.data.tokenizer.load import load_tokenizer
from myllm.errors import UserError

PROSE = (
    "The old river ran under the stone bridge, and children counted boats until evening. Été, Straße, naïve: "
    "winter light on the harbour wall; bread, copper, lantern 3.14159!\n\n"
) * 40
TEXTS = st.text() | st.text(alphabet=" \n\ta1'é🙂<|endoftext></s>", max_size=80)


def byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|pad|>", "<|endoftext|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    return tokenizer


def llama_like() -> tokenizers.Tokenizer:
    """Like a converted SentencePiece BPE: a mark for spaces, and byte tokens for unknown text."""
    spare = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *spare]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False, max_token_length=8)
    tokenizer.train_from_iterator([PROSE], trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]  # the bytes are the model's own
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    """Like T5's: `</s>` is an entry of the model itself, with the best score."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([PROSE + "<a/s>" * 9], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator([PROSE + "[SEP]"], trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte-level": byte_level,
    "llama-like": llama_like,
    "unigram": unigram,
    "word-piece": word_piece,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vocabularies")
    for name, make in KINDS.items():
        (folder / name).mkdir()
        make().save(str(folder / name / "tokenizer.json"))
    return {name: folder / name / "tokenizer.json" for name in KINDS}


@pytest.fixture(scope="module")
def bytewise(files: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(files["byte-level"])


by_kind = pytest.mark.parametrize("kind", KINDS)


@by_kind
def test_ids_match_transformers(files: dict[str, Path], kind: str) -> None:
    ours, peer = load_tokenizer(files[kind]), PreTrainedTokenizerFast(tokenizer_file=str(files[kind]))
    for text in ("", "The old river", " two  spaces ", "été 3.14\n\nx", "日本語 🙂", PROSE):
        ids = ours.encode(text)
        assert ids.dtype == np.uint16
        assert ids.tolist() == peer.encode(text, add_special_tokens=False)
        if kind != "byte-level":  # where spaces come back by rules
            assert ours.decode(ids) == peer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    assert ours.vocab_size == len(peer)


@given(text=TEXTS)
def test_byte_level_round_trip(bytewise: Tokenizer, text: str) -> None:
    ids = bytewise.encode(text)
    assert bytewise.decode(ids) == text
    assert bytewise.decode_bytes(ids) == text.encode()
    assert bytewise.token_bytes()[ids].sum() == len(text.encode())
    assert bytewise.encode_document(text).tolist() == [bytewise.end_of_text, *ids.tolist()]


@given(text=TEXTS)
def test_text_never_encodes_to_special_tokens(files: dict[str, Path], loaded: dict[str, Tokenizer], text: str) -> None:
    for kind in KINDS:
        assert not special_ids(files[kind], loaded[kind].encode(text))


@pytest.fixture(scope="module")
def loaded(files: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(file) for kind, file in files.items()}


def special_ids(file: Path, ids: np.ndarray) -> set[str]:
    """Special tokens among the ids, according to the file, except the one for unknown text."""
    added = {token["id"]: token["content"] for token in json.loads(file.read_text())["added_tokens"]}
    return {added[i] for i in ids.tolist() if i in added} - {"<unk>", "[UNK]"}


@by_kind
def test_special_token_strings_encode_as_text(files: dict[str, Path], kind: str) -> None:
    ours = load_tokenizer(files[kind])
    added = [token["content"] for token in json.loads(files[kind].read_text())["added_tokens"]]
    for text in [*added, "a" + "".join(added) + "b", *(f"x {token} y" for token in added)]:
        ids = ours.encode(text)
        assert len(ids)
        assert not special_ids(files[kind], ids), text
        if kind in ("byte-level", "llama-like"):
            assert ours.decode(ids) == text


def test_special_tokens_decode_to_text(loaded: dict[str, Tokenizer]) -> None:
    for kind, shown in (("byte-level", "<|endoftext|>"), ("llama-like", "</s>"), ("unigram", "</s>")):
        ours = loaded[kind]
        assert ours.decode([ours.end_of_text]) == shown
        assert ours.token_bytes()[ours.end_of_text] == 0


@by_kind
def test_ignores_truncation_and_padding(files: dict[str, Path], kind: str, tmp_path: Path) -> None:
    changed = tokenizers.Tokenizer.from_file(str(files[kind]))
    changed.enable_truncation(8)
    changed.enable_padding(length=100)
    changed.save(str(tmp_path / "tokenizer.json"))
    assert len(changed.encode(PROSE).ids) == 100 or len(changed.encode(PROSE).ids) == 8
    ours, plain = load_tokenizer(tmp_path), load_tokenizer(files[kind])
    for text in ("a", PROSE):
        assert ours.encode(text).tolist() == plain.encode(text).tolist()


def test_ignores_dropout(files: dict[str, Path], tmp_path: Path) -> None:
    spec = json.loads(files["byte-level"].read_text())
    spec["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    ours, plain = load_tokenizer(tmp_path), load_tokenizer(files["byte-level"])
    assert ours.encode(PROSE).tolist() == plain.encode(PROSE).tolist()


def test_token_bytes_without_byte_level(loaded: dict[str, Tokenizer]) -> None:
    for kind, text in (("llama-like", "the river 日本 🙂"), ("unigram", "the river Été")):
        ours = loaded[kind]
        assert ours.token_bytes()[ours.encode(text)].sum() == len(text.encode()) + 1  # the space in front
    assert loaded["unigram"].token_bytes()[loaded["unigram"].encode("日本")].sum() == 1  # no more than that space
    ours = loaded["word-piece"]
    assert ours.token_bytes()[ours.encode("the river, under it")].sum() == len("theriver,underit")
    assert ours.decode_bytes(ours.encode("the river ran")) == b" the river ran"
    assert loaded["llama-like"].decode_bytes(loaded["llama-like"].encode("日 é")) == " 日 é".encode()


def test_partial_character_decodes_to_replacement(loaded: dict[str, Tokenizer]) -> None:
    for kind in ("byte-level", "llama-like"):
        ids = loaded[kind].encode("🙂")
        assert "\ufffd" in loaded[kind].decode(ids[: len(ids) - 1])


def test_lone_surrogate_preserves_surrounding_text(loaded: dict[str, Tokenizer]) -> None:
    text = "a\ud800b\udfffc\ud83d\ude42"
    for kind in ("byte-level", "llama-like"):
        assert loaded[kind].decode(loaded[kind].encode(text)) == "a\ufffdb\ufffdc🙂"


@pytest.mark.parametrize("text", ["", "\x00", "\x00" * 300_000, " " * 1_000_000 + "a", "a" * 2_000_000, "\n" * 300_001])
def test_adversarial_texts_round_trip_within_time_limit(bytewise: Tokenizer, text: str) -> None:
    started = time.process_time()
    assert bytewise.decode(bytewise.encode(text)) == text
    assert time.process_time() - started < 20


@by_kind
def test_very_long_word_encodes_within_time_limit(loaded: dict[str, Tokenizer], kind: str) -> None:
    started = time.process_time()
    for text in ("a" * 1_000_000, " " * 1_000_000 + "a"):
        loaded[kind].encode(text)
    assert time.process_time() - started < 30


def test_word_split_preserves_ids(files: dict[str, Path], bytewise: Tokenizer) -> None:
    text = PROSE * 60
    assert len(text) > 3 * MAX_PIECE_CHARS
    peer = tokenizers.Tokenizer.from_file(str(files["byte-level"]))
    assert bytewise.encode(text).tolist() == peer.encode(text).ids


@given(st.text(alphabet=" \nab", max_size=60), st.integers(2, 9))
def test_split_text_is_lossless(text: str, size: int) -> None:
    pieces = list(split_text(text, size, WORD_START))
    assert "".join(pieces) == text
    assert all(len(piece) <= size for piece in pieces)
    assert all(pieces) or not text


def test_byte_alphabet_matches_library() -> None:
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    text = bytes(range(256)).decode("latin-1")
    shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]
    assert "".join(byte_alphabet()[byte] for byte in text.encode()) == shown


def test_ids_with_gaps(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 7}, []))
    tokenizer.add_special_tokens(["<eos>"])
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"][0]["id"] = 9
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert ours.vocab_size == max(peer.get_vocab().values()) + 1 > peer.get_vocab_size()
    assert ours.token_bytes().shape == (ours.vocab_size,)
    assert ours.encode("ab").tolist() == [0, 7]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("token", END_OF_TEXT_TOKENS)
def test_finds_end_of_text_token(token: str, special: bool, tmp_path: Path) -> None:
    tokenizer = byte_level_of(["<pad>", token, *END_OF_TEXT_TOKENS[END_OF_TEXT_TOKENS.index(token) + 1 :]], special)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert ours.end_of_text == tokenizer.token_to_id(token)
    assert ours.token_bytes()[ours.end_of_text] == 0
    assert ours.end_of_text not in ours.encode(f"a{token}b")
    assert ours.decode(ours.encode(f"a{token}b")) == f"a{token}b"


def byte_level_of(added: list[str], special: bool = True, spare: int = 0) -> tokenizers.Tokenizer:
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"spare{number}" for number in range(spare))]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=special) for token in added])
    return tokenizer


def test_non_special_added_tokens_encoded(tmp_path: Path) -> None:
    tokenizer = byte_level_of(["<|endoftext|>"])
    tokenizer.add_tokens(["été", "    "])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    text = "l'été    x"
    ids = ours.encode(text)
    assert {tokenizer.token_to_id("été"), tokenizer.token_to_id("    ")} < set(ids.tolist())
    assert ours.decode(ids) == text
    assert ours.token_bytes()[ids].sum() == len(text.encode())


def test_id_dtype_16_and_32_bits(tmp_path: Path) -> None:
    for spare, dtype in ((65_536 - 257, np.uint16), (65_536 - 256, np.uint32)):
        byte_level_of(["</s>"], spare=spare).save(str(tmp_path / "tokenizer.json"))
        ours = load_tokenizer(tmp_path)
        assert (ours.vocab_size, ours.end_of_text) == (256 + spare + 1, 256 + spare)
        assert ours.encode_document("").tolist() == [256 + spare]
        assert ours.dtype == ours.encode_document("a").dtype == dtype


def test_excessive_id_raises(tmp_path: Path) -> None:
    spec = json.loads(byte_level_of(["</s>"]).to_str())
    spec["model"]["vocab"]["huge"] = 4_000_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="ids up to 4,000,000,000, expected below 10,000,000"):
        load_tokenizer(tmp_path)


def test_missing_end_of_text_token_raises(tmp_path: Path) -> None:
    byte_level_of(["<pad>", "<mask>"]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"<pad>, <mask>, expected one of <\|endoftext\|>.*add_special_tokens"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"\x0a\x0eSentencePiece", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "has no model"),
        (b'{"model_type": "gpt2"}', "has no model"),
        (b'{"model": {"type": "Other"}}', "not a tokenizer: "),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}, "decoder": 7}', "not a tokenizer: "),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}', "its added tokens are none"),
    ],
)
def test_invalid_file_raises(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(file)
    assert str(file) in str(caught.value)


def test_unencodable_text_raises(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"river": 0}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"cannot encode a text that begins with 'bridge': .*needs a token"):
        load_tokenizer(tmp_path).encode("bridge")


def test_missing_path_raises_with_suggestion(tmp_path: Path, files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"no tokenizer 'r50k', did you mean 'r50k_base'\?"):
        load_tokenizer("r50k")
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(UserError, match=r"did you mean .*tokenizer\.json'\?"):
        load_tokenizer(tmp_path / "tokenizr.json")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "vocab.json").touch()
    with pytest.raises(UserError, match=r"has no tokenizer\.json; it has vocab\.json"):
        load_tokenizer(tmp_path / "sub")
    assert load_tokenizer(str(files["unigram"].parent)).file == files["unigram"]


def test_name_depends_only_on_content(files: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "other name.json"
    copy.write_bytes(files["byte-level"].read_bytes())
    ours = load_tokenizer(copy)
    digest = hashlib.sha256(copy.read_bytes()).hexdigest()
    assert ours.describe() == load_tokenizer(files["byte-level"]).describe()
    assert ours.describe() == {
        "kind": "huggingface",
        "name": f"bpe-{ours.vocab_size}-{digest[:8]}",
        "sha256": digest,
        "vocab_size": tokenizers.Tokenizer.from_file(str(copy)).get_vocab_size(),
        "end_of_text": 1,
    }
    assert not ours.is_default


def test_single_thread_without_network_or_torch(files: dict[str, Path]) -> None:
    code = """
import sys, threading
seen = []
sys.addaudithook(lambda event, args: seen.append(event) if event.startswith("socket.") else None)
from pathlib import Path
from myllm.data.tokenizer.load import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
for text in ("the river " * 50_000, "x"):
    tokenizer.encode(text)
tasks = Path("/proc/self/task")
import numpy
before = len(list(tasks.iterdir())) if tasks.exists() else 0
tokenizer.encode("a" * 200_000)
after = len(list(tasks.iterdir())) if tasks.exists() else 0
names = [path.joinpath("comm").read_text().strip() for path in tasks.iterdir()] if tasks.exists() else []
assert before == after and not [name for name in names if "rayon" in name or "tokenizers" in name], names
assert not seen and not {"torch", "transformers"} & set(sys.modules)
print(after)
"""
    environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, files["byte-level"]], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("0", "1")
