"""Runs that begin with the weights of another model: from where, what must fit, and what a restart does."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, eval_rows, launch, losses, tiny_config, with_train, write_run_config
from support.hub_server import HubServer
from support.saved_checkpoints import small_vocabulary
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from myllm.checkpoint.format import load_checkpoint
from myllm.cli.launch import parse_args
from myllm.config import InitConfig, RunConfig
from myllm.data.prepare.prepare import prepare
from myllm.distributed.collectives import process_group
from myllm.errors import UserError
from myllm.planning.config_checks import check_config
from myllm.training import loop
from myllm.training.setup import RunContext, build

SHAPE = {"vocab_size": 400, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "max_position_embeddings": 96}
PEERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8, num_key_value_heads=1)),
}
KILLED = f"""
import os, runpy, signal, sys
from myllm.training import loop
advance = loop.advance

def advance_or_die(trainer, services, progress):
    if progress.state.step == 10:  # the save of step 10 waited for that of step 9
        os.kill(os.getpid(), signal.SIGKILL)
    advance(trainer, services, progress)

loop.advance = advance_or_die
sys.argv = ["pretrain.py", "--config", sys.argv[1]]
runpy.run_path({str(ROOT / "pretrain.py")!r}, run_name="__main__")
"""


def start(config: RunConfig) -> Path:
    with process_group("cpu") as process:
        return loop.train(config, prepare(config.data, progress=False), process).run.root


def quiet(config: RunConfig) -> RunConfig:
    """Only the evaluation that these tests look at."""
    return replace(config, eval=replace(config.eval, cloze_every_steps=0, sample_every_steps=0))


def begin(config: RunConfig, source: object, keep_optimizer: bool = False) -> RunConfig:
    config = replace(quiet(config), name="more", init=InitConfig(str(source), keep_optimizer))
    return with_train(config, max_steps=3, save_every_steps=1, keep_last=0)


def validation(root: Path) -> list[float]:
    return [row["loss"] for row in eval_rows(root, "validation")]


def peer_folder(kind: str, folder: Path) -> PreTrainedModel:
    """A model as transformers saves it, with a vocabulary of 400 tokens."""
    torch.manual_seed(3)
    peer = PEERS[kind]().eval()
    peer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(small_vocabulary(), encoding="utf-8")
    return peer


def peer_loss(peer: PreTrainedModel, config: RunConfig) -> float:
    """The validation loss by transformers: tiny's 256 tokens in sequences of 64."""
    tokens = torch.from_numpy(prepare(config.data, progress=False).val.read(0, 257).astype("int64"))
    with torch.no_grad():
        logits = peer(tokens[:-1].view(4, 64)).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:]))


@pytest.fixture(scope="module")
def trained(prepared_corpus: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps; its folder, which tests only read."""
    folder = tmp_path_factory.mktemp("source") / "temp_data"
    shutil.copytree(prepared_corpus, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYLLM_DATA", str(folder))
        return start(with_train(quiet(tiny_config(corpus)), max_steps=6, save_every_steps=3))


@pytest.mark.usefixtures("prepared_data")
def test_init_from_run_and_checkpoint(trained: Path, tiny: RunConfig) -> None:
    """Step 0 measures what the source measured last. The schedule and the optimizer begin anew."""
    for source in (trained, trained / "checkpoints/step_00000006"):
        root = start(with_train(begin(tiny, source), fresh=True))
        assert validation(root)[0] == validation(trained)[-1]
        assert list(losses(root)) == [1, 2, 3]
        assert json.loads((root / "config.json").read_text())["init"]["source"] == str(source)
        assert json.loads((root / "imported.json").read_text())["source"] == "tiny, step 6"
    first = load_checkpoint(root / "checkpoints/step_00000001")
    assert first.state.tokens_seen == 128
    assert {float(moments["step"]) for moments in first.optimizer.values()} == {1}


@pytest.mark.usefixtures("prepared_data")
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_keep_optimizer_copies_moments_exactly(optimizer: str, trained: Path, tiny: RunConfig) -> None:
    tiny = replace(tiny, optim=replace(tiny.optim, optimizer=optimizer))
    if optimizer == "muon":
        trained = start(with_train(quiet(tiny), max_steps=1))
    source = load_checkpoint(next((trained / "checkpoints").glob("step_*[16]"))).optimizer
    config = begin(tiny, trained, keep_optimizer=True)
    dataset = prepare(config.data, progress=False)
    with process_group("cpu") as process, build(RunContext.create(config, process), dataset) as (trainer, state):
        assert state.step == 0
        moments = trainer.optimizer.state_dict()
        assert moments.keys() == source.keys()
        for name, kinds in source.items():
            assert moments[name].keys() == kinds.keys()
            assert all(torch.equal(moments[name][kind], kinds[kind]) for kind in kinds), name


@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_init_from_transformers_folder(kind: str, tiny: RunConfig, tmp_path: Path) -> None:
    """The command line takes the shape from the folder. The first loss is that of transformers."""
    peer, tokenizer = peer_folder(kind, tmp_path / "peer"), str(tmp_path / "peer/tokenizer.json")
    plain = replace(begin(tiny, tmp_path / "peer"), model=RunConfig().model)
    values = json.loads(write_run_config(plain, tmp_path / "all.json").read_text())
    del values["model"]
    (tmp_path / "more.json").write_text(json.dumps(values))
    words = ["--config", str(tmp_path / "more.json"), "--data.tokenizer", tokenizer, "--model.max-seq-len", "64"]
    config = parse_args(words).config
    assert (config.model.d_model, config.model.vocab_size, config.model.n_layers) == (24, 400, 2)
    root = start(config)
    assert validation(root)[0] == pytest.approx(peer_loss(peer, config), rel=1e-5)
    assert json.loads((root / "imported.json").read_text()) == {"source": "peer"}


def test_init_from_hub_then_resume_offline(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    peer = peer_folder("llama", tmp_path / "peer")
    files = {file.name: file.read_bytes() for file in (tmp_path / "peer").iterdir()}
    words = ["debug", "--init.from", "someone/model", "--name", "more", "--data.source", tiny.data.source]
    words += ["--train.batch-tokens", "128", "--train.micro-batch-size", "1", "--model.max-seq-len", "64"]
    words += ["--data.tokenizer", str(tmp_path / "peer/tokenizer.json"), "--data.val-tokens", "3000"]
    with HubServer() as hub, hub.reached(monkeypatch, tmp_path / "hf"):
        hub.models.add("someone/model", files)
        config = begin(parse_args(words).config, "someone/model")
        config = replace(config, eval=replace(tiny.eval, cloze_every_steps=0, sample_every_steps=0))
        root = start(config)
        assert validation(root)[0] == pytest.approx(peer_loss(peer, config), rel=1e-5)
    shutil.rmtree(tmp_path / "cache")
    assert parse_args(words).config.model == config.model  # the run's own: nobody asks the Hub
    start(with_train(config, max_steps=4))
    assert max(losses(root)) == 4


@pytest.mark.usefixtures("prepared_data")
def test_resume_without_source(trained: Path, tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Exception):
        pass

    def fail_at(trainer: object, step: int, *phase: object) -> object:
        if step == 2:
            raise Interrupted
        return real(trainer, step, *phase)

    source, real = tmp_path / "source", loop.train_step
    shutil.copytree(trained, source)
    config = begin(tiny, source)
    whole = losses(start(config))
    monkeypatch.setattr(loop, "train_step", fail_at)
    with pytest.raises(Interrupted):
        start(with_train(config, fresh=True))
    monkeypatch.undo()
    monkeypatch.setenv("MYLLM_DATA", str(tmp_path / "temp_data"))
    shutil.rmtree(source)
    assert losses(start(config)) == whole
    for other in (InitConfig(), InitConfig(str(trained))):
        with pytest.raises(UserError, match=rf"(?s)init\.source: {source} -> {other.source}.*another --name"):
            start(replace(config, init=other))


@pytest.mark.usefixtures("prepared_data")
def test_incompatible_sources_raise(trained: Path, tiny: RunConfig, tmp_path: Path) -> None:
    peer_folder("llama", tmp_path / "peer")
    config = begin(tiny, trained)
    wider = replace(config.model, d_model=32, n_layers=3, dropout_ffn=0.3, max_seq_len=32)
    muon = replace(begin(tiny, trained, keep_optimizer=True), optim=replace(tiny.optim, optimizer="muon"))
    cases = [
        (
            replace(config, model=wider),
            r"model\.d_model is 16 in the source, 32 in .*\n.*n_layers is 2 .*, 3 .*\nremove",
        ),
        (begin(tiny, tmp_path / "nothing"), r"no checkpoint at \S*nothing"),
        (muon, r"was trained with adamw, and optim\.optimizer is muon; give --optim\.optimizer adamw"),
    ]
    for case, message in cases:
        with pytest.raises(UserError, match=message):
            start(case)
        assert not (tmp_path / "temp_data/runs/more/checkpoints").exists()
    words = ["debug", "--init.from", str(tmp_path / "peer"), "--name", "more"]
    tokenizer = tmp_path / "peer/tokenizer.json"
    with pytest.raises(
        UserError, match=rf"data\.tokenizer is r50k_base .* \(400 tokens\); give --data\.tokenizer {tokenizer}"
    ):
        parse_args(words)
    dataset = prepare(tiny.data, progress=False)
    with pytest.raises(UserError, match=rf"myllm data prepare files:\S* --tokenizer {tokenizer}"):
        parse_args([*words, "--data.dataset", dataset.name])
    words += ["--data.tokenizer", str(tokenizer), "--model.max-seq-len", "64"]
    with pytest.raises(UserError, match=r"model\.d_model is 24 in the source, 64 in the config"):
        parse_args([*words, "--model.d-model", "64"])
    config = replace(begin(parse_args(words).config, tmp_path / "peer", keep_optimizer=True), eval=tiny.eval)
    config = replace(config, data=replace(tiny.data, tokenizer=str(tokenizer)))
    with pytest.raises(UserError, match=r"has no optimizer state, only weights"):
        start(config)
    shutil.copytree(trained, tmp_path / "temp_data/runs/more", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"is in .*the folder of this run; give this run another --name"):
        parse_args(["debug", "--init.from", "more", "--name", "more", "--train.fresh"])
    with pytest.raises(UserError, match=r"init\.keep_optimizer needs a model .* --init\.from"):
        check_config(replace(tiny, init=InitConfig(keep_optimizer=True)), 1)


@pytest.mark.slow
@pytest.mark.usefixtures("prepared_data")
def test_init_on_two_fsdp_ranks(trained: Path, tiny: RunConfig, tmp_path: Path) -> None:
    """From one process's checkpoint with its moments, and from a folder of transformers."""
    peer, tokenizer = peer_folder("llama", tmp_path / "peer"), str(tmp_path / "peer/tokenizer.json")
    of_peer = replace(tiny, data=replace(tiny.data, tokenizer=tokenizer))
    expected = [validation(trained)[-1], peer_loss(peer, of_peer)]
    own, other = begin(tiny, trained, keep_optimizer=True), begin(of_peer, tmp_path / "peer")
    for config, loss in zip((own, other), expected, strict=True):
        values = json.loads(write_run_config(with_train(config, parallel="fsdp"), tmp_path / "all.json").read_text())
        values["model"] = {"max_seq_len": 64}  # the rest comes from the source
        (tmp_path / "more.json").write_text(json.dumps(values))
        done = launch("--config", tmp_path / "more.json", "--train.fresh", ranks=2)
        assert done.returncode == 0, done.stderr
        assert validation(tmp_path / "temp_data/runs/more")[0] == pytest.approx(loss, rel=1e-5)
    assert load_checkpoint(tmp_path / "temp_data/runs/more/checkpoints/step_00000003").state.step == 3


@pytest.mark.slow
@pytest.mark.usefixtures("prepared_data")
def test_resume_after_kill_without_source(trained: Path, tiny: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "source")
    config = with_train(begin(tiny, tmp_path / "source"), max_steps=20)
    whole = losses(start(config))
    file, root = write_run_config(config, tmp_path / "more.json"), tmp_path / "temp_data/runs/more"
    shutil.rmtree(root)
    killed = subprocess.run([sys.executable, "-c", KILLED, file], capture_output=True, timeout=240, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    shutil.rmtree(tmp_path / "source")
    done = launch("--config", file)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert losses(root) == whole
