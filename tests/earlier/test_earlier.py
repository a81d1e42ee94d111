"""What earlier versions wrote can be used: tests/earlier has a run of each, made by tests/earlier/make.py there."""

import json
import re
import shutil
from dataclasses import field, make_dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import launch, losses
from support.saved_checkpoints import rewrite

from myllm import config
from myllm.checkpoint.format import load_checkpoint
from myllm.checkpoint.state import read_state
from myllm.cli import main as cli
from myllm.config import RunConfig, TrainConfig, from_dict, load_config, saved_config, to_dict
from myllm.errors import UserError
from myllm.migrations import CONFIG, STATE, Change, Schema
from myllm.runs.saved_settings import check_resumable

EARLIER = Path(__file__).parent
VERSIONS = sorted(path.parent.name for path in EARLIER.glob("*/runs"))


@pytest.fixture(params=VERSIONS)
def runs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its runs/, with the data set beside it."""
    shutil.copytree(EARLIER / request.param, tmp_path / "temp_data")
    monkeypatch.setenv("MYLLM_DATA", str(tmp_path / "temp_data"))
    return tmp_path / "temp_data/runs"


@pytest.fixture
def done(runs: Path) -> Path:
    return runs / "done"


def test_resume_earlier_run(done: Path) -> None:
    before = losses(done)
    ended = launch("--config", done / "config.json", "--train.max-steps", 10)
    assert ended.returncode == 0, ended.stderr
    assert "resuming from" in ended.stdout
    assert {step: loss for step, loss in losses(done).items() if step <= 8} == before
    assert set(losses(done)) == set(range(1, 11))
    state = read_state(done / "checkpoints/step_00000010")
    assert (state.step, state.tokens_seen, state.sample_digest.since_step) == (10, 640, 0)
    assert state.early_stop.best_step is not None
    for name, schema in (("config", CONFIG), ("state", STATE)):
        saved = json.loads((done / f"checkpoints/step_00000010/{name}.json").read_text())
        assert saved["version"] == schema.version
    assert json.loads((done / "config.json").read_text())["version"] == CONFIG.version


def test_commands_read_earlier_run(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["sample", "done", "--prompt", "the river", "--device", "cpu", "--max-new-tokens", "4"])
    assert "the river" in capsys.readouterr().out
    cli.main(["sample", str(done / "best"), "--prompt", "the river", "--device", "cpu", "--max-new-tokens", "4"])
    cli.main(["eval", "done", "--tasks", "validation", "--device", "cpu"])
    assert len(json.loads((done / "eval.json").read_text())["results"]) == 2
    cli.main(["report", "done"])
    assert (done / "report.html").is_file()
    cli.main(["checkpoint", "verify", "done"])
    assert capsys.readouterr().out.count(": intact") == 2
    with pytest.raises(SystemExit) as ended:
        cli.main(["status", "done"])
    assert (ended.value.code, capsys.readouterr().out) == (0, "step 8: complete, after step 8\n")


def test_replay_earlier_anomaly_dump(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["replay", "diverged"])
    assert "not finite in the replay either" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["status", "diverged"])
    cli.main(["report", "diverged"])


def test_export_earlier_run(done: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    cli.main(["export", "done", "--to", str(tmp_path / "exported")])
    cli.main(["import", str(tmp_path / "exported"), "--name", "again"])
    ours, theirs = (load_checkpoint(done.parent / name / "checkpoints" / step).model for name, step in (
        ("done", "step_00000008"), ("again", "step_00000000"),
    ))  # fmt: skip
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# -- what the code of tomorrow may do


def test_new_setting_uses_default(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that is added to the model's, the loop's or the state's dataclass has its default in what is there."""
    wider = {
        name: make_dataclass(kind.__name__, [("new", int, field(default=7))], bases=(kind,), frozen=True)
        for name, kind in (("model", config.ModelConfig), ("train", TrainConfig))
    }
    later = make_dataclass(
        "RunConfig",
        [(name, kind, field(default_factory=kind)) for name, kind in wider.items()],
        bases=(RunConfig,),
        frozen=True,
    )
    monkeypatch.setattr(config, "RunConfig", later)
    folder = done / "checkpoints/step_00000008"
    saved = json.loads((folder / "config.json").read_text())
    now = saved_config(saved, folder)
    assert (now.model.new, now.train.new, now.model.n_layers) == (7, 7, 1)
    assert check_resumable(saved, now, folder) == []
    other = replace(now, model=replace(now.model, new=8))
    with pytest.raises(UserError, match=r"model\.new: 7 -> 8"):
        check_resumable(saved, other, folder)


def test_renamed_and_dropped_settings(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint's keys of today become others, in today's place the reverse: old keys in, today's out."""
    now = saved_config(json.loads((done / "config.json").read_text()), "x")
    change = Change(
        renamed={"loop.limit": "train.max_steps", "optim.peak": "optim.max_lr", "sharing": "hub"},
        removed=("train.colour", "music"),
    )
    old = json.loads((done / "config.json").read_text())
    old["loop"], old["optim"]["peak"], old["sharing"] = {"limit": old["train"].pop("max_steps")}, 3e-3, old.pop("hub")
    old["train"]["colour"] = "red"
    old["music"] = {"loud": True}
    del old["optim"]["max_lr"]
    with monkeypatch.context() as patch:
        schema = Schema("config", (*CONFIG.changes, change, Change(removed=("loop",))))
        patch.setattr(config, "CONFIG", schema)
        assert saved_config(old, "x") == now
        assert check_resumable(old, now, Path("x")) == []
        assert to_dict(now)["version"] == schema.version
        assert from_dict({"version": schema.version, "train": {"max_steps": 3}}, now).train.max_steps == 3
    with pytest.raises(UserError, match=r"the config x does not fit:(.|\n)*optim\.peak: unknown key"):
        saved_config(old, "x")


def test_schema_changes_apply_in_order() -> None:
    schema = Schema("thing", (Change({"a": "b"}), Change({"b": "c.d"}), Change({"x": "y", "y": "x"})))
    assert schema.upgrade({"a": 1, "x": 2, "y": 3}) == {"c": {"d": 1}, "y": 2, "x": 3}
    assert schema.upgrade({"version": 2, "a": 1, "b": 2}) == {"a": 1, "c": {"d": 2}}
    assert schema.upgrade({"version": 4, "b": 2, "x": 1}) == {"b": 2, "x": 1}
    assert schema.upgrade({"b": 2, "c": 3}) == {"c": 3}
    given = {"version": 1, "a": {"b": 1}}
    Schema("thing", (Change(removed=("a.b",)),)).upgrade(given)
    assert given == {"version": 1, "a": {"b": 1}}


@pytest.mark.parametrize("name", ["config.json", "state.json"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, r"has version 99, but this program reads versions up to \d+: it was written"),
        ({"version": "2"}, r"is '2', expected an integer"),
        ({"from_tomorrow": 1}, r"unknown.*|from_tomorrow"),
    ],
)
def test_invalid_checkpoint_metadata_raises(
    done: Path, name: str, change: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(done / "checkpoints/step_00000008", name, change)
    for words in (["sample", "done"], ["eval", "done", "--tasks", "speed"], ["export", "done", "--to", "exported"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2
        shown = capsys.readouterr().err
        assert name in shown
        assert re.search(message, shown), shown
        assert len(shown.splitlines()) <= 2
    assert (done / "checkpoints/step_00000008").is_dir()


def test_files_of_later_version_raise(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("diverged/bags/step_00000002/bag.json", "done/heartbeat.json", "done/config.json"):
        path = runs / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    for words in (["replay", "diverged"], ["status", "done"], ["report", "done"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2
        assert "has version 99" in capsys.readouterr().err
    with pytest.raises(UserError, match="has version 99"):
        load_config(runs / "done/config.json", RunConfig())


def test_metrics_rows_upgraded(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from myllm import files
    from myllm.runs import history

    monkeypatch.setattr(files, "ROW", Schema("row", (Change({"grad_norm": "gradient"}),)))
    found = history.read_metrics(done / "metrics.jsonl").train
    assert len(found) == 8
    assert all("gradient" in row and "grad_norm" not in row for row in found)
