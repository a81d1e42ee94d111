"""A run's folder: whose it is, what may change on a resume, and how a user names it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from myllm.checkpoint.format import Snapshot, write_checkpoint
from myllm.checkpoint.locate import find_checkpoint
from myllm.checkpoint.state import TrainState
from myllm.config import RunConfig, to_dict
from myllm.data.sampler import DataPosition
from myllm.errors import UserError
from myllm.inference.load import find_model
from myllm.paths import RunPaths
from myllm.runs.history import find_run
from myllm.runs.run_dir import archive_old_run, claim_run, next_steps, truncate_logs, write_config
from myllm.runs.saved_settings import check_resumable, check_saved_settings


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    (tmp_path / "r").mkdir()
    return RunPaths(tmp_path / "r")


def test_concurrent_claim_raises(run: RunPaths) -> None:
    with claim_run(run), pytest.raises(UserError, match="another process is training"), claim_run(run):
        pass
    with claim_run(run):  # and free again afterwards
        pass


def test_archive_preserves_files(run: RunPaths) -> None:
    assert archive_old_run(run) is None
    run.metrics.write_text("numbers")
    aside = archive_old_run(run)
    assert aside is not None
    assert (aside / "metrics.jsonl").read_text() == "numbers"
    assert list(run.root.iterdir()) == []


def test_resume_allows_compatible_changes() -> None:
    saved = RunConfig()
    longer = replace(saved, train=replace(saved.train, max_steps=7, micro_batch_size=1), name="other")
    assert check_resumable(to_dict(saved), longer, Path("x")) == [
        "train.max_steps: 19073 -> 7", "train.micro_batch_size: 16 -> 1"
    ]  # fmt: skip
    dropout = replace(saved, model=replace(saved.model, dropout_ffn=0.1))
    assert check_resumable(to_dict(saved), dropout, Path("x")) == ["model.dropout_ffn: 0.0 -> 0.1"]


@pytest.mark.parametrize(
    ("part", "change"), [("model", {"n_layers": 3}), ("train", {"seed": 5}), ("train", {"batch_tokens": 2})]
)
def test_resume_rejects_incompatible_changes(part: str, change: dict[str, int]) -> None:
    saved = RunConfig()
    other = replace(saved, **{part: replace(getattr(saved, part), **change)})
    with pytest.raises(UserError, match=f"{part}.{next(iter(change))}: "):
        check_resumable(to_dict(saved), other, Path("x"))


def put(checkpoints: Path, step: int, config: RunConfig | None = None) -> Path:
    state = TrainState(step, 0, DataPosition(0, 0, 0, ""))
    return write_checkpoint(
        checkpoints, Snapshot(state, to_dict(config) if config else {}, {"w": torch.zeros(1)}, {}, {})
    )


def test_saved_settings_mismatch_raises(tiny: RunConfig) -> None:
    """Compared with the newest intact checkpoint: a changed byte may still be JSON, with a key that nobody knows."""
    check_saved_settings(tiny)
    folders = [put(RunPaths.of(tiny.name).checkpoints, step, tiny) for step in (4, 8, 12)]
    damaged = folders[-1] / "config.json"
    damaged.write_text(damaged.read_text().replace("cautious_decay", "bautious_decay"))
    check_saved_settings(replace(tiny, train=replace(tiny.train, max_steps=99)))
    other = replace(tiny, train=replace(tiny.train, seed=5))
    with pytest.raises(UserError, match="step_00000008 was made with other settings"):
        check_saved_settings(other)
    check_saved_settings(replace(other, train=replace(other.train, fresh=True)))


def test_resume_truncates_rows_after_checkpoint(run: RunPaths) -> None:
    rows = [{"kind": kind, "step": step} for step in (4, 8, 9) for kind in ("train", "eval")]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.samples.write_text('{"step": 0}\n{"step": 8}\n')
    truncate_logs(run, 8)
    kept = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    # The save at 8 came before the evaluations at 8, which are done again.
    assert kept == [{"kind": "train", "step": 4}, {"kind": "eval", "step": 4}, {"kind": "train", "step": 8}]
    assert run.samples.read_text() == '{"step": 0}\n'


def test_resume_ignores_malformed_rows(run: RunPaths) -> None:
    odd = ["{}", "null", "7", '{"step": "1"}', "[" * 10_000, '{"step": 1}']
    for path in (run.metrics, run.samples):
        path.write_text("\n".join([*odd, '{"step": 2, "kind": "train"}']) + "\n")
    truncate_logs(run, 2)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().split("\n") if line] == [1, 2]
    assert [json.loads(line)["step"] for line in run.samples.read_text().split("\n") if line] == [1]


def test_fresh_flag_is_not_saved(run: RunPaths) -> None:
    config = RunConfig()
    write_config(run, replace(config, train=replace(config.train, fresh=True)))
    assert json.loads(run.config.read_text()) == to_dict(config)


def test_ambiguous_run_name_reports_choice(
    temp_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for root, step in ((tmp_path / "here/c9", 5), (temp_data / "runs/c9", 10)):
        put(root / "checkpoints", step)
        (root / "metrics.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert find_model("c9").step == 10
    assert find_run("c9").root == temp_data / "runs/c9"
    assert capsys.readouterr().err == ""
    monkeypatch.chdir(tmp_path / "here")
    for find in (find_model, find_run):
        find("c9")
        stderr = capsys.readouterr().err
        assert f"using {tmp_path / 'here/c9'} for c9" in stderr
        assert f"give {temp_data / 'runs/c9'}" in stderr
        find(str(temp_data / "runs/c9"))
        assert capsys.readouterr().err == ""


def test_find_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    older, newest = (put(runs / "mine" / "checkpoints", step) for step in (5, 10))
    assert find_checkpoint("mine", runs).folder == newest
    assert find_checkpoint(str(runs / "mine"), tmp_path / "elsewhere").folder == newest
    assert find_checkpoint(str(older), tmp_path).folder == older
    assert capsys.readouterr().err == ""
    expected = (newest / "weights/__0_0.distcp").stat().st_size
    (newest / "weights/__0_0.distcp").write_bytes(b"")
    assert find_checkpoint("mine", runs).folder == older
    stderr = capsys.readouterr().err
    assert stderr == f"warning: skipping {newest}: weights/__0_0.distcp has 0 bytes, expected {expected:,}\n"
    (older / "weights/__0_0.distcp").write_bytes(b"")
    with pytest.raises(UserError, match=r"is intact: weights/__0_0\.distcp has 0 bytes"):
        find_checkpoint("mine", runs)
    with pytest.raises(UserError, match="no checkpoint at 'mien'; runs with checkpoints: mine"):
        find_checkpoint("mien", runs)


@pytest.mark.parametrize("prompts", [(), ("",), ("\n\n",), ("two\nlines",)])
def test_next_steps_include_prompt(tiny: RunConfig, prompts: tuple[str, ...]) -> None:
    config = replace(tiny, eval=replace(tiny.eval, sample_every_steps=0, sample_prompts=prompts))
    expected = "two" if any(prompt.strip() for prompt in prompts) else "'Once upon a time'"
    assert f"sample tiny --prompt {expected}\n" in next_steps(config)
