"""Exported folders: a stranger with transformers alone gets our logits, our ids and our text."""

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tiktoken
import tiktoken.load
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support.saved_checkpoints import GPT2, KINDS, R50K, SMALL, Save
from tiktoken_ext.openai_public import r50k_pat_str
from transformers import AutoModelForCausalLM, AutoTokenizer

from myllm.cli.main import main as myllm
from myllm.config import ModelConfig
from myllm.data.tokenizer.load import load_tokenizer
from myllm.data.tokenizer.train import train_tokenizer
from myllm.errors import UserError
from myllm.hub import architectures
from myllm.hub.export import verify as parity
from myllm.hub.export.tokenizer import tokenizer_files
from myllm.hub.export.transformers import export_transformers
from myllm.inference.completion import generate
from myllm.inference.load import load_model
from myllm.model.transformer import Transformer

STRANGER = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer

for folder in sys.argv[2:]:
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    made = model.generate(**tokenizer(sys.argv[1], return_tensors="pt"), max_new_tokens=12, do_sample=False)
    print(json.dumps(tokenizer.decode(made[0], skip_special_tokens=True)))
assert "myllm" not in sys.modules
"""


def quietly(_: str) -> None:
    pass


# -- what a stranger gets ---------------------------------------------------------------------------------------------


def test_greedy_text_matches_transformers(save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, config in KINDS.items():
        save(replace(config, vocab_size=50_257) if kind == "llama" else config, name=kind)
        myllm(["export", kind, "--to", str(tmp_path / kind)])
        output = capsys.readouterr().out
        assert "largest difference of a logit" in output
        assert f"exported {architectures.CLASSES[kind]}" in output
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, "the river", *KINDS], env=alone, capture_output=True, text=True, timeout=240,
        check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours = [generate(load_model(kind, "cpu"), "the river", 12, temperature=0) for kind in KINDS]
    assert list(map(json.loads, done.stdout.splitlines())) == ours
    assert len(set(ours)) == len(KINDS)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 0.3), ("float16", 0.03)])
@torch.no_grad()
def test_logits_and_dtypes_match(dtype: str, bound: float, save: Save, tmp_path: Path) -> None:
    export = export_transformers(save(KINDS["llama"]), tmp_path / "out", dtype, say=quietly)
    peer = AutoModelForCausalLM.from_pretrained(export.folder)
    assert peer.dtype == getattr(torch, dtype)
    assert peer.config.vocab_size == peer.get_input_embeddings().weight.shape[0] == 400
    tokens = torch.randint(400, (2, 48), generator=torch.Generator().manual_seed(1))
    ours = load_model("made", "cpu").model(tokens)
    difference = float((ours - peer.float()(tokens).logits).abs().max())
    assert difference < bound
    assert (export.rounding > 0) == (dtype != "float32")
    assert export.rounding < bound
    names = set(safe_open(export.folder / "model.safetensors", "pt").keys())
    assert "lm_head.weight" not in names  # tied


def test_exported_files(save: Save, tmp_path: Path) -> None:
    folder = export_transformers(save(replace(KINDS["qwen3"], vocab_size=50_257)), tmp_path / "out", say=quietly).folder
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "myllm.json",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    mark = json.loads((folder / "myllm.json").read_text())
    assert (mark["format"], mark["step"], mark["tokens_seen"]) == ("myllm-export-1", 7, 448)
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["head_dim"]) == (50_256, 50_256, 6)
    assert "| steps | 7 of " in (folder / "README.md").read_text()
    assert not list(tmp_path.glob(".*"))


def test_large_model_is_sharded(save: Save, tmp_path: Path) -> None:
    folder = export_transformers(save(KINDS["gpt2"]), tmp_path / "out", say=quietly, max_shard_size="20KB").folder
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1
    assert all((folder / name).is_file() for name in files)
    assert not (folder / "model.safetensors").exists()


# -- the tokenizer ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in tokenizer_files(load_tokenizer(), 1_024).items():
        (folder / name).write_text(content, encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def peer() -> tiktoken.Encoding:
    """tiktoken itself, on the file of the vocabulary."""
    ranks = tiktoken.load.load_tiktoken_bpe(str(load_tokenizer().file))
    return tiktoken.Encoding(
        "r50k", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50_256}
    )


ODD = st.sampled_from(
    ["<|endoftext|>", "<|endof", "  ", "\t \n", "\u2003", "\x85", "'s", "'LL", "\u00a0", "\r\n\r\n", "e\u0301", "Ġ",
     "\U0001f469\u200d\U0001f52c", " the", "The", "123", "_", "\u0e01\u0e33", "\ufeff", "\x00", "中文", "\uff11\uff12"]
)  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.text(), ODD), max_size=30).map("".join))
def test_token_ids_match_tiktoken(
    fast: transformers.PreTrainedTokenizerBase, peer: tiktoken.Encoding, text: str
) -> None:
    expected = peer.encode_ordinary(text)
    assert fast(text, add_special_tokens=False).input_ids == expected
    assert fast(text).input_ids == fast.encode(text) == [50_256, *expected]
    assert fast.decode(expected) == text


def test_all_characters_match_tiktoken(fast: transformers.PreTrainedTokenizerBase, peer: tiktoken.Encoding) -> None:
    """The two libraries' tables of letters, digits and spaces are the same: all scripts, and some of the rest."""
    codes = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 64)]
    for start in range(0, len(codes), 4_096):
        text = "".join(f"a{c}1{c}! {c}  b" for c in map(chr, codes[start : start + 4_096]))
        assert fast(text, add_special_tokens=False, verbose=False).input_ids == peer.encode_ordinary(text)


def test_all_tokens_match_tiktoken(fast: transformers.PreTrainedTokenizerBase, peer: tiktoken.Encoding) -> None:
    for token in range(50_256):
        if (text := peer.decode_single_token_bytes(token).decode("utf-8", "replace")).isprintable():
            assert fast(text, add_special_tokens=False).input_ids == peer.encode_ordinary(text)
    assert len(fast) == 50_257


def test_special_tokens(fast: transformers.PreTrainedTokenizerBase) -> None:
    assert (fast.bos_token_id, fast.eos_token_id, fast.model_max_length) == (50_256, 50_256, 1_024)
    assert fast("a", "b").input_ids == [50_256, 64, 50_256, 65]
    assert fast("a<|endoftext|>", split_special_tokens=False).input_ids == [50_256, 64, 50_256]
    assert fast.decode([50_256, 64], skip_special_tokens=True) == "a"
    text = "isn ' t , it ?"  # nothing is tidied up
    assert fast.decode(fast(text).input_ids, skip_special_tokens=True) == text


def test_custom_vocabulary(save: Save, corpus: Path, tmp_path: Path) -> None:
    file = train_tokenizer((path.read_text() for path in corpus.iterdir()), 400, tmp_path / "v.json", progress=False)
    spec = json.loads(file.read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(spec))
    folder = export_transformers(
        save(replace(R50K, vocab_size=400, vocab_multiple=64), file), tmp_path / "out", say=quietly
    ).folder
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(file)
    text = "the river <|endoftext|> ran under é 言語\n\n  old"
    assert theirs(text).input_ids == ours.encode_document(text).tolist()
    assert (folder / "myllm_tokenizer.json").read_bytes() == file.read_bytes()


# -- the gate and its errors ------------------------------------------------------------------------------------------


def test_architectures_cover_all_model_config_fields() -> None:
    names = {field.name for field in fields(ModelConfig)}
    for kind, switches in architectures.ALLOWED_VALUES.items():
        known = architectures.UNRESTRICTED_FIELDS | switches.keys()
        assert names == known, f"hub/architectures.py: what can a {kind} be? ALLOWED_VALUES or UNRESTRICTED_FIELDS"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "gelu"}, ["LlamaForCausalLM: model.activation is gelu, expected swiglu or relu2"]),
        (
            {"embedding_norm": True},
            ["LlamaForCausalLM: model.embedding_norm is True, expected False with model.tie_embeddings"],
        ),
        (
            {"qk_norm": True, "bias": True},
            ["Qwen3ForCausalLM: model.bias is True", "LlamaForCausalLM: model.qk_norm is True"],
        ),
        (
            {"norm": "layernorm", "activation": "gelu", "qk_norm": True},
            ["model.norm is layernorm", "model.activation"],
        ),
        ({**vars(GPT2), "n_kv_heads": 2}, ["GPT2LMHeadModel: model.n_kv_heads is 2, expected model.n_heads (4)"]),
        ({**vars(GPT2), "head_dim": 8}, ["model.head_dim is 8"]),
        # LlamaConfig refuses these sizes when the folder is opened (test_parity.py).
        (
            {"n_heads": 5, "n_kv_heads": 1, "head_dim": 4},
            ["LlamaForCausalLM: model.d_model is 24, expected a multiple of model.n_heads (5)"],
        ),
    ],
)
def test_unsupported_model_settings_raise(changes: dict, words: list[str], save: Save, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        export_transformers(save(replace(R50K, **changes)), tmp_path / "out", say=quietly)
    for word in words:
        assert word in str(caught.value)
    assert list(tmp_path.glob("*out*")) == []


def test_logit_mismatch_raises(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = architectures.transformers_config

    def wrong(*arguments: object) -> dict:
        return right(*arguments) | {"rms_norm_eps": 1e-2}

    monkeypatch.setattr("myllm.hub.export.transformers.transformers_config", wrong)
    with pytest.raises(UserError, match="transformers gives other logits than this model"):
        export_transformers(save(SMALL), tmp_path / "out", say=quietly)
    assert list(tmp_path.glob("*out*")) == []


def test_nan_logits_raise() -> None:
    model = Transformer(SMALL).eval()
    inputs = [torch.tensor([[1, 2]]), torch.tensor([[3]])]
    assert parity.compare_logits("it gives", model, model, inputs)[0] == [0, 0]

    def not_a_number(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens) if len(tokens[0]) == 2 else model(tokens) * torch.nan

    with pytest.raises(UserError, match="it gives other logits than this model: largest difference nan"):
        parity.compare_logits("it gives", model, not_a_number, inputs[::-1])
    with pytest.raises(UserError, match="it gives other logits than this model"):
        parity.compare_logits("it gives", model, not_a_number, inputs)


def test_token_id_mismatch_raises(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tokenizer_files

    def wrong(*arguments: object) -> dict[str, str]:
        files = right(*arguments)
        settings = json.loads(files["tokenizer_config.json"]) | {"split_special_tokens": False}
        return files | {"tokenizer_config.json": json.dumps(settings)}

    monkeypatch.setattr("myllm.hub.export.transformers.tokenizer_files", wrong)
    with pytest.raises(UserError, match="gives other ids than r50k_base"):
        export_transformers(save(R50K), tmp_path / "out", say=quietly)


def test_missing_transformers_raises(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        export_transformers(save(SMALL), tmp_path / "out", say=quietly)
    assert not (tmp_path / "out").exists()


def test_existing_output_is_preserved_or_rejected(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "myllm.hub.export.transformers.verify", lambda *_: parity.Parity(0, 0, 1, 0)
    )  # of no interest here
    folder, out = save(SMALL), tmp_path / "out"
    out.mkdir()
    export_transformers(folder, out, say=quietly)  # empty
    (out / "extra").touch()
    export_transformers(folder, out, say=quietly)  # an export of ours
    assert not (out / "extra").exists()
    (kept,) = tmp_path.glob("out.kept-*")  # no part of the export, so not deleted with it
    assert [path.name for path in kept.iterdir()] == ["extra"]
    (out / "myllm.json").unlink()
    with pytest.raises(UserError, match="is not an export of MyLLM"):
        export_transformers(folder, out, say=quietly)
    export_transformers(folder, out, overwrite=True, say=quietly)
    assert (out / "myllm.json").exists()
    (aside,) = tmp_path.glob("out.before-*")
    assert (aside / "config.json").exists()
    with pytest.raises(UserError, match="is a file"):
        export_transformers(folder, out / "config.json", say=quietly)


@pytest.mark.parametrize("there", [False, True])
def test_kill_leaves_no_partial_export(
    there: bool, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one, when all is written but nothing compared; then when the older export makes room."""
    folder, out = save(SMALL), tmp_path / "out"
    monkeypatch.setattr("myllm.hub.export.transformers.verify", lambda *_: parity.Parity(0, 0, 1, 0))
    if there:
        export_transformers(folder, out, say=quietly)
        (out / "older").touch()

    def die(where: Path, *_: object, **__: object) -> None:
        if not there or where.name.endswith("replaced"):
            os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        try:
            monkeypatch.setattr(
                "myllm.hub.export.transformers.shutil.rmtree" if there else "myllm.hub.export.transformers.verify", die
            )
            export_transformers(folder, out, say=quietly)
        finally:  # never back into pytest
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(list(tmp_path.glob(".out.*"))) == 1
    assert not out.exists() or (out / "older").exists() or (out / "model.safetensors").exists()
    export_transformers(folder, out, say=quietly)
    assert not (out / "older").exists()
    assert not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize("option", ["--to", "--to-gguf"])
def test_full_or_missing_disk_fails_cleanly(
    option: str, save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(SMALL)
    (tmp_path / "file").touch()
    for target, message in (("file/out", "cannot write"), ("out", "the disk is full")):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
        try:
            with pytest.raises(SystemExit) as caught:
                myllm(["export", "made", option, str(tmp_path / target)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, ignored)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def test_damaged_and_missing_checkpoints_raise(save: Save, tmp_path: Path) -> None:
    folder = save(SMALL)
    with pytest.raises(UserError, match="dtype is 'int8'"):
        export_transformers(folder, tmp_path / "out", "int8")
    (folder / "weights/__0_0.distcp").write_bytes(b"no")
    with pytest.raises(UserError, match="is not an intact checkpoint"):
        export_transformers(folder, tmp_path / "out", say=quietly)
    with pytest.raises(SystemExit):
        myllm(["export", "nothing", "--to", str(tmp_path / "out")])
