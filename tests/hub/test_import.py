"""Imports: the reference's checkpoint, folders of transformers, our exports; and what is refused."""

import json
import math
import pickle
import shlex
import shutil
import sys
import types
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import eval_rows, with_train
from safetensors.torch import load_file, save_file
from support.reference_model import HParams, ReferenceModel
from support.saved_checkpoints import KINDS, Save, small_vocabulary
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)  # fmt: skip

from myllm.checkpoint.locate import find_checkpoint
from myllm.cli.launch import parse_args
from myllm.cli.main import main as myllm
from myllm.config import InitConfig, RunConfig, load_config
from myllm.data.prepare.prepare import prepare
from myllm.data.tokenizer.load import load_tokenizer
from myllm.data.tokenizer.train import train_tokenizer
from myllm.distributed.collectives import process_group
from myllm.errors import UserError
from myllm.hub.export.tokenizer import tokenizer_files
from myllm.hub.export.transformers import export_transformers
from myllm.hub.import_model import import_model
from myllm.inference.completion import generate
from myllm.inference.load import load_model
from myllm.paths import RunPaths
from myllm.planning.length import resolve_max_steps
from myllm.training.loop import train

TOKENS = torch.randint(400, (2, 32), generator=torch.Generator().manual_seed(5))
SHAPE = {"vocab_size": 400, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "max_position_embeddings": 48}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e3, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
PEERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, rms_norm_eps=1e-3)),
    "llama-attention-biases": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, head_dim=8)),
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=LLAMA3)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SHAPE, head_dim=8, num_key_value_heads=1, tie_word_embeddings=True,
                    rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=48, n_embd=24, n_layer=2, n_head=4)),
}  # fmt: skip


def quietly(_: str) -> None:
    pass


@cache
def r50k_files() -> dict[str, str]:
    return tokenizer_files(load_tokenizer(), 48)


def write_tokenizer(folder: Path, small: bool = True) -> None:
    files = {"tokenizer.json": small_vocabulary()} if small else r50k_files()
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")


def peer_folder(kind: str, folder: Path) -> torch.nn.Module:
    """A folder as transformers saves it, with random weights everywhere; gives the model."""
    peer, generator = PEERS[kind]().eval(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    peer.save_pretrained(folder)
    write_tokenizer(folder)
    return peer


@torch.no_grad()
def difference(peer: torch.nn.Module, run: str) -> float:
    theirs = peer(TOKENS)
    theirs = theirs if isinstance(theirs, torch.Tensor) else theirs.logits
    ours = load_model(run, "cpu").model(TOKENS)
    assert ours.shape == theirs.shape
    assert ours.std() > 0.1
    return float((ours - theirs).abs().max())


# -- the reference's checkpoint ---------------------------------------------------------------------------------------


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> ReferenceModel:
    """Its model; and its class in the module that its checkpoints name, for as long as one is written."""
    module = types.ModuleType("src.params")
    module.HParams = HParams
    monkeypatch.setattr(HParams, "__module__", "src.params")
    monkeypatch.setitem(sys.modules, "src", types.ModuleType("src"))
    monkeypatch.setitem(sys.modules, "src.params", module)
    return ReferenceModel(HParams()).eval()


def write_reference(model: ReferenceModel, file: Path, prefix: str = "_orig_mod.", **more: object) -> Path:
    """As the reference run saved it."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.LinearLR(optimizer), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)],
        [3],
    )
    model(TOKENS).mean().backward()
    optimizer.step()
    model.eval()
    content = {
        "model_state_dict": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": scheduler.state_dict(),
        "step": 19_072,
        "hParams": HParams(),
        "random_state": torch.get_rng_state(),
        "cuda_random_state": torch.get_rng_state(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content | more, file)
    return file


@pytest.mark.parametrize("prefix", ["_orig_mod.", ""])
def test_reference_checkpoint_logits_match(
    prefix: str, reference: ReferenceModel, temp_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = write_reference(reference, tmp_path / "lf" / "pytorch_model.pth", prefix)
    monkeypatch.delitem(sys.modules, "src.params")  # its code is not here
    myllm(["import", str(file if prefix else file.parent)])
    assert "imported as run lf" in capsys.readouterr().out
    assert difference(reference, "lf") < 1e-5
    config = load_config(temp_data / "runs/lf/config.json", RunConfig()).model
    assert (config.dropout_ffn, config.dropout_attention_residual, config.tie_embeddings) == (0.15, 0.1, True)


def test_reference_checkpoint_exports_and_samples(reference: ReferenceModel, temp_data: Path, tmp_path: Path) -> None:
    import_model(str(write_reference(reference, tmp_path / "pytorch_model.pth")), "lf", say=quietly)
    assert generate(load_model("lf", "cpu"), "the river", 5, temperature=0).startswith("the river")
    export = export_transformers(find_checkpoint("lf", temp_data / "runs").folder, tmp_path / "out", say=quietly)
    assert export.architecture == "LlamaForCausalLM"
    assert difference(AutoModelForCausalLM.from_pretrained(export.folder), "lf") < 1e-5
    with torch.no_grad():
        peer = AutoModelForCausalLM.from_pretrained(export.folder)
        assert (peer(TOKENS).logits - reference(TOKENS)).abs().max() < 1e-5


class Hostile:
    """A pickle that runs a command when it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (__import__("os").system, (f"touch {self.target}",))


@pytest.mark.parametrize("where", ["hParams", "step", "model_state_dict"])
def test_malicious_pickle_is_rejected(where: str, reference: ReferenceModel, temp_data: Path, tmp_path: Path) -> None:
    file = write_reference(reference, tmp_path / "pytorch_model.pth", **{where: Hostile(tmp_path / "hit")})
    with pytest.raises(UserError, match=r"was not loaded, because that would run (posix|nt)\.system"):
        import_model(str(file), "lf", say=quietly)
    assert not (tmp_path / "hit").exists()
    assert not (temp_data / "runs/lf").exists()
    torch.load(file, weights_only=False)  # it is a real one
    assert (tmp_path / "hit").exists()


def test_malicious_legacy_formats_are_rejected(temp_data: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps({"model_state_dict": Hostile(tmp_path / "hit")}))
    old = tmp_path / "old.pth"
    torch.save({"hParams": Hostile(tmp_path / "hit")}, old, _use_new_zipfile_serialization=False)
    empty = tmp_path / "empty.pth"
    empty.touch()
    for file in (plain, old, empty):
        with pytest.raises(UserError, match=str(file)):
            import_model(str(file), "lf", say=quietly)
    assert not (tmp_path / "hit").exists()


def test_unrelated_checkpoint_is_rejected(reference: ReferenceModel, temp_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.pth"
    torch.save({"weights": {}, "epoch": 3}, file)
    with pytest.raises(UserError, match="has the keys weights, epoch, but not model_state_dict, hParams"):
        import_model(str(file), "lf", say=quietly)
    torch.save([1], file)
    with pytest.raises(UserError, match="holds a list"):
        import_model(str(file), "lf", say=quietly)
    with pytest.raises(UserError, match=r"transformer_blocks\.2\.norm1\.weight is missing"):
        import_model(str(write_reference(reference, file, hParams=HParams(n_layer=3))), "lf", say=quietly)
    write_reference(reference, file, hParams={"n_vocab": 50_257, "n_ctx": 9})
    with pytest.raises(UserError, match="have no n_embd, n_head, n_layer; they have n_vocab, n_ctx"):
        import_model(str(file), "lf", say=quietly)


# -- folders of transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PEERS)
def test_transformers_logits_match(kind: str, temp_data: Path, tmp_path: Path) -> None:
    peer = peer_folder(kind, tmp_path / kind)
    run = import_model(str(tmp_path / kind), say=quietly)
    assert run.root.name == kind
    assert difference(peer, kind) < 1e-5
    assert not load_model(kind, "cpu").tokenizer.is_default


def test_original_gpt2_weight_names(temp_data: Path, tmp_path: Path) -> None:
    """Without the name of the whole, and with the masks among the weights."""
    peer = peer_folder("gpt2", tmp_path / "gpt2")
    weights = load_file(tmp_path / "gpt2/model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 48, 48) for i in range(2)}
    save_file(weights, tmp_path / "gpt2/model.safetensors")
    import_model(str(tmp_path / "gpt2"), say=quietly)
    assert difference(peer, "gpt2") < 1e-5


def test_legacy_llama_rope_scaling_config(temp_data: Path, tmp_path: Path) -> None:
    """With rope_scaling and a rope_theta of its own, as versions of transformers before 5 wrote it."""
    peer = peer_folder("llama3", tmp_path / "llama3")
    file = tmp_path / "llama3/config.json"
    values = json.loads(file.read_text())
    rope = values.pop("rope_parameters")
    file.write_text(json.dumps(values | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}))
    import_model(str(tmp_path / "llama3"), say=quietly)
    assert difference(peer, "llama3") < 1e-5


def test_sharded_bfloat16_weights(temp_data: Path, tmp_path: Path) -> None:
    peer = peer_folder("llama", tmp_path / "llama").to(torch.bfloat16)
    (tmp_path / "llama/model.safetensors").unlink()
    peer.save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    assert len(list((tmp_path / "llama").glob("model-*.safetensors"))) > 1
    import_model(str(tmp_path / "llama"), say=quietly)
    assert difference(LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32), "llama") < 1e-5
    next((tmp_path / "llama").glob("model-*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"cannot read .*model-"):
        import_model(str(tmp_path / "llama"), "again", say=quietly)


@pytest.mark.parametrize("kind", KINDS)
def test_export_import_round_trip(kind: str, save: Save, temp_data: Path, tmp_path: Path) -> None:
    config = replace(KINDS[kind], dropout_ffn=0.2, vocab_multiple=64, init="reference", residual_dtype="bfloat16")
    export_transformers(save(config), tmp_path / "out", say=quietly)
    run = import_model(str(tmp_path / "out"), "back", say=quietly)
    back, original = load_model("back", "cpu"), load_model("made", "cpu")
    assert back.model.state_dict().keys() == original.model.state_dict().keys()
    for name, tensor in original.model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name][:400], tensor[:400]), name
    with torch.no_grad():
        assert torch.equal(back.model(TOKENS), original.model(TOKENS))
    assert not back.model.embedding.weight[400:].any()  # padding, which was anything before
    again = load_config(run.config, RunConfig()).model
    assert (again.dropout_ffn, again.init, again.vocab_multiple) == (0.2, "reference", 64)
    assert again.residual_dtype == "bfloat16"
    assert (again.kv_heads, again.head_size, again.bias) == (config.kv_heads, config.head_size, config.bias)


def test_custom_vocabulary(save: Save, corpus: Path, temp_data: Path, tmp_path: Path) -> None:
    file = train_tokenizer((path.read_text() for path in corpus.iterdir()), 400, tmp_path / "v.json", progress=False)
    export_transformers(save(replace(KINDS["llama"], vocab_size=400), file), tmp_path / "out", say=quietly)
    import_model(str(tmp_path / "out"), "back", say=quietly)
    assert load_model("back", "cpu").tokenizer.sha256 == load_tokenizer(file).sha256  # data made with it fit
    config = load_config(temp_data / "runs/back/config.json", RunConfig())
    assert config.data.tokenizer == "runs/back/tokenizer.json"  # which goes where temp_data/ does
    assert load_tokenizer(config.data.tokenizer).sha256 == load_tokenizer(file).sha256


def test_padded_embedding_rows_are_dropped(temp_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Many published models have more rows than tokens."""
    folder = tmp_path / "llama"
    peer = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": 50_304})).eval()  # of GPT-2's vocabulary
    peer.save_pretrained(folder)
    write_tokenizer(folder, small=False)
    myllm(["import", str(folder)])
    assert "50,304 rows for 50,257 tokens" in capsys.readouterr().out
    assert load_model("llama", "cpu").tokenizer.is_default
    with torch.no_grad():
        ours = load_model("llama", "cpu").model(TOKENS)
        assert (ours - peer(TOKENS).logits[..., :50_257]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"model_type": "mistral"}, "has model_type 'mistral'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is gelu, expected silu"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "has no 'factor'"),
        ("llama", {"rope_parameters": LLAMA3 | {"high_freq_factor": 1}}, r"rope_scaling is 4.0 1.0 1.0 16.0, expected"),
        ("llama", {"rope_parameters": LLAMA3 | {"rope_type": "yarn"}}, "rope_type is yarn, expected default or llama3"),
        ("llama", {"rope_parameters": LLAMA3 | {"factor": "big"}}, r"rope_parameters\.factor is 'big'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": None}, "rope_type is linear"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window is true"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
        ("llama", {"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ("llama", {"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight is unknown"),
        ("llama", {"intermediate_size": 41}, r"up_proj.weight has shape \(80, 24\), expected \(82, 24\)"),
        ("llama", {"vocab_size": 390}, "the tokenizer does not match the model"),
    ],
)
def test_unsupported_configs_raise(kind: str, changes: dict, message: str, temp_data: Path, tmp_path: Path) -> None:
    peer_folder(kind, tmp_path / kind)
    file = tmp_path / kind / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        import_model(str(tmp_path / kind), say=quietly)
    assert not (temp_data / "runs").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"vocab_size": "400"}, "vocab_size is '400', expected an integer"),
        ("llama", {"vocab_size": None}, "has no 'vocab_size'"),
        ("llama", {"hidden_size": 24.5}, r"hidden_size is 24\.5, expected an integer"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0, expected an integer from 1"),
        ("llama", {"num_attention_heads": True}, "num_attention_heads is True"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected .* to 10,000"),
        ("llama", {"num_hidden_layers": math.inf}, "num_hidden_layers is inf"),
        ("llama", {"max_position_embeddings": 10**12}, "max_position_embeddings is"),
        ("llama", {"rope_scaling": "linear", "rope_parameters": None}, "rope_scaling is 'linear', expected an object"),
        ("llama", {"rope_parameters": [1]}, r"rope_parameters is \[1\], expected an object"),
        ("llama", {"rope_parameters": {"rope_theta": "big"}}, r"rope_parameters\.rope_theta is 'big'"),
        ("llama", {"rope_parameters": {"rope_theta": math.nan}}, r"rope_parameters\.rope_theta is nan"),
        ("qwen3", {"rope_parameters": {"full_attention": {}}}, "is separate for full_attention"),
        ("qwen3", {"layer_types": 5}, "layer_types is 5, expected a list"),
        ("llama", {"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny', expected a number above 0"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        ("gpt2", {"layer_norm_epsilon": -1}, "layer_norm_epsilon is -1"),
        ("gpt2", {"activation_function": {}}, "activation_function is {}, expected a string"),
        ("gpt2", {"model_type": ["gpt2"]}, r"has model_type \['gpt2'\]"),
    ],
)
def test_invalid_setting_types_raise(kind: str, changes: dict, message: str, temp_data: Path, tmp_path: Path) -> None:
    """Said before any weights are read, by the setting's name."""
    peer_folder(kind, tmp_path / kind)
    file = tmp_path / kind / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    (tmp_path / kind / "model.safetensors").unlink()
    with pytest.raises(UserError, match=message):
        import_model(str(tmp_path / kind), say=quietly)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"[]", r"config\.json holds a list, expected an object"),
        ("config.json", b'{"a":' * 99_999 + b"1" + b"}" * 99_999, "nested too deeply"),
        ("config.json", b'{"model_type": "llama", "x": ' + b"[" * 500 + b"]" * 500 + b"}", "nested too deeply"),
        ("config.json", b'{"caf\xe9": 1}', "is not valid JSON: 'utf-8' codec"),
        ("model.safetensors.index.json", b'{"nope": 1}', "weight_map of .* is not an object of file names"),
        ("model.safetensors.index.json", b'{"weight_map": ["a"]}', "weight_map of .* is not an object of file names"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": 5}}',
            "weight_map of .* is not an object of file names",
        ),
    ],
)
def test_malformed_files_raise(file: str, content: bytes, message: str, temp_data: Path, tmp_path: Path) -> None:
    peer_folder("llama", tmp_path / "llama")
    (tmp_path / "llama" / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        import_model(str(tmp_path / "llama"), say=quietly)


def test_integral_floats_and_bom_are_accepted(temp_data: Path, tmp_path: Path) -> None:
    peer_folder("llama", tmp_path / "llama")
    file = tmp_path / "llama/config.json"
    values = json.loads(file.read_text())
    file.write_text("\ufeff" + json.dumps(values | {"hidden_size": float(values["hidden_size"])}), encoding="utf-8")
    import_model(str(tmp_path / "llama"), say=quietly)


def test_missing_source_files_raise(temp_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing at 'gpt2'"):
        import_model("gpt2", say=quietly)
    with pytest.raises(UserError, match="holds nothing; expected a folder"):
        import_model(str(tmp_path), say=quietly)
    peer_folder("gpt2", tmp_path / "gpt2")
    (tmp_path / "gpt2/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        import_model(str(tmp_path / "gpt2"), say=quietly)
    write_tokenizer(tmp_path / "gpt2")
    (tmp_path / "gpt2/model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="download the file again"):
        import_model(str(tmp_path / "gpt2"), say=quietly)
    (tmp_path / "gpt2/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        import_model(str(tmp_path / "gpt2"), say=quietly)


def test_existing_run_name_raises(temp_data: Path, tmp_path: Path) -> None:
    peer_folder("gpt2", tmp_path / "gpt2")
    import_model(str(tmp_path / "gpt2"), say=quietly)
    with pytest.raises(UserError, match="a run gpt2 exists"):
        import_model(str(tmp_path / "gpt2"), say=quietly)
    import_model(str(tmp_path / "gpt2"), overwrite=True, say=quietly)
    assert len(list((temp_data / "runs").iterdir())) == 2
    with pytest.raises(UserError, match="must be a plain folder name"):
        import_model(str(tmp_path / "gpt2"), "../elsewhere", say=quietly)


# -- and then ---------------------------------------------------------------------------------------------------------


def test_printed_command_trains_three_epochs(
    corpus: Path, temp_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the 10B tokens of a preset: three epochs of what the user has, by a command that parses as it stands."""
    peer_folder("llama", tmp_path / "llama")
    myllm(["import", str(tmp_path / "llama"), "--name", "tune"])
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "pretrain.py" in line]
    words = shlex.split(line.partition("pretrain.py ")[2].replace("/path/to/texts", str(corpus)))
    launch = parse_args(words)
    assert launch.config.train.epochs == 3
    dataset = prepare(launch.config.data, progress=False)
    config = resolve_max_steps(launch.config, dataset.train.tokens, launch.own_text)
    trained = config.train.max_steps * config.train.batch_tokens
    assert trained <= 3 * dataset.train.tokens + config.train.batch_tokens


def test_imported_run_only_initializes_other_runs(tiny: RunConfig, temp_data: Path, tmp_path: Path) -> None:
    """It is never trained itself, and nobody trains other weights under its name."""
    peer = peer_folder("llama", tmp_path / "llama")
    run = import_model(str(tmp_path / "llama"), "made", say=quietly)
    imported = load_config(run.config, RunConfig())
    data = replace(tiny.data, tokenizer=imported.data.tokenizer)
    config = replace(tiny, name="more", model=replace(imported.model, max_seq_len=48), data=data)
    config = replace(with_train(config, batch_tokens=96, max_steps=2), init=InitConfig("made"))
    dataset = prepare(config.data, progress=False)

    def start(config: RunConfig) -> RunPaths:
        with process_group("cpu") as process:
            return train(config, dataset, process).run

    more = start(config)
    stream = torch.from_numpy(dataset.val.read(0, 5 * 48 + 1).astype("int64"))
    with torch.no_grad():
        logits = peer(stream[:-1].view(5, 48)).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), stream[1:])
    assert eval_rows(more.root, "validation")[0]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert json.loads(more.imported.read_text())["source"] == "llama"  # the origin, not the run in between
    with pytest.raises(UserError, match=r"the run made holds imported weights; .* --init\.from made --name NAME"):
        start(replace(config, name="made"))
    before = sorted(path for path in temp_data.rglob("*") if path.is_file())
    for other in (run.root.name, "more"):  # new weights, in place of those
        with pytest.raises(UserError, match=rf"the run {other} began with the weights of llama; .* --init\.from"):
            start(with_train(replace(config, name=other, init=InitConfig()), fresh=True))
    assert sorted(path for path in temp_data.rglob("*") if path.is_file()) == before
    shutil.rmtree(more.checkpoints)
    with pytest.raises(UserError, match="the run more began with the weights of llama"):
        start(replace(config, init=InitConfig()))


def test_rope_scaling_preserved_through_training_and_export(tiny: RunConfig, temp_data: Path, tmp_path: Path) -> None:
    """On a shorter context, as one trains Llama 3.2 on a small GPU: the frequencies stay those of pretraining."""
    peer_folder("llama3", tmp_path / "llama3")
    imported = load_config(import_model(str(tmp_path / "llama3"), "made", say=quietly).config, RunConfig())
    data = replace(tiny.data, tokenizer=imported.data.tokenizer)
    config = replace(tiny, name="more", model=replace(imported.model, max_seq_len=12), data=data)
    config = replace(with_train(config, batch_tokens=96, max_steps=2), init=InitConfig(str(tmp_path / "llama3")))
    with process_group("cpu") as process:
        trained = train(config, prepare(config.data, progress=False), process).run
    checkpoint = find_checkpoint("more", temp_data / "runs")
    assert trained.root == temp_data / "runs/more"
    export = export_transformers(checkpoint.folder, tmp_path / "out", say=quietly)
    values = json.loads((export.folder / "config.json").read_text())
    assert values["rope_parameters"] == LLAMA3
    assert values["rope_scaling"] == {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    assert "slow frequencies scaled by 1/4 (llama3)" in (export.folder / "README.md").read_text()
    import_model(str(export.folder), "back", say=quietly)
    back, more = load_model("back", "cpu").model, load_model("more", "cpu").model
    assert back.config.rope_scaling == more.config.rope_scaling == (4.0, 1.0, 2.0, 16.0)
    with torch.no_grad():
        assert torch.equal(back(TOKENS[:, :12]), more(TOKENS[:, :12]))


def test_import_from_hub(temp_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer, requests = peer_folder("gpt2", tmp_path / "gpt2"), []

    def snapshot(repo: str, **settings: object) -> str:
        requests.append((repo, settings["revision"]))
        return str(tmp_path / "gpt2")

    monkeypatch.setattr("myllm.hub.download.snapshot_download", snapshot)
    for number, source in enumerate(("openai-community/gpt2", "hub:openai-community/gpt2")):
        import_model(source, f"from-{number}", "main", say=quietly)
    assert requests == [("openai-community/gpt2", "main")] * 4  # the settings, then the weights
    assert difference(peer, "from-0") < 1e-5
    with pytest.raises(UserError, match="--revision is for Hub repositories"):
        import_model(str(tmp_path / "gpt2"), "x", "main", say=quietly)


def test_mismatched_vocabulary_raises_before_weight_download(
    temp_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary that does not fit is seen before the weights are fetched."""
    peer_folder("llama", tmp_path / "llama")
    file = tmp_path / "llama/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 390}))
    requested_patterns = []

    def snapshot(repo: str, allow_patterns: list[str], **settings: object) -> str:
        requested_patterns.extend(allow_patterns)
        return str(tmp_path / "llama")

    monkeypatch.setattr("myllm.hub.download.snapshot_download", snapshot)
    with pytest.raises(UserError, match="has 400 tokens, the model 390"):
        import_model("someone/llama", say=quietly)
    assert requested_patterns == ["*.json"]


def test_unreachable_hub_raises(temp_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="cannot download nobody/nothing from the Hub"):
        import_model("nobody/nothing", say=quietly)
