"""`myllm eval`: its table, its JSON, and what it says where a task cannot be done."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import eval_rows

from myllm import cli, eval_cli
from myllm.config import RunConfig
from myllm.data.prepare import prepare
from myllm.distributed import process_group
from myllm.loading import load_model
from myllm.train import train

OWN = Path(__file__).parent / "evals" / "hellaswag_own.jsonl"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place where the first test leaves its run."""
    return tmp_path_factory.mktemp("trained") / "temp_data"


@pytest.fixture
def run(tiny: RunConfig, temp_data: Path, trained: Path) -> Path:
    """A trained run in a temp_data/ that the test has to itself; trained once."""
    if not trained.exists():
        config = replace(tiny, train=replace(tiny.train, max_steps=4))
        with process_group("cpu") as process:
            train(config, prepare(config.data, progress=False), process)
        shutil.copytree(temp_data, trained)
    else:
        shutil.copytree(trained, temp_data)
    return temp_data / "runs" / "tiny"


def evaluate(*words: object) -> int:
    """The exit code."""
    try:
        cli.main(["eval", *map(str, words), "--device", "cpu"])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_everything_at_once(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "Größe: the river ran under old stone bridge, and the children sang of salt wind. " * 9
    (tmp_path / "own.txt").write_text(text, encoding="utf-8")
    tasks = ("validation", "hellaswag", "cloze", f"perplexity:{tmp_path / 'own.txt'}")
    assert evaluate("tiny", "--tasks", *tasks, "--hellaswag-file", OWN, "--stride", 16) == 0
    said = capsys.readouterr().out
    written = json.loads((run / "eval.json").read_text())
    assert written["step"] == 4
    assert written["checkpoint"] == str(run / "checkpoints" / "step_00000004")
    assert list(written["tasks"]) == list(tasks)
    # The loop's own figures for the same weights.
    for name, task in (("validation", "validation"), ("cloze", "cloze")):
        last = eval_rows(run, name)[-1]
        for key, value in last.items():
            if key not in ("kind", "name", "step", "seconds"):
                assert written["tasks"][task][key] == pytest.approx(value, rel=1e-5), key
    hellaswag = written["tasks"]["hellaswag"]
    assert (hellaswag["n_examples"], hellaswag["protocol"]) == (30, "nanogpt")
    assert f"{hellaswag['acc_norm']:.4f}" in said
    own = written["tasks"][tasks[3]]
    assert (own["context"], own["stride"]) == (64, 16)
    model, tokenizer = load_model("tiny", "cpu")
    n = len(tokenizer.encode(text))
    assert own["n_tokens"] == n
    assert own["bits_per_byte"] == pytest.approx(own["loss"] * n / math.log(2) / len(text.encode()))
    assert {"perplexity", "token_accuracy", "top5_accuracy", "calibration_error"} <= own.keys()
    assert {"top5_accuracy", "calibration_error"} <= written["tasks"]["validation"].keys()
    assert str(run / "eval.json") in said
    assert not model.training


def test_a_text_shorter_than_the_context(run: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the old bridge")
    out = tmp_path / "deep" / "short.json"
    assert evaluate(run, "--tasks", f"perplexity:{tmp_path / 'short.txt'}", "--out", out) == 0
    (figures,) = json.loads(out.read_text())["tasks"].values()
    model, tokenizer = load_model(run, "cpu")
    ids = [tokenizer.end_of_text, *tokenizer.encode("the old bridge").tolist()]
    with torch.no_grad():
        assert figures["loss"] == pytest.approx(
            float(model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))), rel=1e-5
        )


def test_a_checkpoint_and_the_other_protocol(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (run / "checkpoints/step_00000004", "--tasks", "hellaswag", "--hellaswag-file", OWN)
    assert evaluate(*words, "--protocol", "lm-eval", "--hellaswag-examples", 7) == 0
    figures = json.loads((run / "eval.json").read_text())["tasks"]["hellaswag"]
    assert (figures["protocol"], figures["n_examples"]) == ("lm-eval", 7)


def test_a_folder_of_any_name(run: Path, tmp_path: Path) -> None:
    """A checkpoint that was copied elsewhere, such as to another machine."""
    folder = shutil.copytree(run / "checkpoints/step_00000004", tmp_path / "mine")
    assert evaluate(folder, "--tasks", "cloze") == 0
    written = json.loads((folder / "eval.json").read_text())
    assert (written["checkpoint"], written["step"]) == (str(folder), 4)


def test_the_checkpoint_stays_the_same_while_training_saves_others(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_another(*_: object) -> dict:
        shutil.copytree(run / "checkpoints/step_00000004", run / "checkpoints/step_00000009")
        return {"acc": 0.5}

    monkeypatch.setitem(eval_cli.TASKS, "cloze", save_another)
    assert evaluate("tiny", "--tasks", "cloze", "validation") == 0
    assert json.loads((run / "eval.json").read_text())["checkpoint"].endswith("step_00000004")


def test_another_data_set_that_is_damaged_is_no_matter(run: Path) -> None:
    for name, content in (("aaa", "{}"), ("zzz", "not JSON")):
        (run.parent.parent / "datasets" / name).mkdir()
        (run.parent.parent / "datasets" / name / "manifest.json").write_text(content)
    assert evaluate("tiny", "--tasks", "cloze") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tasks", "helaswag"), "unknown task 'helaswag', did you mean 'hellaswag'?"),
        (("--tasks", "perplexity:"), "unknown task 'perplexity:'"),
        (("--tasks", "perplexity:nowhere.txt"), "cannot read nowhere.txt"),
        (("--tasks", "hellaswag", "--hellaswag-file", "nowhere.jsonl"), "no HellaSwag file at nowhere.jsonl"),
        (("--tasks", "cloze", "--dataset", "nowhere"), "no single prepared data set 'nowhere'"),
        (("--batch-size", 0), "batch_size is 0, but must be at least 1"),
        (("--tasks", f"perplexity:{OWN}", "--stride", 65), "the stride is 65, but must be at least 1"),
    ],
)
def test_mistakes(words: tuple, said: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("tiny", *words) == 2
    assert said in capsys.readouterr().err
    assert not (run / "eval.json").exists()


def test_a_task_that_cannot_be_done_stops_no_other(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for manifest in (run.parent.parent / "datasets").glob("*/manifest.json"):
        manifest.rename(manifest.with_name("elsewhere.json"))
    assert evaluate("tiny", "--tasks", "validation", "hellaswag", "--hellaswag-file", OWN) == 2
    assert "validation: the data set that" in capsys.readouterr().err
    assert list(json.loads((run / "eval.json").read_text())["tasks"]) == ["hellaswag"]
