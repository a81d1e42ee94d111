"""benchmarks/throughput.py at a tiny size: the ways agree, a difference is refused, the table is whole."""

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT, with_train

from myllm.config import RunConfig
from myllm.distributed.collectives import DistContext
from myllm.errors import UserError

SCRIPT = ROOT / "benchmarks" / "throughput.py"
ALONE = DistContext(0, 0, 1, torch.device("cpu"))
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """A module of benchmarks/, found as the script finds it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def small(tiny: RunConfig) -> RunConfig:
    """Two micro-steps of a model with no dropout of its own, which Llama has no place for."""
    model = replace(tiny.model, dropout_embedding=0.0, dropout_attention_residual=0.0, dropout_ffn=0.0)
    return replace(tiny, model=replace(model, qk_norm=False, bias=True, n_kv_heads=1))


def say(line: str) -> None:
    pass


def test_three_implementations_alternate(load: Load, small: RunConfig) -> None:
    turns, table = load("throughput_turns"), load("throughput_table")
    result = turns.compare(small, ALONE, 2, 2, True, say)
    assert list(result.turns) == ["myllm", "the reference's way", "transformers LlamaForCausalLM"]
    assert all(len(entry) == 2 and len(entry[0].step_s) == 2 for entry in result.turns.values())
    for entry in (turn for way in result.turns.values() for turn in way):
        assert 0 < entry.tokens_per_s <= 2 * 128 / sum(entry.step_s) * (1 + 1e-9)  # the turn is as long as its steps
        assert 0 <= entry.wait_share < 1
        assert entry.peak_bytes >= 12 * 50_257 * 16  # weights and moments of the embedding alone
    first = result.first_losses
    assert first["transformers LlamaForCausalLM"] == pytest.approx(first["myllm"], rel=1e-5)  # no dropout, one text
    text = table.section(result, ALONE)
    assert all(len(line) <= 120 for line in text.splitlines() if line[0:1] not in ("#", "|"))
    rows = re.findall(r"^\| (myllm|the reference's way|transformers LlamaForCausalLM) \| [\d,]+ \|", text, re.MULTILINE)
    assert len(rows) == 3
    words = " ".join(text.split())
    assert "2 turns of 2 steps" in words
    assert "every way: 1 sequences x 64 tokens x 1 rank(s) x 2 accumulation step(s)" in words


def test_mismatched_weights_raise(load: Load, small: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number of one matrix is another in transformers' model: nothing is timed."""
    turns = load("throughput_turns")
    original_peer_model = turns.peer_model

    def spoilt(model, weights):
        peer = original_peer_model(model, weights)
        with torch.no_grad():
            peer.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
        return peer

    assert turns.check_agreement(small, ALONE, True)["float32"]["transformers"][0] > 10
    monkeypatch.setattr(turns, "peer_model", spoilt)
    with pytest.raises(UserError, match=r"do not compute the same.*for transformers"):
        turns.check_agreement(small, ALONE, True)


@torch.no_grad()
def test_reference_model_shape_loss_and_dropout(load: Load, small: RunConfig) -> None:
    ways, turns = load("throughput_ways"), load("throughput_turns")
    model = ways.reference_model(small.model, turns.shaken(small))
    loss, logits = model(*torch.zeros(2, 1, 64, dtype=torch.int64).unbind())
    assert logits.shape == (1, 64, 50_257)
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits[0], torch.zeros(64, dtype=torch.int64)))
    assert (model.model.config.dropout_ffn, model.model.config.dropout_attention_residual) == (0.15, 0.1)


def test_indivisible_batch_raises(load: Load, small: RunConfig) -> None:
    script = load("throughput")
    args = script.Args(with_train(small, micro_batch_size=3))
    assert script.settle_config(script.Args(small, sequences=4), "cpu", 2).train.batch_tokens == 4 * 64 * 2
    assert script.settle_config(script.Args(small), "cuda", 1).train.batch_tokens == 32 * 64
    with pytest.raises(UserError, match="is not a multiple of one micro-step"):
        script.settle_config(args, "cpu", 1)
    with pytest.raises(UserError, match="micro_batch_size is auto"):
        script.settle_config(script.Args(with_train(small, micro_batch_size="auto")), "cpu", 1)


def test_results_saved_in_data_folder(load: Load, temp_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the checkout, unless --out says so."""
    table, memory = load("throughput_table"), load("memory")
    before = {path for path in (ROOT / "benchmarks").rglob("*") if "__pycache__" not in path.parts}
    first = table.write("## One\n", ALONE, None)
    assert table.write("## Two\n", ALONE, None) == first
    assert first.parent == temp_data / "benchmarks"
    assert first.read_text(encoding="utf-8").endswith("## One\n\n## Two\n")
    monkeypatch.setattr(sys, "argv", ["memory.py"])
    monkeypatch.setattr(memory, "cases", lambda device: [("none", None)])
    monkeypatch.setattr(memory, "row", lambda name, config: f"| {name} |")
    memory.main()
    (memory_file,) = (path for path in first.parent.iterdir() if path != first)
    assert "| none |" in memory_file.read_text(encoding="utf-8")
    assert {path for path in (ROOT / "benchmarks").rglob("*") if "__pycache__" not in path.parts} == before


@pytest.mark.slow  # two real processes under a launcher
def test_two_ranks_without_transformers(tmp_path: Path, temp_data: Path) -> None:
    """As a user starts it: one table of both ranks, added to what the file has, and nothing left behind."""
    out = tmp_path / "results.md"
    out.write_text("# Earlier\n", encoding="utf-8")
    sizes = ("--model.d-model", "16", "--model.n-layers", "1", "--model.d-ff", "32", "--model.max-seq-len", "32")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(SCRIPT), "debug"]
    command += [*sizes, "--train.batch-tokens", "64", "--train.micro-batch-size", "1"]
    command += ["--turns", "1", "--steps", "1", "--peer", "none", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("throughput: transformers takes no part: not asked for") == 1
    text = out.read_text(encoding="utf-8")
    assert text.startswith("# Earlier\n\n## Training throughput: debug on 2 x ")
    words = " ".join(text.split())
    assert "torchrun --nproc_per_node=2 benchmarks/throughput.py debug --model.d-model 16" in words
    assert str(out) not in words
    assert "1 sequences x 32 tokens x 2 rank(s) x 1 accumulation step(s) = 64 tokens per step" in words
    assert text.count("\n| ") == 3  # a head and two ways
    assert not list(tmp_path.glob("**/.preflight.*"))
