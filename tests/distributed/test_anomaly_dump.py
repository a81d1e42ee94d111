"""A bad document on one of two ranks: all stop, or all leave the update out, and the dump says whose it was."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, train_rows, with_train, write_run_config
from support.rare_token import Rare, poison, rare_token

from myllm.checkpoint.format import load_checkpoint
from myllm.checkpoint.layout import list_checkpoints
from myllm.config import RunConfig
from myllm.data.prepare.prepare import prepare
from myllm.distributed.collectives import process_group
from myllm.paths import RunPaths
from myllm.training import loop
from myllm.training.anomaly.dump import find_dump, read_dump
from myllm.training.anomaly.replay import replay_step

pytestmark = pytest.mark.slow  # real processes, half a minute and more in all

BAD_ROW = Path(__file__).parent / "programs/train_with_bad_row.py"


@pytest.fixture
def config(corpus: Path, temp_data: Path) -> RunConfig:
    tiny = tiny_config(corpus)
    evals = replace(tiny.eval, validation_every_steps=0, cloze_every_steps=0, sample_every_steps=0)
    tiny = replace(tiny, model=replace(tiny.model, tie_embeddings=False), eval=evals)
    return with_train(tiny, batch_tokens=256, log_every_steps=3)


@pytest.fixture
def rare(config: RunConfig) -> Rare:
    """On rank 1, which takes every second sample."""
    return rare_token(config, prepare(config.data, progress=False), first_step=2, odd_sample=True)


def train(config: RunConfig, rare: Rare, folder: Path) -> subprocess.CompletedProcess[str]:
    path = write_run_config(config, folder / f"{config.name}.json")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*torchrun, str(BAD_ROW), str(path), str(rare.token)]
    return subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)


def test_ranks_stop_and_dump_identifies_rank(config: RunConfig, rare: Rare, tmp_path: Path) -> None:
    """Replayed in one process, each rank's samples have the same losses, dropout included."""
    done = train(config, rare, tmp_path)
    assert done.returncode != 0
    assert done.stderr.count(f"error: the gradient of step {rare.step} is not finite") == 1
    assert "exitcode  : 65 " in done.stderr, done.stderr
    assert f"sequence {rare.sequence:,}, on rank 1, " in done.stdout
    dump = read_dump(find_dump("tiny", RunPaths.of("tiny").root.parent))
    assert (dump.summary["world_size"], dump.summary["reproduced"], dump.summary["errors"]) == (2, True, [None, None])
    assert dump.summary["first_nonfinite"] == [{"rank": 1, "module": "dropout", "input_finite": True}]
    assert [row["rank"] for row in dump.samples] == [0, 1, 0, 1]
    assert [row["sample"] for row in dump.samples if row["loss"] == "nan"] == [rare.sample]
    assert len(dump.random) == 2
    assert not torch.equal(dump.random[0]["cpu"], dump.random[1]["cpu"])
    found = replay_step(dump, torch.device("cpu"))
    here = dict(zip(found.samples, found.diagnosis.losses, strict=True))
    for row in dump.samples:
        assert here[row["sample"]] == pytest.approx(float(row["loss"]), rel=1e-6, nan_ok=True)


def test_ranks_skip_nonfinite_update(
    config: RunConfig, rare: Rare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one rank does. Without dropout, which differs between ranks: here the backward pass alone goes bad."""
    still = replace(config.model, dropout_embedding=0.0, dropout_attention_residual=0.0, dropout_ffn=0.0)
    two = with_train(replace(config, model=still), on_nonfinite="skip", log_every_steps=1, max_steps=8)
    done = train(two, rare, tmp_path)
    assert done.returncode == 0, done.stderr
    poison(monkeypatch, rare.token)
    one = replace(with_train(two, micro_batch_size=2), name="one")
    with process_group("cpu") as process:
        loop.train(one, prepare(one.data, progress=False), process)
    roots = [RunPaths.of(name).root for name in ("tiny", "one")]
    for row, other in zip(*map(train_rows, roots), strict=True):
        assert row["skipped_nonfinite"] == other["skipped_nonfinite"] == (row["step"] >= rare.step)
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-4)
    skips = [load_checkpoint(list_checkpoints(root / "checkpoints")[0]).state.skips for root in roots]
    assert (skips[0].nonfinite, skips[0].norm_count) == (skips[1].nonfinite, skips[1].norm_count) == (1, 7)
