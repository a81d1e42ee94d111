"""Steps that diverge: what stops the run, which updates are skipped, and the dump that replays the step."""

import errno
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import losses, train_rows, with_train
from support.kinds import by_optimizer
from support.rare_token import poison, rare_token, sequences_of_steps
from torch import nn

from myllm.checkpoint.format import load_checkpoint
from myllm.checkpoint.layout import checkpoint_dir, list_checkpoints
from myllm.cli.main import main
from myllm.config import RunConfig
from myllm.data.dataloader import read_batch
from myllm.data.dataset import Dataset
from myllm.data.order import StreamOrder
from myllm.data.prepare.prepare import prepare
from myllm.distributed.collectives import process_group
from myllm.errors import TrainingDiverged, UserError
from myllm.model.transformer import Transformer
from myllm.optim.optimizer import ScheduledOptimizer
from myllm.paths import RunPaths
from myllm.training import gradient_guard as guard
from myllm.training import loop, setup
from myllm.training.anomaly import dump as dump_module
from myllm.training.anomaly import report as bad_step
from myllm.training.anomaly.dump import find_dump, read_dump
from myllm.training.anomaly.replay import replay_step

pytestmark = pytest.mark.usefixtures("prepared_data")

CPU = torch.device("cpu")


@pytest.fixture
def bare(tiny: RunConfig) -> RunConfig:
    """No evaluations, and an input embedding of its own, which only samples with the token look at."""
    evals = replace(tiny.eval, validation_every_steps=0, cloze_every_steps=0, sample_every_steps=0)
    return replace(tiny, model=replace(tiny.model, tie_embeddings=False), eval=evals)


def run(config: RunConfig) -> Path:
    with process_group("cpu") as process:
        return loop.train(config, prepare(config.data, progress=False), process).run.root


def stopped(config: RunConfig) -> str:
    with pytest.raises(TrainingDiverged) as caught:
        run(config)
    return str(caught.value)


# -- what stops a run, and what it leaves


def test_locates_document_causing_nan(
    bare: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step is exactly the bad one though the host looks later; its weights are those of the checkpoint before."""
    dataset = prepare(bare.data, progress=False)
    rare = rare_token(bare, dataset, first_step=3)
    poison(monkeypatch, rare.token)
    config = with_train(bare, save_every_steps=rare.step - 1, log_every_steps=rare.step + 2, max_steps=30)
    message = stopped(config)
    assert f"the gradient of step {rare.step} is not finite" in message
    assert f"samples {2 * (rare.step - 1)} to {2 * rare.step - 1} in shuffled order" in message
    assert f"sample {rare.sample}     loss nan, gradient nan: sequence {rare.sequence:,}, on rank 0" in message
    assert "first seen   in the output of dropout on rank 0; its input was finite" in message
    assert "gradients    not finite: embedding.weight" in message
    paths = RunPaths.of("tiny")
    assert message in paths.log.read_text()
    assert f"myllm replay {paths.anomalies}/step_{rare.step:08d}" in message

    dump = read_dump(find_dump("tiny", paths.root.parent))
    saved = load_checkpoint(checkpoint_dir(paths.checkpoints, rare.step - 1))
    assert list_checkpoints(paths.checkpoints) == [saved.folder]
    assert all(torch.equal(saved.model[name], dump.model[name]) for name in saved.model)
    assert all(
        torch.equal(saved.optimizer[name][key], dump.optimizer[name][key])
        for name in saved.optimizer
        for key in saved.optimizer[name]
    )
    assert torch.equal(saved.random[0]["cpu"], dump.random[0]["cpu"])
    before = load_checkpoint(list_checkpoints(dump.folder)[0])  # an ordinary checkpoint
    assert (before.folder.name, before.state) == (
        saved.folder.name,
        replace(saved.state, skips=None, sample_digest=None),
    )
    assert [row["sequence"] for row in dump.samples] == sequences_of_steps(bare, dataset, 12)[rare.step - 1].tolist()
    assert [row["sample"] for row in dump.samples if row["loss"] == "nan"] == [rare.sample]
    token = dataset.tokenizer().decode([rare.token])
    assert token in dump.samples[rare.sample]["text"]
    assert not list(paths.anomalies.glob(".*"))

    capsys.readouterr()
    main(["replay", "tiny"])
    output = capsys.readouterr().out
    assert "not finite in the replay either" in output
    assert "first seen in the output of dropout; its input was finite" in output
    assert f"--- sample {rare.sample}, sequence {rare.sequence:,}\n{dump.samples[rare.sample]['text']}" in output
    main(["replay", str(dump.folder), "--samples", str(1 - rare.sample), "--precision", "bfloat16"])
    assert "finite in the replay" in capsys.readouterr().out.splitlines()

    assert f"step {rare.step} " in stopped(config)  # the same data again, and the dump is written over
    assert len(list(paths.anomalies.iterdir())) == 1
    (dump.folder / "notes.txt").write_text("seen before")
    shutil.copytree(dump.folder, dump.folder.with_name(f"step_{rare.step + 1:08d}.bak"))
    stopped(config)  # what somebody put there is kept, and a copy is nobody's newest
    assert [path.read_text() for path in paths.anomalies.glob("*.before-*/notes.txt")] == ["seen before"]
    assert find_dump("tiny", paths.root.parent) == dump.folder


@by_optimizer
def test_spike_stops_run_and_replay_matches(bare: RunConfig, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A healthy step: replayed, it has the row's loss and norm with dropout, and those of float64 without."""
    bare = replace(bare, optim=replace(bare.optim, optimizer=optimizer))
    monkeypatch.setattr(guard, "WARMUP_STEPS", 3)
    monkeypatch.setattr(guard, "MIN_DEVIATION", 1e-6)
    config = with_train(bare, batch_tokens=256, micro_batch_size=2, skip_spikes_sigma=0.01, max_skipped_steps=0)
    message = stopped(replace(config, optim=replace(config.optim, max_lr=3e-2)))
    paths = RunPaths.of("tiny")
    row, dump = train_rows(paths.root)[-1], read_dump(find_dump(str(paths.root), Path()))
    assert f"the gradient norm of step {row['step']} is a spike, {row['grad_norm']:.3g}" in message
    assert row["skipped_spikes"] == 1
    assert dump.summary["step"] == row["step"] > 3
    assert dump.summary["grad_norm"] == row["grad_norm"]

    result = replay_step(dump, CPU)
    assert result.diagnosis.loss == pytest.approx(row["loss"], rel=1e-6)
    assert result.diagnosis.grad_norm == pytest.approx(row["grad_norm"], rel=1e-5)
    assert sum(result.diagnosis.losses) / 4 == pytest.approx(row["loss"], rel=1e-6)
    assert [row["loss"] for row in dump.samples] == pytest.approx(result.diagnosis.losses, rel=1e-6)
    assert 0 < result.updates["embedding"] < 1
    assert 0 < result.updates["blocks.0.attention.qkv_proj"] < 1

    still = {name: 0.0 for name in vars(bare.model) if name.startswith("dropout")}
    dump = replace(dump, config=replace(dump.config, model=replace(bare.model, **still)))
    result = replay_step(dump, CPU)
    model = Transformer(dump.config.model).double()
    model.load_state_dict(dump.model)
    tokens = torch.from_numpy(dump.tokens.astype(np.int64))
    own, embedded = [], []
    near = partial(pytest.approx, rel=1e-3)  # the norm of a float32 matrix of 800,000 entries is no closer on a CPU
    for place in range(4):
        model.zero_grad()
        with model.embedding.register_forward_hook(lambda *given: embedded.append(given[-1])):
            loss = F.cross_entropy(model(tokens[place : place + 1, :-1])[0], tokens[place, 1:])
        embedded[-1].retain_grad()
        loss.backward()
        assert result.diagnosis.losses[place] == pytest.approx(loss.item(), rel=1e-5)
        own.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        assert result.diagnosis.input_gradient_norms[place] == near(embedded[-1].grad.norm().item() / 4)
    mean = {name: sum(gradients[name] for gradients in own) / 4 for name in own[0]}
    assert result.diagnosis.grad_norm == near(norm_of(mean))
    for layer in result.diagnosis.layers:
        if layer.gradient_norm is not None:
            mine = {name: value for name, value in mean.items() if name.rpartition(".")[0] == layer.module}
            assert layer.gradient_norm == near(norm_of(mine)), layer.module
    only = replay_step(dump, CPU, samples=(2,))
    assert only.diagnosis.grad_norm == near(norm_of(own[2]))
    with pytest.raises(UserError, match="no sample 4 in this step; it has samples 0 to 3"):
        replay_step(dump, CPU, samples=(4,))


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))


def test_locates_nonfinite_backward_pass(bare: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout nothing overflows on the way in: every loss is finite, and one sample's gradient is not."""
    model = replace(bare.model, dropout_embedding=0.0, dropout_attention_residual=0.0, dropout_ffn=0.0)
    rare = rare_token(bare, prepare(bare.data, progress=False), first_step=2)
    poison(monkeypatch, rare.token)
    message = stopped(replace(bare, model=model))
    dump = read_dump(find_dump("tiny", RunPaths.of("tiny").root.parent))
    assert all(math.isfinite(float(row["loss"])) for row in dump.samples)
    assert [row["sample"] for row in dump.samples if row["gradient"] == "nan"] == [rare.sample]
    assert f"gradient nan: sequence {rare.sequence:,}, on rank 0" in message
    assert "first seen   in the backward pass, in the gradient of the output of " in message


def test_full_disk_preserves_divergence_message(bare: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, rare_token(bare, prepare(bare.data, progress=False), first_step=2).token)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dump_module.np, "save", full)
    monkeypatch.setattr(bad_step, "diagnose", full)
    message = stopped(bare)
    assert "is not finite" in message
    assert "dump         not written: [Errno 28] No space left on device" in message
    assert "rank 0 could not repeat the step: OSError" in message
    assert "myllm replay" not in message
    assert list(RunPaths.of("tiny").anomalies.iterdir()) == []


# -- skipped updates ---------------------------------------------------------------------------------------------------


def trained_without(config: RunConfig, dataset: Dataset, skipped: int) -> dict[str, torch.Tensor]:
    """The weights of a plain loop that skips one of the updates."""
    model = setup.Transformer(config.model, config.train.seed)  # as `poison` patches it
    optimizer = ScheduledOptimizer(
        model.named_parameters(), model.hidden_matrices(), config.optim, config.train.max_steps
    )
    torch.manual_seed(config.train.seed)
    model.train()
    for step, sequences in enumerate(sequences_of_steps(config, dataset, config.train.max_steps), 1):
        for sequence in sequences:
            tokens, targets = read_batch(StreamOrder(dataset.train, config.model.max_seq_len), np.array([sequence]))
            (model(tokens, targets) / len(sequences)).backward()
        if step != skipped:
            nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
            optimizer.step(step - 1)
        optimizer.zero_grad()
    return model.state_dict()


@by_optimizer
def test_skipped_update_leaves_no_trace(
    bare: RunConfig, optimizer: str, monkeypatch: pytest.MonkeyPatch, run_until: Callable[..., None]
) -> None:
    """And a resume behind it is exact, counts and statistics included."""
    bare = replace(bare, optim=replace(bare.optim, optimizer=optimizer))
    monkeypatch.setattr(guard, "WARMUP_STEPS", 2)
    dataset = prepare(bare.data, progress=False)
    rare = rare_token(bare, dataset, first_step=2)
    poison(monkeypatch, rare.token)
    config = with_train(bare, on_nonfinite="skip", skip_spikes_sigma=50.0, log_every_steps=5, max_steps=14)
    root = run(config)
    saved = load_checkpoint(list_checkpoints(root / "checkpoints")[0])
    for name, weight in trained_without(config, dataset, rare.step).items():
        assert torch.equal(saved.model[name], weight), name
    skips = saved.state.skips
    assert (skips.nonfinite, skips.spikes, skips.consecutive, skips.norm_count) == (1, 0, 0, 13)
    rows = train_rows(root)
    assert [row["skipped_nonfinite"] for row in rows] == [int(row["step"] >= rare.step) for row in rows]
    assert f"skipped the update of step {rare.step}: its gradient is not finite" in (root / "log.txt").read_text()

    broken = replace(config, name="broken")
    for at in (rare.step + 1, 13):
        run_until(broken, at)
    other = load_checkpoint(list_checkpoints(run(broken) / "checkpoints")[0])
    assert other.state == saved.state
    assert all(torch.equal(other.model[name], weight) for name, weight in saved.model.items())
    assert losses(RunPaths.of("broken").root) == losses(root)


@pytest.fixture
def run_until(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunConfig, int], None]:
    """Train, and die without a word when update number `step`, counted from 0, would begin."""

    def until(config: RunConfig, step: int) -> None:
        real = loop.train_step
        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_step", lambda *a: real(*a) if a[1] != step else (_ for _ in ()).throw(Cut()))
            with pytest.raises(Cut):
                run(config)

    return until


class Cut(Exception):
    pass


def test_too_many_skipped_steps_raise(bare: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is everywhere: no update can be made, and the third in a row is one too many."""
    poison(monkeypatch, prepare(bare.data, progress=False).tokenizer().encode(" the")[0])
    message = stopped(with_train(bare, on_nonfinite="skip", max_skipped_steps=2, log_every_steps=5))
    assert "the gradient of step 3 is not finite" in message
    assert "3 in a row; train.max_skipped_steps is 2" in message
    assert "raise --train.max-skipped-steps" in message
    log = (RunPaths.of("tiny").log).read_text()
    assert "skipped the update of step 1: its gradient" in log
    assert "skipped the update of step 2: its gradient" in log
    assert not list_checkpoints(RunPaths.of("tiny").checkpoints)
