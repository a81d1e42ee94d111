"""A rehearsal on two ranks, and a micro-batch size that all ranks agree on."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import launch, losses, with_train, write_run_config

from myllm.config import RunConfig

pytestmark = pytest.mark.slow  # real processes, half a minute and more in all


@pytest.fixture
def short(tiny: RunConfig) -> RunConfig:
    """Four sequences a step, without dropout, which differs between ranks by design."""
    model = replace(tiny.model, dropout_embedding=0.0, dropout_attention_residual=0.0, dropout_ffn=0.0)
    return replace(with_train(tiny, batch_tokens=2 * 64, max_steps=4), model=model)


def test_preflight_on_two_ranks(short: RunConfig, tmp_path: Path, temp_data: Path) -> None:
    """One table, of both; a refusal is said once; nothing is left."""
    path = write_run_config(short, tmp_path / "config.json")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*torchrun, "-m", "myllm", "preflight", "--config", str(path), "--max-hours", "1e-9"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0
    assert done.stdout.count("preflight of tiny on 2 x") == 1
    assert "1 sequences x 64 tokens x 2 rank(s) x 1 accumulation step(s) = 128 tokens per step" in done.stdout
    assert "checkpoint   " in done.stdout
    assert done.stderr.count("error: this run would fail") == 1
    assert done.stderr.count("but --max-hours is 1e-09") == 1
    assert "Traceback (most recent call last):\n  File" not in done.stderr.split("torch/distributed")[0]
    assert not temp_data.exists()
    assert not list(tmp_path.glob(".preflight.*"))


def test_auto_micro_batch_size_across_rank_counts(short: RunConfig, tmp_path: Path, temp_data: Path) -> None:
    """Two sequences fit on one rank; two ranks have one each, so they choose anew. The losses are those of one rank."""
    auto = with_train(short, micro_batch_size="auto", save_every_steps=2)
    run, path = temp_data / "runs/tiny", write_run_config(auto, tmp_path / "auto.json")
    done = launch("--config", path, "--train.max-steps", "2")
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "config.json").read_text())["train"]["micro_batch_size"] == 2
    done = launch("--config", path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "config.json").read_text())["train"]["micro_batch_size"] == 1
    assert (run / "log.txt").read_text().count("micro_batch_size auto: 1, the largest of 1 that fits") == 1
    assert sorted(losses(run)) == [1, 2, 3, 4]
