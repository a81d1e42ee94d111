"""HellaSwag and the other public tasks while training: measured when it is due, and never the reason that a run stops.

tests/distributed has two ranks give the same figures as one.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import eval_rows, launch, train_rows, write_run_config
from support.hub_server import HubServer
from support.public_tasks import publish_task

from myllm.config import RunConfig
from myllm.data.prepare.prepare import prepare
from myllm.distributed.collectives import process_group
from myllm.errors import UserError
from myllm.evals import examples
from myllm.evals.tasks import TASKS
from myllm.paths import RunPaths
from myllm.training.loop import train

pytestmark = pytest.mark.usefixtures("prepared_data")

OWN = Path(__file__).with_name("hellaswag_own.jsonl")


def with_hellaswag(config: RunConfig, **changes: object) -> RunConfig:
    """Two steps, HellaSwag before, between and after, and nothing else."""
    others = {"validation_every_steps": 0, "cloze_every_steps": 0, "sample_every_steps": 0}
    settings = others | {"hellaswag_every_steps": 1, "hellaswag_file": str(OWN), "hellaswag_examples": 9} | changes
    train = replace(config.train, max_steps=2, save_every_steps=0)
    return replace(config, train=train, eval=replace(config.eval, **settings))


def run(config: RunConfig) -> Path:
    with process_group("cpu") as process:
        return train(config, prepare(config.data, progress=False), process).run.root


def test_hellaswag_rows_logged(tiny: RunConfig):
    rows = eval_rows(run(with_hellaswag(tiny)), "hellaswag")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert {"acc", "acc_norm", "acc_stderr", "acc_norm_stderr", "seconds"} <= row.keys()
        assert row["n_examples"] == 9


def test_public_tasks(tiny: RunConfig, tmp_path: Path):
    """`eval.tasks` beside HellaSwag, on their own steps; one whose file is wrong is skipped."""
    files = {}
    for name in ("arc-easy", "lambada"):
        files[name] = tmp_path / f"{name}.jsonl"
        row = TASKS[name].sample | ({"text": "the children waved at boats"} if name == "lambada" else {})
        files[name].write_text(f"{json.dumps(row)}\n" * 5)
    tasks = (f"arc-easy:{files['arc-easy']}", f"lambada:{files['lambada']}", f"piqa:{files['lambada']}")
    root = run(with_hellaswag(tiny, tasks=tasks, tasks_every_steps=2, tasks_examples=4))
    assert [row["step"] for row in eval_rows(root, "hellaswag")] == [0, 1, 2]
    for name in files:
        assert [(row["step"], row["n_examples"]) for row in eval_rows(root, name)] == [(0, 4), (2, 4)]
    assert "piqa skipped: " in (log := (root / "log.txt").read_text())
    assert "expected the fields goal, sol1, sol2, label" in log


def no_examples(*_: object) -> list:
    raise UserError("could not download HellaSwag: no network")


def test_training_continues_without_hellaswag(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(examples, "load_questions", no_examples)
    root = run(with_hellaswag(tiny, hellaswag_file=None))
    assert len(train_rows(root)) == 2
    assert eval_rows(root, "hellaswag") == []
    lines = [line for line in (root / "log.txt").read_text().splitlines() if "hellaswag" in line.lower()]
    assert len(lines) == 1
    assert "hellaswag skipped: could not download HellaSwag: no network" in lines[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hellaswag_file": "nowhere.jsonl"}, "no hellaswag file at nowhere.jsonl"),
        ({}, "hellaswag skipped: an ending of example 0 has"),
    ],
)
def test_failed_evaluation_logged(changes: dict, message: str, tiny: RunConfig):
    config = with_hellaswag(tiny, **changes)
    if not changes:
        config = replace(config, model=replace(config.model, max_seq_len=8))
    root = run(config)
    assert message in (root / "log.txt").read_text()
    assert len(train_rows(root)) == 2


def test_hellaswag_disabled(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch):
    def never(*_: object) -> list:
        raise AssertionError

    monkeypatch.setattr(examples, "load_questions", never)
    assert "HellaSwag" not in (run(with_hellaswag(tiny, hellaswag_every_steps=0)) / "log.txt").read_text()


@pytest.mark.slow
def test_single_rank_downloads(tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The requests that one process sends alone, not twice as many, and none at the second start."""
    with HubServer() as hub, hub.reached(monkeypatch, tmp_path / "home"):
        publish_task(hub, "piqa", [TASKS["piqa"].sample] * 5)
        code = "from myllm.evals.examples import load_questions; assert len(load_questions('piqa')) == 5"
        own = {"HF_HOME": str(tmp_path / "own home"), "MYLLM_DATA": str(tmp_path / "own data")}
        subprocess.run([sys.executable, "-c", code], env=os.environ | own, check=True)
        alone = [f"{one.method} {one.path}" for one in hub.seen("piqa")]
        config = with_hellaswag(tiny, hellaswag_every_steps=0, tasks=("piqa",), tasks_every_steps=1)
        file = write_run_config(config, tmp_path / "config.json")
        for seen in (alone, []):
            hub.requests.clear()
            done = launch("--config", file, "--train.fresh", ranks=2)
            assert done.returncode == 0, done.stderr
            sent = [f"{one.method} {one.path}" for one in hub.seen("piqa")]
            assert set(sent) == set(seen)
            assert len(sent) < max(2 * len(seen), 1)  # a slow answer is asked for again
            rows = eval_rows(RunPaths.of("tiny").root, "piqa")
            assert [(row["step"], row["n_examples"]) for row in rows] == [(0, 5), (1, 5), (2, 5)]
