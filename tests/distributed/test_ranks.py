"""One rank and two, with or without accumulation: the same gradient, the same losses, the same samples."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, eval_rows, launch, losses, with_train, write_run_config

from myllm.config import RunConfig

GRADIENTS = Path(__file__).parent / "write_gradients.py"


@pytest.fixture
def plain(tiny: RunConfig) -> RunConfig:
    """Without dropout, which differs between ranks by design."""
    model = replace(tiny.model, dropout_embedding=0.0, dropout_attention_residual=0.0, dropout_ffn=0.0)
    return replace(with_train(tiny, batch_tokens=512, micro_batch_size=8), model=model)


def gradients(config: RunConfig, ranks: int, sizes: tuple[int, ...], folder: Path) -> list[dict[str, torch.Tensor]]:
    """The first step's gradient for each micro-batch size, on so many ranks."""
    folder.mkdir()
    path = write_run_config(config, folder / "config.json")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words = [*torchrun, str(GRADIENTS), str(path), str(folder), *map(str, sizes)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = [[torch.load(folder / f"micro{size}-rank{rank}.pt") for rank in range(ranks)] for size in sizes]
    for first, *others in found:  # every rank must hold the same, bit for bit
        assert all(torch.equal(other[name], first[name]) for other in others for name in first)
    return [first for first, *_ in found]


def test_gradients_do_not_depend_on_ranks_or_accumulation(plain: RunConfig, tmp_path: Path) -> None:
    """8 sequences a step as 1, 2 and 4 accumulation steps on one rank, and as 1, 2 and 4 on two."""
    reference, *others = gradients(plain, 1, (8, 4, 2), tmp_path / "one")
    for other in (*others, *gradients(plain, 2, (4, 2, 1), tmp_path / "two")):
        assert other.keys() == reference.keys()
        for name, gradient in reference.items():
            difference = (other[name] - gradient).norm() / gradient.norm()
            assert difference < 2e-6, f"{name} differs by {difference:.1e}"


def test_two_ranks_train_as_one(plain: RunConfig, tmp_path: Path, temp_data: Path) -> None:
    one = write_run_config(with_train(plain, micro_batch_size=4), tmp_path / "one.json")
    two = write_run_config(replace(with_train(plain, micro_batch_size=2), name="two"), tmp_path / "two.json")
    assert launch("--config", one).returncode == 0
    done = launch("--config", two, ranks=2)
    assert done.returncode == 0, done.stderr
    first, second = losses(temp_data / "runs/tiny"), losses(temp_data / "runs/two")
    assert first.keys() == second.keys()
    assert all(abs(first[step] - second[step]) < 1e-4 for step in first)
    for name in ("validation", "cloze"):
        for a, b in zip(eval_rows(temp_data / "runs/tiny", name), eval_rows(temp_data / "runs/two", name), strict=True):
            assert a["step"] == b["step"]
            key = "loss" if name == "validation" else "acc"
            assert abs(a[key] - b[key]) < (1e-4 if name == "validation" else 0.1)
    assert json.loads((temp_data / "runs/two/environment.json").read_text())["world_size"] == 2


def test_a_run_goes_on_with_another_number_of_ranks(plain: RunConfig, tmp_path: Path, temp_data: Path) -> None:
    config = with_train(plain, micro_batch_size=4)
    whole = write_run_config(replace(config, name="whole"), tmp_path / "whole.json")
    half = write_run_config(with_train(config, max_steps=8), tmp_path / "half.json")
    # The schedule looks at max_steps, so the first half keeps the rate constant in both.
    assert launch("--config", whole, "--optim.schedule", "wsd", "--optim.decay-fraction", "0").returncode == 0
    assert launch("--config", half, "--optim.schedule", "wsd", "--optim.decay-fraction", "0").returncode == 0
    words = ("--train.max-steps", "12", "--optim.schedule", "wsd", "--optim.decay-fraction", "0")
    done = launch("--config", half, *words, ranks=2)
    assert done.returncode == 0, done.stderr
    a, b = losses(temp_data / "runs/whole"), losses(temp_data / "runs/tiny")
    assert {step: a[step] for step in range(1, 9)} == {step: b[step] for step in range(1, 9)}
    assert all(abs(a[step] - b[step]) < 1e-4 for step in range(9, 13))


def test_a_mistake_is_said_once_and_by_rank_0(tmp_path: Path) -> None:
    done = launch("debug", "--train.batch-tokens", "1000", ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("error: the config has") == 1


def test_the_script_is_where_it_is_looked_for() -> None:
    assert (ROOT / "pretrain.py").is_file()
