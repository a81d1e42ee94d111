"""A run from end to end, its interruptions, and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import eval_rows, losses, tiny_config, train_rows, with_train

from myllm.checkpoint.format import load_checkpoint
from myllm.checkpoint.layout import list_checkpoints
from myllm.config import RunConfig
from myllm.data.prepare.prepare import prepare
from myllm.distributed.collectives import process_group
from myllm.errors import TrainingDiverged, UserError
from myllm.model.transformer import Transformer
from myllm.paths import RunPaths
from myllm.planning.config_checks import check_config
from myllm.training import loop
from myllm.training.setup import Trainer

pytestmark = pytest.mark.usefixtures("prepared_data")


class Interrupted(Exception):
    pass


def run(config: RunConfig) -> Path:
    with process_group("cpu") as process:
        return loop.train(config, prepare(config.data, progress=False), process).run.root


def run_until(config: RunConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and die without a word when update number `step` would begin."""
    real = loop.train_step

    def fail_at(trainer: Trainer, number: int, *phase: object) -> object:
        if number == step:
            raise Interrupted
        return real(trainer, number, *phase)

    monkeypatch.setattr(loop, "train_step", fail_at)
    with pytest.raises(Interrupted):
        run(config)
    monkeypatch.setattr(loop, "train_step", real)


@pytest.fixture(scope="module")
def finished_run(corpus: Path, prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `tiny`, trained once."""
    folder = tmp_path_factory.mktemp("finished") / "temp_data"
    shutil.copytree(prepared_corpus, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYLLM_DATA", str(folder))
        return run(tiny_config(corpus))


@pytest.fixture
def finished(finished_run: Path, prepared_data: None) -> Path:
    """The test's temp_data/ has that run already."""
    return Path(shutil.copytree(finished_run, RunPaths.of("tiny").root))


def weights(root: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(list_checkpoints(root / "checkpoints")[0]).model


def test_run_outputs(tiny: RunConfig) -> None:
    root = run(tiny)
    rows = train_rows(root)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["tokens"] for row in rows] == [128 * n for n in range(1, 13)]
    assert rows[0].keys() == {
        "kind", "step", "tokens", "loss", "lr", "grad_norm", "step_s", "tokens_per_s", "mfu", "data_wait_s",
        "sample_digest",
        "sample_digest_since_step"
    }  # fmt: skip
    assert rows[0]["mfu"] is None  # a CPU's peak is unknown
    assert [row["step"] for row in eval_rows(root, "validation")] == [0, 6, 12]
    assert {"loss", "perplexity", "bits_per_byte", "token_accuracy"} <= eval_rows(root, "validation")[0].keys()
    assert [row["step"] for row in eval_rows(root, "cloze")] == [0, 12]
    assert {"acc", "acc_norm", "n_examples"} <= eval_rows(root, "cloze")[0].keys()
    samples = [json.loads(line) for line in (root / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0, 12]
    assert [path.name for path in list_checkpoints(root / "checkpoints")] == [
        "step_00000012", "step_00000008", "step_00000004"
    ]  # fmt: skip
    assert json.loads((root / "config.json").read_text())["model"]["d_model"] == 16
    environment = json.loads((root / "environment.json").read_text())
    assert {"git_commit", "git_dirty", "versions", "device", "dataset_hash", "parameters"} <= environment.keys()
    assert "step     12/12" in (root / "log.txt").read_text()


def test_training_reduces_validation_loss(tiny: RunConfig) -> None:
    config = replace(tiny, optim=replace(tiny.optim, max_lr=1e-2, warmup_steps=5))
    root = run(with_train(config, max_steps=60, save_every_steps=0))
    first, last = eval_rows(root, "validation")[0]["loss"], eval_rows(root, "validation")[-1]["loss"]
    assert first > 10
    assert last < first - 3


def test_resumed_twice_equals_uninterrupted(
    tiny: RunConfig, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with dropout: the same losses in the log, the same weights at the end."""
    whole = finished_run
    broken = replace(tiny, name="broken")
    run_until(broken, 6, monkeypatch)  # two updates past the save at 4
    run_until(broken, 11, monkeypatch)  # three past the save at 8
    root = run(broken)
    assert losses(root) == losses(whole)
    assert [row["lr"] for row in train_rows(root)] == [row["lr"] for row in train_rows(whole)]
    for name in ("validation", "cloze"):
        figures = [{k: v for k, v in row.items() if k != "seconds"} for row in eval_rows(root, name)]
        assert figures == [{k: v for k, v in row.items() if k != "seconds"} for row in eval_rows(whole, name)]
    assert (root / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(root)[name], tensor), name
    assert (root / "log.txt").read_text().count("resuming from") == 2


def test_finished_run_can_be_rerun_and_extended(tiny: RunConfig, finished: Path) -> None:
    root = finished
    before = losses(root)
    assert losses(run(tiny)) == before  # nothing left to do: nothing changes
    assert max(losses(run(with_train(tiny, max_steps=14)))) == 14
    log = (root / "log.txt").read_text()
    assert "changed since then: train.max_steps: 12 -> 14" in log
    assert "the schedule now ends at step 14 instead of 12: the learning rate was 0.0006 at the last step" in log


def test_wsd_extension_is_allowed_only_before_decay(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    optim = replace(tiny.optim, optimizer="muon", schedule="wsd", decay_fraction=0.25)
    # Warm-ups of at most a quarter of either length, so that they do not depend on it.
    tiny = replace(tiny, optim=replace(optim, warmup_steps=3, muon_momentum_warmup_steps=3))
    run_until(tiny, 8, monkeypatch)  # of 12 steps; the decay begins at step 9
    root, longer = run(with_train(tiny, max_steps=20)), with_train(tiny, max_steps=20)
    whole = run(replace(longer, name="whole"))
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(root)[name], tensor), name
    assert [row["muon_lr"] for row in train_rows(root)] == pytest.approx(
        [min(step / 3, 1, (20 - step + 1) / 5 * 0.9 + 0.1) * 0.01 for step in range(1, 21)]
    )
    assert "--train.keep-every-steps 9 keeps one" in (root / "log.txt").read_text()
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "heartbeat.json"}
    with pytest.raises(UserError, match="decaying since step 15"):
        run(with_train(tiny, max_steps=40))
    changed = [path.name for path, content in before.items() if path.read_bytes() != content]
    assert set(changed) <= {"log.txt"}
    shutil.move(root / "checkpoints/step_00000020", root)
    shutil.move(root / "checkpoints/step_00000016", root)
    assert max(losses(run(with_train(tiny, max_steps=40)))) == 40, "from step 12, as the message says"


def test_damaged_checkpoint_is_skipped(tiny: RunConfig, finished: Path) -> None:
    root, whole = finished, losses(finished)
    newest = list_checkpoints(root / "checkpoints")[0]
    content = bytearray((newest / "weights/__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "weights/__0_0.distcp").write_bytes(content)
    assert losses(run(tiny)) == whole
    assert f"skipping {newest}: the content of weights/__0_0.distcp has changed" in (root / "log.txt").read_text()


def test_fresh_restarts_and_archives_old_run(tiny: RunConfig, finished: Path) -> None:
    root = finished
    old = {path.relative_to(root): path.read_bytes() for path in root.rglob("*.distcp")}
    assert losses(run(with_train(tiny, fresh=True))) == losses(root)
    aside = [path for path in root.parent.iterdir() if path.name.startswith("tiny.before-")]
    assert len(aside) == 1
    assert {path.relative_to(aside[0]): path.read_bytes() for path in aside[0].rglob("*.distcp")} == old
    assert json.loads((root / "config.json").read_text())["train"]["fresh"] is False


def test_resume_with_other_settings_raises(tiny: RunConfig, finished: Path) -> None:
    with pytest.raises(UserError, match=r"model\.d_ff: 32 -> 64(.|\n)*--train\.fresh"):
        run(replace(tiny, model=replace(tiny.model, d_ff=64)))
    with pytest.raises(UserError, match="trained on other data"):
        run(replace(tiny, data=replace(tiny.data, val_tokens=2_000)))


def test_nonfinite_gradient_stops_run(tiny: RunConfig, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Transformer.forward, []

    def poisoned(self: object, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        out = real(self, *args, **kwargs)
        return out * float("nan") if len(calls) > 2 * 6 and self.training else out

    monkeypatch.setattr(Transformer, "forward", poisoned)
    with pytest.raises(TrainingDiverged, match="the gradient of step"):
        run(tiny)
    monkeypatch.setattr(Transformer, "forward", real)
    root = RunPaths.of("tiny").root
    for folder in list_checkpoints(root / "checkpoints"):
        assert all(tensor.isfinite().all() for tensor in load_checkpoint(folder).model.values())
    assert losses(run(tiny)) == losses(finished_run)  # and going on from the newest checkpoint heals it


def test_failing_evaluation_does_not_stop_training(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr("myllm.evals.perplexity.perplexity_sums", broken)
    root = run(tiny)
    assert len(train_rows(root)) == 12
    assert "the validation evaluation failed at step 6: no such luck" in (root / "log.txt").read_text()
    assert eval_rows(root, "validation") == []
    assert len(eval_rows(root, "cloze")) == 2


def test_evaluations_do_not_affect_losses(tiny: RunConfig, finished_run: Path) -> None:
    often = replace(tiny, name="often", eval=replace(tiny.eval, validation_every_steps=1, sample_every_steps=1))
    assert losses(run(often)) == losses(finished_run)


def test_cloze_is_skipped_with_short_context(tiny: RunConfig) -> None:
    root = run(with_train(replace(tiny, model=replace(tiny.model, max_seq_len=32)), max_steps=1))
    assert "cloze skipped: cloze needs a context of 48 tokens" in (root / "log.txt").read_text()
    assert not eval_rows(root, "cloze")


@pytest.mark.parametrize(
    ("held_out", "batch_tokens", "message"),
    [
        (64, 128, "holds out 64 tokens, too few for one sequence of model.max_seq_len 64 and its last target"),
        (3_000, 64 * 2 * 1_000, "fewer than the 2,000 of one step"),
    ],
)
def test_too_little_text_raises(tiny: RunConfig, held_out: int, batch_tokens: int, message: str) -> None:
    config = with_train(replace(tiny, data=replace(tiny.data, val_tokens=held_out)), batch_tokens=batch_tokens)
    with pytest.raises(UserError, match=message):
        run(config)
    assert not RunPaths.of("tiny").root.exists()


def test_files_without_text_in_the_column_are_said(tiny: RunConfig, corpus: Path, tmp_path: Path) -> None:
    mixed = Path(shutil.copytree(corpus, tmp_path / "mixed"))
    (mixed / "rows.jsonl").write_text('{"body": "text"}\n' * 3)
    (mixed / "latin1.txt").write_bytes("à la carte".encode("latin-1"))
    (mixed / "binary.txt").write_bytes(b"\0\xff\xfe" * 9)
    config = replace(tiny, data=replace(tiny.data, source=f"files:{mixed}"))
    log = (run(with_train(config, max_steps=1)) / "log.txt").read_text()
    assert "data: warning: files-mixed-" in log
    assert "3 x no text, such as rows.jsonl, line 1: expected an object with the key 'text', found" in log
    [line] = [line for line in log.splitlines() if " 2 x invalid text, such as " in line]
    assert "latin1.txt: not utf-8 (byte 0); if it is LATIN1, `iconv" in line
    assert "binary.txt: not utf-8" in line
    assert (run(with_train(config, max_steps=2)) / "log.txt").read_text().count(" x no text") == 1, "not at a resume"


def test_validation_set_smaller_than_batch(tiny: RunConfig) -> None:
    """Down to one sequence; and nothing where nothing is validated."""
    config = replace(tiny, data=replace(tiny.data, val_tokens=100), eval=replace(tiny.eval, cloze_every_steps=0))
    config = with_train(config, micro_batch_size=4, batch_tokens=256, max_steps=2)
    rows = eval_rows(run(config), "validation")
    assert [row["n_tokens"] for row in rows] == [64, 64]
    off = replace(config.eval, validation_every_steps=0, validation_tokens=1)
    config = replace(config, name="off", data=replace(config.data, val_tokens=20), eval=off)
    check_config(config, 1)
    assert not eval_rows(run(config), "validation")


def test_concurrent_run_raises(tiny: RunConfig) -> None:
    from myllm.runs.run_dir import claim_run

    with claim_run(RunPaths.of("tiny")), pytest.raises(UserError, match="another process is training in"):
        run(tiny)


def test_keep_last(tiny: RunConfig) -> None:
    root = run(with_train(tiny, save_every_steps=2, keep_last=2))
    assert [path.name for path in list_checkpoints(root / "checkpoints")] == ["step_00000012", "step_00000010"]
    assert len(list_checkpoints(run(replace(with_train(tiny, keep_last=0), name="all")) / "checkpoints")) == 3


def test_training_resumes_in_second_epoch(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """More steps than an epoch has: the position rolls over, and a resume in the second epoch is exact."""
    evals = replace(tiny.eval, validation_every_steps=0, cloze_every_steps=0, sample_every_steps=0)
    config = with_train(tiny, max_steps=40, save_every_steps=30)
    config = replace(config, data=replace(tiny.data, target_tokens=3_000), eval=evals)
    run_until(config, 35, monkeypatch)
    root = run(config)
    state = load_checkpoint(list_checkpoints(root / "checkpoints")[0]).state
    assert state.data.epoch >= 1
    assert state.tokens_seen == 40 * 128
    assert losses(root) == losses(run(replace(config, name="whole")))


def test_nonfinite_weights_are_never_saved(tiny: RunConfig) -> None:
    wild = replace(tiny, optim=replace(tiny.optim, max_lr=1e39, warmup_steps=0))
    with pytest.raises(TrainingDiverged):
        run(with_train(wild, save_every_steps=1))
    for folder in list_checkpoints(RunPaths.of("tiny").root / "checkpoints"):
        assert all(tensor.isfinite().all() for tensor in load_checkpoint(folder).model.values())


def test_all_checkpoints_damaged_raises(tiny: RunConfig, finished: Path) -> None:
    root = finished
    before = (root / "metrics.jsonl").read_text()
    for folder in list_checkpoints(root / "checkpoints"):
        (folder / "weights/__0_0.distcp").write_bytes(b"")
    with pytest.raises(UserError, match="is intact"):
        run(tiny)
    assert (root / "metrics.jsonl").read_text() == before


def test_partial_checkpoint_is_removed(tiny: RunConfig) -> None:
    left = RunPaths.of("tiny").checkpoints / ".partial-step_00000005"
    left.mkdir(parents=True)
    run(tiny)
    assert not left.exists()


def test_vocabulary_size_mismatch_raises(tiny: RunConfig) -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size is 50,304(.|\n)*set it to 50257"):
        run(replace(tiny, model=replace(tiny.model, vocab_size=50_304)))
