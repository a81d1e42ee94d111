"""A mixture of three sources, killed three times and moved from two ranks to one and back: the receipts of one run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import launch, tiny_config, with_train, write_corpora, write_run_config
from support.fault_runs import receipts

from myllm.cli.prove_resume.training_process import TrainingProcess
from myllm.paths import RunPaths

pytestmark = pytest.mark.slow  # real processes on two ranks

STEPS = 40
SAVE_EVERY = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixture")


@pytest.fixture(scope="module")
def config_file(place: Path) -> Path:
    """The weights change at step 14, between two kills; the smallest source begins its second epoch after that."""
    a, b, c = write_corpora(place / "corpora", a=40, b=25, c=6)
    config = tiny_config(place)
    data = replace(config.data, source=f"{a}:0.5 {b}:0.3 {c}:0.2 @14 {a}:0.25 {c}:0.75", val_tokens=400)
    evals = replace(config.eval, validation_every_steps=12, cloze_every_steps=0, sample_every_steps=0)
    config = with_train(replace(config, data=data, eval=evals), max_steps=STEPS, save_every_steps=SAVE_EVERY)
    return write_run_config(config, place / "mixture.json")


def finish(config_file: Path, name: str) -> dict[int, str]:
    """The receipts of the whole run."""
    done = launch("--config", config_file, "--name", name)
    assert done.returncode == 0, done.stderr
    return receipts(RunPaths.of(name))


def test_killed_three_times_and_moved_between_ranks(
    config_file: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = place / "temp_data"
    data.mkdir()
    monkeypatch.setenv("MYLLM_DATA", str(data))
    whole = finish(config_file, "whole")
    for ranks, step in ((2, 7), (1, 17), (2, 27)):
        training = TrainingProcess.start(config_file, "hit", data, ranks)
        assert training.wait_for_step(step)
        training.kill()
    assert finish(config_file, "hit") == whole
    assert len(set(whole.values())) == STEPS
    rows = [json.loads(line) for line in RunPaths.of("hit").metrics.read_text().splitlines()]
    last = {row["name"]: row for row in rows if row["kind"] == "eval" and row["step"] == STEPS}
    names = ["validation/files-a", "validation/files-b", "validation/files-c"]
    assert sorted(last) == ["validation", *names]
    assert last["validation"]["loss"] == pytest.approx(0.25 * last[names[0]]["loss"] + 0.75 * last[names[2]]["loss"])
    assert sum(last[name]["train_tokens"] for name in names) == STEPS * 128
    assert last[names[2]]["epochs"] > 1
