"""ONNX files run in onnxruntime, GGUF files are read by transformers: both give our logits."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import onnxruntime
import pytest
import torch
from support.saved_checkpoints import KINDS, SMALL, Save, small_vocabulary
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from myllm.cli.main import main as myllm
from myllm.config import ModelConfig
from myllm.data.tokenizer.train import train_tokenizer
from myllm.errors import UserError
from myllm.hub.architectures import transformers_config
from myllm.hub.export import onnx as to_onnx
from myllm.hub.export.gguf import export_gguf
from myllm.hub.export.onnx import export_onnx
from myllm.hub.export.source import load_export_source
from myllm.inference.load import load_model

ONE_LAYER = replace(SMALL, n_layers=1)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(400, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def our_logits(token_ids: torch.Tensor) -> np.ndarray:
    return load_model("made", "cpu").model(token_ids).numpy()


# -- ONNX -------------------------------------------------------------------------------------------------------------


UNLIKE_ANY = replace(
    SMALL, activation="relu2", qk_norm=True, bias=True, n_kv_heads=1, embedding_norm=True, residual_scales=True,
    tie_embeddings=False, rope_scaling=(4.0, 1.0, 2.0, 16.0),
)  # fmt: skip


@pytest.mark.parametrize("config", [KINDS["gpt2"], UNLIKE_ANY], ids=["gpt2", "unlike any"])
def test_onnx_logits_match(config: ModelConfig, save: Save, tmp_path: Path) -> None:
    config = replace(config, n_layers=1)
    assert export_onnx(load_export_source(save(config)), tmp_path / "m.onnx") < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for shape in ((1, 1), (3, 7), (2, 48)):
        (theirs,) = session.run(["logits"], {"tokens": tokens(*shape).numpy()})
        assert theirs.shape == (*shape, 400)
        assert np.abs(theirs - our_logits(tokens(*shape))).max() < 1e-4
    assert [path.name for path in tmp_path.glob("*onnx*")] == ["m.onnx"]


def test_onnx_external_data(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for models that one file cannot hold."""
    monkeypatch.setattr(to_onnx, "_large", lambda _: True)
    export_onnx(load_export_source(save(ONE_LAYER)), tmp_path / "m.onnx")
    assert sorted(path.name for path in tmp_path.glob("*onnx*")) == ["m.onnx", "m.onnx.data"]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"tokens": tokens(1, 5).numpy()})
    assert np.abs(theirs - our_logits(tokens(1, 5))).max() < 1e-4


def test_onnx_logit_mismatch_raises(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = to_onnx._write

    def wrong(model: torch.nn.Module, file: Path) -> None:
        write(model, file)
        with torch.no_grad():
            model.norm.weight[0] += 1

    monkeypatch.setattr(to_onnx, "_write", wrong)
    with pytest.raises(UserError, match="onnxruntime gives other logits"):
        export_onnx(load_export_source(save(ONE_LAYER)), tmp_path / "m.onnx")
    assert not list(tmp_path.glob("*onnx*"))


# -- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow if k == "qwen3" else ()) for k in KINDS])
@torch.no_grad()
def test_gguf_logits_and_tokenizer_match(kind: str, save: Save, tmp_path: Path) -> None:
    # From this format transformers reads no biases of a Llama, and not every size: these are its defaults.
    seen = {"llama": {"bias": False}, "qwen3": {"head_dim": 128}, "gpt2": {"max_seq_len": 1_024, "d_ff": 96}}
    vocabulary = {"vocab_size": 50_257} if kind == "qwen3" else {}
    config = replace(KINDS[kind], **seen.get(kind, {}), **vocabulary)
    export_gguf(load_export_source(save(config)), tmp_path / "m.gguf")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    theirs = peer.eval()(tokens(2, 48)).logits.numpy()
    assert np.abs(theirs - our_logits(tokens(2, 48))).max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "the river  ran\n\n under 12 bridges, naïve 言語"
    assert tokenizer(text, add_special_tokens=False).input_ids == load_model("made").tokenizer.encode(text).tolist()


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_gguf_dtypes_and_biases(dtype: str, name: str, save: Save, tmp_path: Path) -> None:
    source = load_export_source(save(KINDS["llama"]))
    count = export_gguf(source, tmp_path / "m.gguf", dtype)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert len(reader.tensors) == count
    assert {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 2} == {name}
    assert {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 1} == {"F32"}
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    assert {"blk.1.ffn_gate.bias", "blk.1.attn_k.bias", "blk.1.attn_output.bias"} <= by_name.keys()
    # Heads of 8: where we pair row i with i + 4, the file pairs 2i with 2i + 1.
    ours = source.weights["blocks.1.attention.qkv_proj.bias"][:8]
    assert by_name["blk.1.attn_q.bias"].data[:8].tolist() == ours[[0, 4, 1, 5, 2, 6, 3, 7]].tolist()
    fields = {key: field.contents() for key, field in reader.fields.items()}
    ends = {fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    assert ends == {source.tokenizer.end_of_text}
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["llama.attention.key_length"] == 8
    assert len(fields["tokenizer.ggml.merges"]) == len(json.loads(small_vocabulary())["model"]["merges"])


def test_gguf_rope_scaling(save: Save, tmp_path: Path) -> None:
    """llama.cpp divides the plain frequencies by the tensor rope_freqs."""
    config = replace(ONE_LAYER, rope_scaling=(4.0, 1.0, 2.0, 16.0), head_dim=16, rope_theta=1e3)
    export_gguf(load_export_source(save(config)), tmp_path / "m.gguf", "bfloat16")
    (factors,) = (x.data for x in gguf.GGUFReader(tmp_path / "m.gguf").tensors if x.name == "rope_freqs.weight")
    peer = AutoConfig.for_model(**transformers_config(config, 0, "float32"))
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](peer)
    plain = 1e3 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / torch.tensor(factors), theirs, rtol=1e-6, atol=0)
    source = load_export_source(save(replace(config, qk_norm=True)))
    with pytest.raises(UserError, match=r"scaled rotary frequencies \(model\.rope_scaling\) of Llama models alone"):
        export_gguf(source, tmp_path / "no.gguf")
    assert not (tmp_path / "no.gguf").exists()


def test_gguf_custom_vocabulary(save: Save, corpus: Path, tmp_path: Path) -> None:
    file = train_tokenizer((path.read_text() for path in corpus.iterdir()), 400, tmp_path / "v.json", progress=False)
    source = load_export_source(save(SMALL, file))
    export_gguf(source, tmp_path / "m.gguf")
    text = "the river  ran\n under"
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")(text, add_special_tokens=False).input_ids
    assert theirs == source.tokenizer.encode(text).tolist()


# -- the command ------------------------------------------------------------------------------------------------------


def test_export_command(save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(ONE_LAYER)
    words = ["export", "made", "--to-onnx", str(tmp_path / "m.onnx"), "--to-gguf", str(tmp_path / "deep/m.gguf")]
    myllm([*words, "--dtype", "bfloat16"])
    output = capsys.readouterr().out
    assert "logits of onnxruntime differ by at most" in output
    assert "read back and compared 11 tensors" in output
    for wrong in (words, ["export", "made"], ["export", "made", "--to-gguf", str(tmp_path)]):
        with pytest.raises(SystemExit) as caught:
            myllm(wrong)
        assert caught.value.code == 2
    assert "exists; give another path" in capsys.readouterr().err


@pytest.mark.parametrize(("package", "call"), [("gguf", export_gguf), ("onnxruntime", export_onnx)])
def test_missing_extra_raises(package: str, call, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"needs {package}, which is not installed: pip install"):
        call(load_export_source(save(SMALL)), tmp_path / "file")
