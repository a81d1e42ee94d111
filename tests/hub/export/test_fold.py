"""Parts without a counterpart are folded into other weights: transformers and an import give the model's logits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model.test_parity import random_model
from support.saved_checkpoints import GPT2, SMALL, Save
from transformers import AutoModelForCausalLM

from myllm.config import ModelConfig
from myllm.errors import UserError
from myllm.hub import architectures
from myllm.hub.export import fold as folding
from myllm.hub.export.fold import fold, fold_weights
from myllm.hub.export.gguf import export_gguf
from myllm.hub.export.source import load_export_source
from myllm.hub.export.transformers import export_transformers
from myllm.hub.import_model import read_external_model
from myllm.inference.load import load_model
from myllm.model.transformer import Transformer
from myllm.presets import get_preset

NORM = {"embedding_norm": True, "tie_embeddings": False}
SCALES = {"residual_scales": True}
RELU2 = {"activation": "relu2"}
ALL = NORM | SCALES | RELU2
QWEN3 = replace(SMALL, qk_norm=True, n_kv_heads=2)
CASES = {
    "llama, norm": replace(SMALL, **NORM),
    "llama, scales, biases": replace(SMALL, **SCALES, bias=True),
    "llama, relu2, biases": replace(SMALL, **RELU2, bias=True),
    "llama, all, biases": replace(SMALL, **ALL, bias=True),
    "qwen3, norm": replace(QWEN3, **NORM),
    "qwen3, scales, tied": replace(QWEN3, **SCALES),
    "qwen3, relu2, tied": replace(QWEN3, **RELU2),
    "qwen3, scales, relu2, tied": replace(QWEN3, **SCALES | RELU2),
    "qwen3, all": replace(QWEN3, **ALL),
    "gpt2, all, dropout": replace(GPT2, **ALL, dropout_embedding=0.1),
    "gpt2, all, no biases": replace(GPT2, **ALL, bias=False),
}
TOKENS = torch.randint(400, (2, 48), generator=torch.Generator().manual_seed(1))


def quietly(_: str) -> None:
    pass


def scaled_down(name: str) -> ModelConfig:
    """A preset's model, as small as the others here."""
    return replace(get_preset(name).model, vocab_size=400, max_seq_len=48, d_model=32, n_layers=2, n_heads=2, d_ff=128)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, "float32") for case in CASES), ("llama, all, biases", "bfloat16"), ("qwen3, all", "bfloat16")],
)
@torch.no_grad()
def test_folded_export_import_round_trip(case: str, dtype: str, save: Save, tmp_path: Path) -> None:
    """float32 is compared with the model itself. bfloat16 rounds the folded weights, so with a model that has these."""
    config = CASES[case]
    source = load_export_source(save(config))
    export = export_transformers(source, tmp_path / "out", dtype, say=quietly)
    expected = load_model("made", "cpu").model(TOKENS)
    peer = AutoModelForCausalLM.from_pretrained(export.folder)
    assert peer.config.model_type == case.partition(",")[0]
    assert peer.dtype == getattr(torch, dtype)
    if dtype == "bfloat16":
        rounded = fold(source).model(dtype)(TOKENS)
        assert 1e-3 < (rounded - expected).abs().max() < 0.3
        expected = rounded
    assert (peer.float()(TOKENS).logits - expected).abs().max() < 1e-5
    external = read_external_model(export.folder)
    assert external.config.activation == config.activation
    assert not external.config.embedding_norm
    assert not external.config.residual_scales
    again = Transformer(external.config).eval()
    again.load_state_dict(external.weights)
    assert (again(TOKENS) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["lf-llm-269m-modern", "lf-llm-269m-adamw"])
def test_presets_export_as_qwen3(name: str, save: Save, tmp_path: Path) -> None:
    export = export_transformers(save(scaled_down(name)), tmp_path / "out", say=quietly)
    assert (
        export.architecture
        == "Qwen3ForCausalLM"
        == architectures.CLASSES[architectures.select_architecture(get_preset(name).model)]
    )
    assert export.parity.text < 1e-5


@pytest.mark.parametrize("changes", [NORM, SCALES, NORM | SCALES], ids=str)
@torch.no_grad()
def test_folded_logits_match_within_tolerance(changes: dict) -> None:
    """As in the docstring of export/fold.py, relative to the largest logit."""
    config = replace(QWEN3, **changes)
    model = random_model(config)
    plain_config, weights = fold_weights(config, model.state_dict())
    plain = Transformer(plain_config).eval()
    plain.load_state_dict(weights)
    logits = model(TOKENS)
    assert (plain(TOKENS) - logits).abs().max() <= 1e-6 * logits.abs().max()


def test_plain_model_is_not_folded(save: Save) -> None:
    source = load_export_source(save(QWEN3))
    assert fold(source) is source


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scales", "product"), [((1.0, -0.5), "-0.5"), ((1e-2, 1e-2), "0.0001"), ((1.0, torch.nan), "nan")]
)
def test_unfoldable_scales_raise(scales: tuple[float, ...], product: str, save: Save, tmp_path: Path) -> None:
    source = load_export_source(save(replace(SMALL, **SCALES)))
    source.weights["residual_scales"].copy_(torch.tensor(scales))
    message = rf"product of model.residual_scales up to block 1 is {product}, expected at least 0.001.*--to-onnx"
    with pytest.raises(UserError, match=message):
        export_transformers(source, tmp_path / "out", say=quietly)
    assert not list(tmp_path.glob("*out*"))


def test_incorrect_fold_raises(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "RESIDUAL_PROJECTIONS", ("attention.out_proj",))
    with pytest.raises(UserError, match="folded weights give other logits than this model"):
        export_transformers(save(replace(SMALL, **SCALES)), tmp_path / "out", say=quietly)
    assert not list(tmp_path.glob("*out*"))


def test_gated_relu_import_raises(save: Save, tmp_path: Path) -> None:
    """Only a gate that equals the up projection makes a squared ReLU."""
    export = export_transformers(save(replace(SMALL, **RELU2)), tmp_path / "out", say=quietly)
    peer = AutoModelForCausalLM.from_pretrained(export.folder)
    with torch.no_grad():
        peer.model.layers[1].mlp.gate_proj.weight[0, 0] += 1
    peer.save_pretrained(export.folder)
    with pytest.raises(UserError, match=r"layers.1.mlp.gate_proj.weight and .*up_proj.weight differ.*no gated ReLU"):
        read_external_model(export.folder)


# -- GGUF; ONNX needs no fold (test_other_formats.py) ------------------------------------------------------------------


@torch.no_grad()
def test_folded_gguf_logits_match(save: Save, tmp_path: Path) -> None:
    export_gguf(load_export_source(save(replace(SMALL, **NORM | SCALES))), tmp_path / "m.gguf")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert (peer.eval()(TOKENS).logits - load_model("made", "cpu").model(TOKENS)).abs().max() < 1e-4


@pytest.mark.parametrize("config", [replace(SMALL, **RELU2), replace(GPT2, **RELU2)], ids=["llama", "gpt2"])
def test_gguf_rejects_squared_relu(config: ModelConfig, save: Save, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"GGUF has no squared ReLU.*Use --to or --to-onnx"):
        export_gguf(load_export_source(save(config)), tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*m.gguf*"))
