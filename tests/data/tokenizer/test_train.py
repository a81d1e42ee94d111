"""Trained tokenizers: read by Hugging Face's library, and trained on hostile texts."""

import json
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from conftest import write_corpus
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from myllm.cli import main as cli
from myllm.cli.tokenizer import tokenizer_train
from myllm.data.dataset import Dataset
from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.load import load_tokenizer
from myllm.data.tokenizer.train import train_tokenizer
from myllm.errors import UserError

TEXTS = ["the river ran under the old bridge, été <|endoftext|> 3.14\n" * 30, "", "bread\ud800 and copper 🙂 " * 30]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(iter(TEXTS), 300, tmp_path_factory.mktemp("trained") / "tokenizer.json", progress=False)


@pytest.fixture(scope="module")
def ours(trained: Path) -> Tokenizer:
    return load_tokenizer(trained)


@pytest.fixture(scope="module")
def peer(trained: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(trained), split_special_tokens=True)


def test_trained_vocabulary(trained: Path, ours: Tokenizer) -> None:
    peer = tokenizers.Tokenizer.from_file(str(trained))
    assert peer.token_to_id("<|endoftext|>") == ours.end_of_text == 0
    assert peer.get_vocab_size() == ours.vocab_size == 300
    assert sorted(ours.token_bytes())[:258] == [0, *[1] * 256, 2]  # the special token, and every byte
    assert [path.name for path in trained.parent.iterdir()] == ["tokenizer.json"]


@given(text=st.text() | st.text(alphabet=" \nthervbd.é🙂<|endoftext>"))
def test_ids_match_hugging_face(ours: Tokenizer, peer: PreTrainedTokenizerFast, text: str) -> None:
    ids = ours.encode(text)
    assert ids.tolist() == peer.encode(text, add_special_tokens=False)
    assert 0 not in ids
    assert ours.decode(ids) == text == peer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    assert ours.token_bytes()[ids].sum() == len(text.encode())


def test_training_is_deterministic(trained: Path, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from myllm.data.tokenizer.train import train_tokenizer
texts = eval(sys.stdin.read())
train_tokenizer(texts, 300, Path(sys.argv[1]), progress=False)
"""
    for seed in ("1", "2"):
        out = tmp_path / f"{seed}.json"
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))}
        subprocess.run(
            [sys.executable, "-c", code, out], input=ascii(TEXTS), text=True, check=True, env=environment, timeout=240
        )
        assert out.read_bytes() == trained.read_bytes()


@pytest.mark.parametrize("size", [-1, 0, 256, 10_000_001])
def test_invalid_vocab_size_raises(size: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocab_size is .*expected 257 .*10,000,000"):
        train_tokenizer(TEXTS, size, tmp_path / "t.json")
    assert not list(tmp_path.iterdir())


def test_smallest_vocabulary(tmp_path: Path) -> None:
    smallest = load_tokenizer(train_tokenizer(TEXTS, 257, tmp_path / "t.json", progress=False))
    assert smallest.vocab_size == 257
    assert smallest.encode("été").tolist() != []
    assert len(smallest.encode("été")) == 5


def test_empty_and_failing_sources_write_nothing(tmp_path: Path) -> None:
    for texts in ([], [""]):
        with pytest.raises(UserError, match="no text to learn a vocabulary from"):
            train_tokenizer(texts, 300, tmp_path / "t.json", progress=False)

    def failing():
        yield "some text"
        raise UserError("cannot read it")

    with pytest.raises(UserError, match="cannot read it"):
        train_tokenizer(failing(), 300, tmp_path / "t.json", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["a" * 5_000_000, " " * 2_000_000 + "x", "acgt", "\x00" * 300_000])
def test_adversarial_texts_train_within_time_limit(text: str, tmp_path: Path) -> None:
    if text == "acgt":
        text = "".join(random.Random(1).choices(text, k=500_000))
    started = time.process_time()
    tokenizer = load_tokenizer(train_tokenizer([text, "and a word"], 400, tmp_path / "t.json", progress=False))
    assert time.process_time() - started < 30
    assert tokenizer.vocab_size > 257
    assert tokenizer.decode(tokenizer.encode(text[:1_000])) == text[:1_000]


def test_train_command(tmp_path: Path, temp_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "my texts", documents=30, words=60)
    tokenizer_train(f"files:{corpus}", vocab_size=350, documents=25)
    output = capsys.readouterr().out
    (file,) = (temp_data / "tokenizers").rglob("tokenizer.json")
    assert file.parent.name.endswith("-350")
    assert output.startswith(f"{file}\n  350 tokens")
    assert "on the last 20 document(s)" in output
    figures = {words[0]: float(words[1]) for line in output.splitlines() if len(words := line.split()) == 2}
    assert figures.keys() >= {"this", "r50k_base"}
    assert 1 < figures["this"] < 10
    assert "--model.vocab-size 350" in output
    with pytest.raises(UserError, match=r"tokenizer\.json already exists.*--overwrite"):
        tokenizer_train(f"files:{corpus}", vocab_size=350)
    (file.parent / "tokenizer.json").write_text("other")
    tokenizer_train(f"files:{corpus}", vocab_size=350, documents=25, overwrite=True)
    assert capsys.readouterr().out == output


@pytest.mark.usefixtures("in_process")
def test_printed_commands_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], temp_data: Path) -> None:
    """The second command names the data set that the first one prepares."""
    source = tmp_path / "rows of mine.jsonl"
    source.write_text("".join(json.dumps({"body": f"line number {i} says hello"}) + "\n" for i in range(200)))
    words = ["tokenizer", "train", f"files:{source}", "--vocab-size", "300", "--text-column", "body"]
    cli.main(words)
    prepare, train = (shlex.split(line) for line in capsys.readouterr().out.splitlines()[-2:])
    cli.main(prepare[1:])
    dataset = Dataset.open(temp_data / "datasets" / train[train.index("--data.dataset") + 1])
    assert dataset.manifest["text_column"] == "body"
    assert dataset.manifest["tokenizer"]["vocab_size"] == int(train[train.index("--model.vocab-size") + 1])
    assert train[-6:] == [*capsys.readouterr().out.split()[-6:]], "as the first command says it too"


def test_train_command_with_too_little_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("one two two\n", encoding="utf-8")
    tokenizer_train(f"files:{tmp_path / 'a.txt'}", vocab_size=32_000, out=tmp_path / "out")
    output = capsys.readouterr().out
    size = len(json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"])
    assert f"{size:,} tokens" in output
    assert "too short for the requested 32,000 tokens" in output
    assert f"--model.vocab-size {size}" in output
    with pytest.raises(UserError, match="documents is -1"):
        tokenizer_train(f"files:{tmp_path / 'a.txt'}", documents=-1)
