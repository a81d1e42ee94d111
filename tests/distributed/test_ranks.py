"""One rank and two, with or without accumulation: the same gradient, the same losses, the same samples."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import eval_rows, launch, losses, with_train, write_run_config
from support import warm_start
from support.kinds import by_optimizer

from myllm.checkpoint.format import load_checkpoint
from myllm.checkpoint.layout import list_checkpoints
from myllm.config import RunConfig
from myllm.data.prepare.prepare import prepare

pytestmark = pytest.mark.usefixtures("prepared_data")

GRADIENTS = Path(__file__).parent / "programs/write_gradients.py"
ODD_RANK = Path(__file__).parent / "programs/train_with_odd_rank.py"
HELLASWAG = Path(__file__).parents[1] / "evals/hellaswag_own.jsonl"


@pytest.fixture
def plain(tiny: RunConfig) -> RunConfig:
    """Without dropout, which differs between ranks by design."""
    model = replace(tiny.model, dropout_embedding=0.0, dropout_attention_residual=0.0, dropout_ffn=0.0)
    return replace(with_train(tiny, batch_tokens=512, micro_batch_size=8), model=model)


def gradients(config: RunConfig, ranks: int, sizes: tuple[int, ...], folder: Path) -> list[dict[str, torch.Tensor]]:
    """The first step's gradient for each micro-batch size, on this many ranks."""
    folder.mkdir()
    path = write_run_config(config, folder / "config.json")
    done = warm_start.run(GRADIENTS, path, folder, *map(str, sizes), ranks=ranks)
    assert done.returncode == 0, done.stderr
    found = [[torch.load(folder / f"micro{size}-rank{rank}.pt") for rank in range(ranks)] for size in sizes]
    for first, *others in found:  # every rank must hold the same, bit for bit
        assert all(torch.equal(other[name], first[name]) for other in others for name in first)
    return [first for first, *_ in found]


@pytest.mark.slow
def test_gradients_independent_of_ranks_and_accumulation(plain: RunConfig, tmp_path: Path) -> None:
    """8 sequences a step as 1, 2 and 4 accumulation steps on one rank, and as 1, 2 and 4 on two."""
    reference, *others = gradients(plain, 1, (8, 4, 2), tmp_path / "one")
    for other in (*others, *gradients(plain, 2, (4, 2, 1), tmp_path / "two")):
        assert other.keys() == reference.keys()
        for name, gradient in reference.items():
            difference = (other[name] - gradient).norm() / gradient.norm()
            assert difference < 2e-6, f"{name} differs by {difference:.1e}"


@pytest.mark.slow
@by_optimizer
def test_resume_with_different_rank_counts(optimizer: str, plain: RunConfig, tmp_path: Path, temp_data: Path) -> None:
    """Four steps on two ranks by DDP, four on three by FSDP and four on one rank are twelve on one: the same samples,
    losses and figures."""
    lambada = tmp_path / "lambada.jsonl"
    lambada.write_text("".join(f'{{"text": "the children waved{" again" * n} at boats"}}\n' for n in range(30)))
    evals = replace(
        plain.eval, hellaswag_every_steps=12, hellaswag_file=str(HELLASWAG), tasks=(f"lambada:{lambada}",),
        tasks_every_steps=12,
    )  # fmt: skip
    optim = replace(  # the same for any number of steps
        plain.optim, optimizer=optimizer, schedule="wsd", decay_fraction=0.0, warmup_steps=1,
        muon_momentum_warmup_steps=0,
    )  # fmt: skip
    constant = replace(with_train(plain, batch_tokens=768), optim=optim, eval=evals)
    whole = write_run_config(replace(with_train(constant, micro_batch_size=4), name="whole"), tmp_path / "whole.json")
    two = write_run_config(with_train(constant, micro_batch_size=2, max_steps=4), tmp_path / "two.json")
    assert launch("--config", whole).returncode == 0
    for ranks, words in ((2, ()), (3, ("--train.parallel", "fsdp", "--train.max-steps", "8"))):
        done = launch("--config", two, *words, ranks=ranks)
        assert done.returncode == 0, done.stderr
    run = temp_data / "runs/tiny"
    assert json.loads((run / "environment.json").read_text())["world_size"] == 3
    assert len(load_checkpoint(list_checkpoints(run / "checkpoints")[0]).random) == 3
    done = launch("--config", two, "--train.max-steps", "12", "--train.micro-batch-size", "12")
    assert done.returncode == 0, done.stderr
    one, other = losses(temp_data / "runs/whole"), losses(run)
    assert one.keys() == other.keys() == set(range(1, 13))
    assert all(abs(one[step] - other[step]) < 1e-4 for step in one)
    by_step = {row["step"]: row for row in eval_rows(temp_data / "runs/whole", "validation")}
    for row in eval_rows(run, "validation"):  # the two ranks' at 0 and 6, under either engine, and one rank's
        if row["step"] in by_step:
            assert abs(by_step[row["step"]]["loss"] - row["loss"]) < 1e-4
            assert by_step[row["step"]]["n_tokens"] == row["n_tokens"]
    for name in ("hellaswag", "lambada"):
        by_one, by_two = (eval_rows(root, name)[0] | {"seconds": 0} for root in (temp_data / "runs/whole", run))
        numbers = [
            {key: value for key, value in row.items() if key not in ("kind", "name")} for row in (by_one, by_two)
        ]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-9)  # before the first step; sums in another order
        assert by_one["n_examples"] == 30


@pytest.mark.slow
def test_early_stopping_agrees_across_ranks(plain: RunConfig, tmp_path: Path, temp_data: Path) -> None:
    """At a rate of next to nothing no validation is better than the first: two more, and all ranks stop, by rank 0's
    figures, though the other rank has its own."""
    evals = replace(plain.eval, validation_every_steps=2)
    config = with_train(plain, micro_batch_size=4, early_stop_patience=2)
    config = replace(config, optim=replace(plain.optim, max_lr=1e-30), eval=evals)
    prepare(config.data, progress=False)
    path = write_run_config(config, tmp_path / "config.json")
    done = warm_start.run(ODD_RANK, path, tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    ends = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ends == [{"step": 6, "stopped_early": True}] * 2
    run = temp_data / "runs/tiny"
    assert len({row["loss"] for row in eval_rows(run, "validation")}) == 1
    assert [path.name for path in list_checkpoints(run / "best")] == ["step_00000002"]
    assert len(load_checkpoint(list_checkpoints(run / "best")[0]).random) == 2


def test_user_error_reported_once_by_rank_0(tmp_path: Path) -> None:
    done = launch("debug", "--train.batch-tokens", "1000", ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("error: the config has") == 1
