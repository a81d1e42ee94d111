"""Early stopping: when it ends a run, what it keeps, and that an interruption changes neither."""

import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import eval_rows, launch, losses, tiny_config, with_train, write_run_config
from support.paused_training import Pause
from training.test_loop import run, run_until
from training.test_stop_signals import DEADLINE_S, start_and_pause

from myllm.checkpoint import format as checkpoint
from myllm.checkpoint.early_stop import EarlyStop
from myllm.checkpoint.format import load_checkpoint
from myllm.checkpoint.integrity import verify_checkpoint
from myllm.checkpoint.layout import list_checkpoints
from myllm.config import RunConfig
from myllm.data.prepare.prepare import prepare
from myllm.distributed.collectives import process_group
from myllm.errors import UserError
from myllm.evals import perplexity
from myllm.inference.load import load_model
from myllm.paths import RunPaths
from myllm.training.loop import train

pytestmark = pytest.mark.usefixtures("prepared_data")


def fold(losses: list[float]) -> EarlyStop:
    early = EarlyStop()
    for number, loss in enumerate(losses, start=1):
        early = early.after(number * 10, loss)
    return early


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], EarlyStop()),
        ([3.0], EarlyStop(3.0, 10, 0, 10)),
        ([3.0, 2.0, 2.5], EarlyStop(2.0, 20, 1, 30)),
        ([3.0, 3.0, 3.0], EarlyStop(3.0, 10, 2, 30)),  # as low is not lower
        ([3.0, math.nextafter(3.0, 0)], EarlyStop(math.nextafter(3.0, 0), 20, 0, 20)),
        ([3.0, math.nan, -math.inf, math.inf], EarlyStop(3.0, 10, 3, 40)),
        ([math.nan, math.nan], EarlyStop(None, None, 2, 20)),
        ([math.nan, 9.0], EarlyStop(9.0, 20, 0, 20)),
    ],
)
def test_counts_validations_since_best(losses: list[float], expected: EarlyStop) -> None:
    early = fold(losses)
    assert early == expected
    assert not early.exhausted(None)
    assert early.exhausted(2) == (expected.since_best >= 2)
    assert EarlyStop(**json.loads(json.dumps(early.__dict__))) == early  # to the last bit, through state.json


def test_repeated_validation_is_not_counted_twice() -> None:
    early = fold([3.0, 3.5])
    assert early.after(20, 3.5) is early  # done again after a restart
    assert early.after(10, 1.0) is early
    assert EarlyStop().after(0, 11.0) == EarlyStop()  # before the first step nothing is learnt


# -- runs -------------------------------------------------------------------------------------------------------------

PATIENCE = 3


def plateau_config(tiny: RunConfig) -> RunConfig:
    """At so high a rate the loss falls, then wanders: real validations, better and worse, and an end before step 60."""
    config = with_train(tiny, max_steps=60, early_stop_patience=PATIENCE, keep_last=1)
    evals = replace(tiny.eval, validation_every_steps=2, cloze_every_steps=1_000, sample_every_steps=0)
    optim = replace(tiny.optim, max_lr=0.1, schedule="wsd", decay_fraction=0.0)
    return replace(config, eval=evals, optim=optim)


@pytest.fixture
def plateau(tiny: RunConfig) -> RunConfig:
    return plateau_config(tiny)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, never interrupted: to compare with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYLLM_DATA", str(tmp_path_factory.mktemp("whole")))
        return run(plateau_config(tiny_config(corpus)))


def expected_end(root: Path) -> tuple[int, int]:
    """The last step and the best one, worked out from the rows: the first three in a row that are no new lowest."""
    rows = [row for row in eval_rows(root, "validation") if row["step"] > 0]
    for index in range(PATIENCE, len(rows)):
        before, after = rows[: index - PATIENCE + 1], rows[index - PATIENCE + 1 : index + 1]
        if min(row["loss"] for row in after) >= min(row["loss"] for row in before):
            return rows[index]["step"], min(before, key=lambda row: row["loss"])["step"]
    pytest.fail("the loss kept falling: the test's settings show nothing")


def figures(root: Path) -> list[dict[str, float]]:
    return [row | {"seconds": 0} for row in eval_rows(root, "validation")]


def same(one: Path, other: Path) -> None:
    """Two runs that stopped early ended alike, bit for bit."""
    assert losses(one) == losses(other)
    assert figures(one) == figures(other)
    assert [path.name for path in list_checkpoints(one / "best")] == [
        path.name for path in list_checkpoints(other / "best")
    ]
    for folder in ("checkpoints", "best"):
        first, second = (load_checkpoint(list_checkpoints(root / folder)[0]) for root in (one, other))
        assert first.state == second.state
        for name, tensor in first.model.items():
            assert torch.equal(second.model[name], tensor), name


def test_early_stop_keeps_best_checkpoint(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = whole
    last, best = expected_end(root)
    assert max(losses(root)) == last < 60
    assert best < last
    assert [path.name for path in list_checkpoints(root / "checkpoints")] == [f"step_{last:08d}"]
    (kept,) = (root / "best").iterdir()
    assert kept.name == f"step_{best:08d}"
    assert not list(verify_checkpoint(kept))
    lowest = min(row["loss"] for row in eval_rows(root, "validation"))
    early = load_checkpoint(kept).state.early_stop
    assert (early.best_loss, early.best_step, early.since_best) == (lowest, best, 0)
    assert load_checkpoint(list_checkpoints(root / "checkpoints")[0]).state.early_stop.since_best == PATIENCE
    # Everything that is measured at an end is measured at this one.
    assert [row["step"] for row in eval_rows(root, "cloze")] == [0, last]
    assert len(figures(root)) == len({row["step"] for row in figures(root)})
    log = (root / "log.txt").read_text()
    assert f"stopped early after step {last} of 60: train.early_stop_patience is 3. To continue training" in log
    assert (
        f"the lowest validation loss is {lowest:.4f}, at step {best}, with 3 validations since; kept in {kept}" in log
    )
    # Named by its own path, or by the folder it is in, it is a checkpoint like any other.
    monkeypatch.setenv("MYLLM_DATA", str(root.parents[1]))
    for where in (str(kept), str(root / "best"), "tiny/best"):
        assert torch.equal(
            load_model(where, "cpu").model.embedding.weight, load_checkpoint(kept).model["embedding.weight"]
        )


def test_best_checkpoint_matches_validated_weights(plateau: RunConfig) -> None:
    """The same step of a run without early stopping, which keeps every checkpoint."""
    root = run(with_train(plateau, max_steps=10))
    best = list_checkpoints(root / "best")[0]
    plain = with_train(plateau, max_steps=10, early_stop_patience=None, save_every_steps=2, keep_last=0)
    other = run(replace(plain, name="plain"))
    assert not (other / "best").exists()
    for name, tensor in load_checkpoint(other / "checkpoints" / best.name).model.items():
        assert torch.equal(load_checkpoint(best).model[name], tensor), name
    assert losses(root) == losses(other)  # and keeping it leaves training alone
    assert load_checkpoint(list_checkpoints(other / "checkpoints")[0]).state.early_stop is None


def test_interrupted_twice_equals_uninterrupted(
    plateau: RunConfig, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Died between a validation and the next save: the count goes back with the state, the best checkpoint does not."""
    run_until(plateau, 7, monkeypatch)  # the save is at 4, before the validation there; another came at 6
    assert list_checkpoints(RunPaths.of("tiny").best)[0].name == "step_00000006"
    run_until(plateau, expected_end(whole)[0] - 1, monkeypatch)
    same(whole, run(plateau))


def test_best_checkpoint_write_is_atomic(plateau: RunConfig, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the best one is written, and after: the one before stays until the new one is whole."""
    real = checkpoint.write_json

    def dies(path: Path, value: object) -> None:
        if path.parent.name == ".partial-step_00000004" and path.parents[1].name == "best":
            raise KeyboardInterrupt
        real(path, value)

    monkeypatch.setattr(checkpoint, "write_json", dies)
    with pytest.raises(KeyboardInterrupt):
        run(plateau)
    monkeypatch.setattr(checkpoint, "write_json", real)
    (before,) = list_checkpoints(RunPaths.of("tiny").best)
    assert before.name == "step_00000002"
    assert not list(verify_checkpoint(before))

    def dies_too(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove_checkpoint", dies_too)
        with pytest.raises(KeyboardInterrupt):
            run(plateau)
    assert len(list_checkpoints(RunPaths.of("tiny").best)) == 2
    same(whole, run(plateau))


@pytest.mark.slow
def test_early_stopped_run_continues_with_larger_patience(plateau: RunConfig) -> None:
    root = run(plateau)
    last, _ = expected_end(root)
    before = (losses(root), figures(root))
    run(plateau)
    assert (losses(root), figures(root)) == before
    log = (root / "log.txt").read_text()
    assert "nothing left to train: the run has stopped early" in log
    assert log.count("stopped early after step") == 2
    # One more validation without a new lowest, or as many as it takes: what a run with that patience would have done.
    longer = with_train(plateau, early_stop_patience=PATIENCE + 1, max_steps=last + 6)
    other = run(replace(longer, name="longer"))
    run(longer)
    assert losses(root) == losses(other)
    assert max(losses(root)) > last
    assert (
        load_checkpoint(list_checkpoints(root / "best")[0]).state
        == load_checkpoint(list_checkpoints(other / "best")[0]).state
    )
    # None is the old way, to the end; what was best stays where it is.
    step = max(losses(root)) + 2
    kept = list_checkpoints(root / "best")
    run(with_train(plateau, early_stop_patience=None, max_steps=step))
    assert max(losses(root)) == step
    assert list_checkpoints(root / "best") == kept


def test_checkpoint_callback_sees_final_early_stop_state(plateau: RunConfig) -> None:
    """Saved at 4, then saved again with the validation there counted: a callback finds the second."""
    still = replace(plateau, optim=replace(plateau.optim, max_lr=1e-30))
    config = with_train(still, early_stop_patience=1, save_every_steps=2)
    published = []

    def on_checkpoint(step: int) -> None:
        published.append(
            (step, load_checkpoint(RunPaths.of("tiny").checkpoints / f"step_{step:08d}").state.early_stop.since_best)
        )

    with process_group("cpu") as process:
        outcome = train(config, prepare(config.data, progress=False), process, on_checkpoint)
    assert (outcome.step, outcome.stopped_early, outcome.stopped_by) == (4, True, None)
    assert published == [(2, 0), (4, 1)]


def test_nonfinite_losses_exhaust_patience(plateau: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run out of patience like any other, and are never the best; a validation that fails is none."""
    real = perplexity.finish
    monkeypatch.setattr(perplexity, "finish", lambda sums: real(sums) | {"loss": math.nan})
    root = run(plateau)
    assert max(losses(root)) == 2 * PATIENCE
    assert not (root / "best").exists()
    assert "no validation loss was finite, 3 in a row" in (root / "log.txt").read_text()

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(perplexity, "perplexity_sums", fails)
    assert max(losses(run(replace(with_train(plateau, max_steps=8), name="failing")))) == 8


def test_full_disk_preserves_best_checkpoint(plateau: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint.write_checkpoint

    def full(folder: Path, snapshot: checkpoint.Snapshot, *rest: object) -> Path:
        if folder.name == "best" and snapshot.state.step == 4:
            raise UserError(f"no space to save step 4 in {folder}")
        return real(folder, snapshot, *rest)

    monkeypatch.setattr("myllm.checkpoint.async_saver.write_checkpoint", full)
    with pytest.raises(UserError, match="no space to save step 4"):
        run(plateau)
    assert not list(verify_checkpoint(RunPaths.of("tiny").best / "step_00000002"))


@pytest.mark.slow
def test_killed_run_stops_at_same_step(plateau: RunConfig, whole: Path, tmp_path: Path, temp_data: Path) -> None:
    """kill -9 on real processes, and the same command again: exit code 0, one message, the same end."""
    path = write_run_config(plateau, tmp_path / "tiny.json")
    root = temp_data / "runs/tiny"
    process = start_and_pause(path, Pause(7, tmp_path / "pause"))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == -signal.SIGKILL
    done = launch("--config", path, report=True)
    assert done.returncode == 0, done.stderr
    same(whole, root)
    assert done.stdout.count(f"stopped early after step {expected_end(whole)[0]} of 60") == 1
    assert "resume       the same command; with a larger --train.early-stop-patience than 3, or None," in done.stdout
    assert f"best         {root / 'best'}" in done.stdout
    assert (root / "report.html").is_file()
