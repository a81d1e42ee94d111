"""Models with vocabularies of Llama 3's and Qwen3's size: imported, trained further and exported to every format."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import onnxruntime
import pytest
import torch
from conftest import losses, with_train
from support.large_vocabularies import QWEN3_ROWS, llama3_json, qwen3_json
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from myllm.checkpoint.locate import find_checkpoint
from myllm.config import InitConfig, RunConfig, load_config
from myllm.data.prepare.prepare import prepare
from myllm.distributed.collectives import process_group
from myllm.hub.export.gguf import _splitter_name, export_gguf
from myllm.hub.export.onnx import export_onnx
from myllm.hub.export.source import load_export_source
from myllm.hub.export.transformers import export_transformers
from myllm.hub.import_model import import_model
from myllm.inference.load import load_model
from myllm.paths import runs_dir
from myllm.training.loop import train

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "max_position_embeddings": 48}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1}
TEXT = "I'll say 12345 words!\n\n Straße, 言葉 🙂<|endoftext|> word70000"
LLAMA_CPP_NAMES = {"qwen3": "qwen2", "llama3": "llama-bpe"}


def qwen3() -> PreTrainedModel:
    # A head of 128: transformers assumes it of every Qwen3 in GGUF.
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, vocab_size=QWEN3_ROWS, head_dim=128, tie_word_embeddings=True))


def llama3() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=128_256))


KINDS = {"qwen3": (qwen3, qwen3_json, 151_669), "llama3": (llama3, llama3_json, 128_256)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_import_train_export_round_trip(kind: str, tiny: RunConfig, tmp_path: Path) -> None:
    make, vocabulary, size = KINDS[kind]
    torch.manual_seed(2)
    peer, notes = make().eval(), []
    peer.save_pretrained(tmp_path / "peer")
    (tmp_path / "peer/tokenizer.json").write_text(vocabulary(), encoding="utf-8")
    run = import_model(str(tmp_path / "peer"), "large", say=notes.append)
    tokens = torch.randint(size, (2, 20), generator=torch.Generator().manual_seed(5))
    tokens[0, -1] = size - 1
    ours = load_model("large", "cpu").model(tokens)
    assert ours.shape == (2, 20, size)
    assert (ours - peer(tokens).logits[..., :size]).abs().max() < 1e-5
    assert any("151,936 rows for 151,669 tokens" in note for note in notes) == (kind == "qwen3")

    imported = load_config(run.config, RunConfig())
    data = replace(tiny.data, tokenizer=imported.data.tokenizer)
    evaluation = replace(tiny.eval, validation_every_steps=0, cloze_every_steps=0, sample_every_steps=0)
    config = replace(tiny, name="more", model=imported.model, data=data, eval=evaluation, init=InitConfig("large"))
    config = with_train(config, batch_tokens=96, micro_batch_size=2, max_steps=3)
    dataset = prepare(config.data, progress=False)
    assert dataset.train.dtype == np.uint32
    with process_group("cpu") as process, torch.enable_grad():
        train(config, dataset, process)
    first, *_, last = losses(runs_dir() / "more").values()
    assert last < first < np.log(size) + 1

    ours = load_model("more", "cpu").model(tokens)
    source = load_export_source(find_checkpoint("more", runs_dir()))
    export_transformers(source, tmp_path / "export")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    assert (theirs(tokens).logits - ours).abs().max() < 1e-4
    ids = source.tokenizer.encode(TEXT).tolist()
    assert AutoTokenizer.from_pretrained(tmp_path / "export")(TEXT, add_special_tokens=False).input_ids == ids

    export_gguf(source, tmp_path / "m.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    assert (theirs(tokens).logits - ours).abs().max() < 1e-4
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    spec = json.loads(vocabulary())
    assert fields["tokenizer.ggml.pre"] == LLAMA_CPP_NAMES[kind]
    assert len(fields["tokenizer.ggml.tokens"]) == size
    assert {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])} == spec["model"]["vocab"] | {
        token["content"]: token["id"] for token in spec["added_tokens"]
    }
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in spec["model"]["merges"]]

    export_onnx(source, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"tokens": tokens.numpy()})
    assert np.abs(logits - ours.numpy()).max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_pre_tokenizer_names(kind: str) -> None:
    spec = json.loads(KINDS[kind][1]())
    assert _splitter_name(spec) == LLAMA_CPP_NAMES[kind]
    split, *others = spec["pre_tokenizer"]["pretokenizers"]
    for change in (
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": others}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split | {"pattern": {"Regex": r"\p{L}+"}}, *others]}},
        {"normalizer": {"type": "NFKC"}},
        {"model": spec["model"] | {"ignore_merges": kind == "qwen3"}},
        {"model": {"type": "Unigram"}},
    ):
        assert _splitter_name(spec | change) is None, change
