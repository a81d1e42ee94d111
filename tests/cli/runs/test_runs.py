"""`myllm runs`: runs of an earlier version, with their own checkpoints, and processes that hold them."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, launch, losses

from myllm.cli.main import main
from myllm.files import file_lock
from myllm.runs import lifecycle

DATASET = "files-texts-8dafc2bcdf8e"


@pytest.fixture
def runs(temp_data: Path) -> Path:
    """The runs `done` and `diverged`, and their data set."""
    shutil.copytree(ROOT / "tests/earlier/b351187", temp_data)
    return temp_data / "runs"


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    main(["runs", "--json"])
    return {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}


def write_heartbeat(run: Path, **changes: Any) -> None:
    now = time.time()
    values = {
        "step": 8, "doing": "training", "time": now, "progress_time": now, "pid": os.getpid(),
        "host": socket.gethostname(), "how": None, "exit_code": None,
    }  # fmt: skip
    (run / "heartbeat.json").write_text(json.dumps(values | changes))


# -- the list ---------------------------------------------------------------------------------------------------------


def test_list_reports_run_metrics(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = listed(capsys)["done"]
    rows = [json.loads(line) for line in (runs / "done/metrics.jsonl").read_text().splitlines()]
    assert done["train_loss"] == [row["loss"] for row in rows if row["kind"] == "train"][-1]
    assert done["validation_loss"] == [row["loss"] for row in rows if row.get("name") == "validation"][-1]
    assert (done["step"], done["tokens"], done["state"]) == (8, 512, "complete")
    assert done["bytes"] == sum(path.stat().st_size for path in (runs / "done").rglob("*") if path.is_file())


def test_states(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beats: dict[str, dict[str, Any]] = {
        "runs": {},
        "elsewhere": {"host": "another", "pid": 1},
        "silent": {"host": "another", "progress_time": time.time() - 1_000},
        "killed": {"pid": 2**22 + 1},  # above the system's highest process id
        "stopped": {"doing": "ended", "how": "stopped by SIGTERM", "exit_code": 143},
        "crashed": {"doing": "ended", "how": "failed: no", "exit_code": 1},
    }
    for name, beat in beats.items():
        (runs / name).mkdir()
        write_heartbeat(runs / name, **beat)
    (runs / "from-gpt2").mkdir()
    (runs / "from-gpt2/imported.json").write_text("{}")
    (runs / "empty").mkdir()
    states = {name: row["state"] for name, row in listed(capsys).items()}
    assert states == {
        "done": "complete", "diverged": "failed", "runs": "running", "elsewhere": "running",
        "silent": "not responding", "killed": "died", "stopped": "stopped", "crashed": "failed",
        "from-gpt2": "imported", "empty": "not known",
    }  # fmt: skip
    with file_lock(runs / "done/.lock"):
        assert listed(capsys)["done"]["state"] == "running"


def test_table_fits_80_columns(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = {"command": ["python", "pretrain.py", "lf-llm-269m-modern"]}
    (runs / "done/environment.json").write_text(json.dumps(command))
    main(["runs"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert "lf-llm-269m-modern" in next(line for line in lines if line.startswith("done"))


def test_no_runs_and_unknown_subcommand(temp_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["runs"])
    assert "no runs under" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["runs", "lst"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "unknown command 'runs lst'" in error
    assert "did you mean" not in error, "certainly not 'runs delete'"
    main(["runs", "list"])  # as `myllm data list`
    assert "no runs under" in capsys.readouterr().out


# -- delete, rename, archive ------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["runs", *words])
    assert ended.value.code == 2
    return capsys.readouterr().err


def answer(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: word)


def test_removal_requires_confirmation(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(runs)
    for words in (["delete", "done"], ["archive", "done"]):
        assert "give --yes" in refused(capsys, *words)
        answer(monkeypatch, "")
        with pytest.raises(SystemExit) as ended:
            main(["runs", *words])
        assert (ended.value.code, capsys.readouterr().out.endswith("nothing was changed\n")) == (1, True)
        monkeypatch.undo()
        monkeypatch.setenv("MYLLM_DATA", str(runs.parent))
        after = {name: content for name, content in files_of(runs).items() if not name.endswith("lock")}
        assert after == before


def test_delete_runs(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    micro_batch = runs.parent / "micro_batches/done.json"
    micro_batch.parent.mkdir()
    micro_batch.write_text("{}")
    answer(monkeypatch, "y")
    main(["runs", "delete", "done"])
    assert "0.3 MB, step 8, complete" in capsys.readouterr().out
    assert sorted(path.name for path in runs.iterdir()) == ["diverged"]
    assert not micro_batch.exists()
    main(["runs", "delete", "diverged", "--yes"])
    assert not list(runs.iterdir())
    assert "deleted 1 run, 0.1 MB" in capsys.readouterr().out


def test_delete_is_all_or_nothing(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'done'?; known: diverged, done" in refused(capsys, "delete", "diverged", "don", "--yes")
    assert (runs / "diverged/metrics.jsonl").is_file()


@pytest.mark.parametrize("words", [["delete", "done", "--yes"], ["rename", "done", "x"], ["archive", "done", "--yes"]])
def test_run_in_use_not_modified(words: list[str], runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(runs / "done")
    (runs / "done/trackers").mkdir()
    for lock in (".lock", ".publish.lock", "trackers/tensorboard.lock"):
        with file_lock(runs / "done" / lock):
            assert "stop it first" in refused(capsys, *words)
    write_heartbeat(runs / "done", host="another")  # on a file system whose locks don't reach other machines
    assert "in use: its heartbeat is fresh" in refused(capsys, *words)
    before["heartbeat.json"] = (runs / "done/heartbeat.json").read_bytes()
    assert {name: content for name, content in files_of(runs / "done").items() if "lock" not in name} == before


def test_paths_and_links_rejected_as_names(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "elsewhere").mkdir()
    (runs / "link").symlink_to(tmp_path / "elsewhere")
    for name in (str(runs / "done"), "../runs/done", ".", "..", ""):
        assert "no run" in refused(capsys, "delete", name, "--yes")
    assert "is a link to" in refused(capsys, "delete", "link", "--yes")
    assert (tmp_path / "elsewhere").is_dir()
    for name in ("diverged", "a/b", "../x", "-x", "", "n" * 300):
        assert refused(capsys, "rename", "done", name)
    assert (runs / "done/metrics.jsonl").is_file()


def test_renamed_run_resumes(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, checkpoint = losses(runs / "done"), files_of(runs / "done/checkpoints")
    main(["runs", "rename", "done", "other"])
    command = shlex.split(capsys.readouterr().out.partition("resume it with: ")[2])
    assert command[-2:] == ["--name", "other"]
    assert not (runs / "done").exists()
    assert files_of(runs / "other/checkpoints") == checkpoint
    ended = launch("--config", runs / "other/config.json", "--train.max-steps", 9)
    assert ended.returncode == 0, ended.stderr
    assert "resuming from" in ended.stdout
    assert not (runs / "done").exists()
    assert {step: loss for step, loss in losses(runs / "other").items() if step <= 8} == before
    assert max(losses(runs / "other")) == 9
    assert listed(capsys)["other"]["state"] == "complete"


def test_rename_updates_command_and_config() -> None:
    name = lifecycle.with_name
    assert name(["python", "pretrain.py", "debug"], "b") == ["python", "pretrain.py", "debug", "--name", "b"]
    assert name(["p", "--name", "a", "--train.fresh"], "b") == ["p", "--train.fresh", "--name", "b"]
    assert name(["p", "--name=a", "debug"], "b") == ["p", "debug", "--name", "b"]
    config = {"name": "a", "data": {"tokenizer": "runs/a/tokenizer.json", "workers": 1}}
    expected = {"name": "b", "data": {"tokenizer": "runs/b/tokenizer.json", "workers": 1}}
    assert lifecycle.renamed_config(config, "a", "b") == expected


def test_archive_round_trip(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "SMALL_BYTES", 1_000)
    older = runs / "done/checkpoints/step_00000004"
    shutil.copytree(runs / "done/checkpoints/step_00000008", older)
    (runs / "done/profile").mkdir()
    (runs / "done/profile/trace.json").write_bytes(b"x" * 2_000)
    before = files_of(runs / "done")
    kept = {name: content for name, content in before.items() if "step_00000004" not in name and "trace" not in name}
    main(["runs", "archive", "done", "--yes"])
    output = capsys.readouterr().out
    assert "not kept" in output
    assert "checkpoints/step_00000004, profile/trace.json" in output
    assert not (runs / "done").exists()
    assert (runs / "done.tar.gz").is_file()
    main(["runs"])
    assert "archived: done.tar.gz, " in capsys.readouterr().out
    subprocess.run(shlex.split(output.partition("unpack it with: ")[2]), check=True)
    assert files_of(runs / "done") == kept
    main(["checkpoint", "verify", "done"])
    assert "exists already" in refused(capsys, "archive", "done", "--yes")


def test_archive_rejects_damaged_newest_checkpoint(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = runs / "done/checkpoints/step_00000008"
    (newest / "state.json").write_text("{}")
    assert "no checkpoint in" in refused(capsys, "archive", "done", "--yes")
    assert (newest / "manifest.json").is_file()


def test_run_preserved_if_archive_hash_differs(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "file_sha256", lambda path: "another")
    assert "the run is kept" in refused(capsys, "archive", "done", "--yes")
    assert (runs / "done/metrics.jsonl").is_file()
    assert not (runs / "done.tar.gz").exists()


# -- data sets --------------------------------------------------------------------------------------------------------


def refused_data(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["data", *words])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_data_list_shows_datasets_with_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((runs.parent / f"datasets/{DATASET}/manifest.json").read_text())
    (runs.parent / "datasets/begun").mkdir()
    (runs.parent / "datasets/begun/settings.json").write_text("{}")
    main(["data", "list", "--local"])
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith(DATASET))
    train, validation = (manifest["counts"][f"{split}_tokens"] for split in ("train", "val"))
    assert (train, validation) == (8_535, 225)
    assert row.split()[1:] == ["8.54k", "225", "0.0", "MB", "complete", "diverged,", "done"]
    assert next(line for line in lines if line.startswith("begun")).split()[1:4] == ["-", "-", "0.0"]
    assert "2 data sets" in lines[-1]
    with file_lock(runs.parent / "datasets/.begun.lock"):
        main(["data", "list", "--local"])
    assert "begun  " in (output := capsys.readouterr().out)
    assert "being prepared" in output


def test_delete_dataset(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs.parent / "datasets" / DATASET
    assert "give --yes" in refused_data(capsys, "delete", DATASET)
    assert "did you mean" in refused_data(capsys, "delete", DATASET[:-1], "--yes")
    with file_lock(runs / "done/.lock"):
        assert "in use by done" in refused_data(capsys, "delete", DATASET, "--yes")
    with file_lock(folder.parent / f".{DATASET}.lock"):
        assert "is being prepared" in refused_data(capsys, "delete", DATASET, "--yes")
    assert (folder / "manifest.json").is_file()
    main(["data", "delete", DATASET, "--yes"])
    assert "used by diverged, done" in capsys.readouterr().out
    assert not list(folder.parent.iterdir())
