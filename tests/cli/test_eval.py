"""`myllm eval`: its table, its JSON, and what it says where a task cannot be done."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import eval_rows
from support.saved_checkpoints import rewrite

from myllm.cli import main as cli
from myllm.config import RunConfig
from myllm.data.prepare.prepare import prepare
from myllm.distributed.collectives import process_group
from myllm.errors import UserError
from myllm.evals import registry, sample_quality
from myllm.evals import speed as speed_module
from myllm.evals.registry import Evaluation
from myllm.evals.tasks import TASKS
from myllm.inference.load import load_model
from myllm.runs import eval_results
from myllm.runs.eval_results import Result, add, read
from myllm.training.loop import train

OWN = Path(__file__).parents[1] / "evals" / "hellaswag_own.jsonl"


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


def test_task_metrics_match_training(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "Größe: the river ran under old stone bridge, and the children sang of salt wind. " * 9
    (tmp_path / "own.txt").write_text(text, encoding="utf-8")
    tasks = ("validation", "hellaswag", "cloze", f"perplexity:{tmp_path / 'own.txt'}")
    assert evaluate("tiny", "--tasks", *tasks, "--hellaswag-file", OWN, "--stride", 16) == 0
    output = capsys.readouterr().out
    saved = read(run / "eval.json")
    assert {(result.step, result.weights) for result in saved} == {(4, "float32")}
    assert {result.checkpoint for result in saved} == {str(run / "checkpoints" / "step_00000004")}
    assert [result.task for result in saved] == list(tasks)
    metrics = {result.task: result.metrics for result in saved}
    # The loop's own metrics for the same weights.
    for name, task in (("validation", "validation"), ("cloze", "cloze")):
        last = eval_rows(run, name)[-1]
        for key, value in last.items():
            if key not in ("kind", "name", "step", "seconds", "protocol"):
                assert metrics[task][key] == pytest.approx(value, rel=1e-5), key
    assert saved[2].settings["protocol"] == last["protocol"] == 2
    hellaswag = metrics["hellaswag"]
    assert hellaswag["n_examples"] == 30
    assert saved[1].settings == {"protocol": "nanogpt", "examples": "all", "file": str(OWN)}
    assert f"{hellaswag['acc_norm']:.4f}" in output
    own, settings = metrics[tasks[3]], saved[3].settings
    assert (settings["context"], settings["stride"]) == (64, 16)
    model, tokenizer = load_model("tiny", "cpu")
    n = len(tokenizer.encode(text))
    assert own["n_tokens"] == n
    assert own["bits_per_byte"] == pytest.approx(own["loss"] * n / math.log(2) / len(text.encode()))
    assert {"perplexity", "token_accuracy", "top5_accuracy", "calibration_error"} <= own.keys()
    assert {"top5_accuracy", "calibration_error"} <= metrics["validation"].keys()
    assert str(run / "eval.json") in output
    assert not model.training


def test_public_tasks_and_summary(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("winogrande", "lambada")}
    for name, file in files.items():
        row = TASKS[name].sample | ({"text": "the children waved at boats"} if name == "lambada" else {})
        file.write_text(f"{json.dumps(row)}\n" * 4)
    tasks = [f"{name}:{file}" for name, file in files.items()]
    words = ("--tasks", "hellaswag", *tasks, "--hellaswag-file", OWN)
    assert evaluate("tiny", *words, "--protocol", "lm-eval", "--tasks-examples", 3) == 0
    output = capsys.readouterr().out
    hellaswag, winogrande, lambada, summary = read(run / "eval.json")
    assert [result.task for result in (hellaswag, winogrande, lambada)] == ["hellaswag", *tasks]
    assert winogrande.settings | {"protocol": "lm-eval", "examples": 3} == winogrande.settings
    assert len(winogrande.settings["data_sha256"]) == 12
    assert (winogrande.metrics["chance"], winogrande.metrics["n_examples"]) == (0.5, 3)
    assert lambada.metrics["perplexity"] > 1
    accuracies = hellaswag.metrics["acc_norm"], winogrande.metrics["acc"], lambada.metrics["acc"]
    centered = [(accuracies[0] - 0.25) / 0.75, 2 * accuracies[1] - 1, accuracies[2]]
    assert summary.task == "summary"
    assert summary.metrics["centered_mean"] == pytest.approx(sum(centered) / 3)
    assert summary.settings.keys() == {"hellaswag", *tasks}
    assert f"{summary.metrics['centered_mean']:.4f}" in output
    # The same question again replaces all four.
    assert evaluate("tiny", *words, "--protocol", "lm-eval", "--tasks-examples", 3) == 0
    assert len(read(run / "eval.json")) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", "arc_easy"), "unknown task 'arc_easy', did you mean 'arc-easy'?"),
        (("--tasks", "piqa:nowhere.jsonl"), "no piqa file at nowhere.jsonl"),
        (("--tasks", f"piqa:{OWN}"), "expected the fields goal, sol1, sol2, label, as in {"),
        (("--tasks", "piqa", "--tasks-examples", "0"), "tasks_examples is 0, but must be at least 1"),
    ],
)
def test_invalid_public_task_arguments_rejected(
    words: tuple[str, ...], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("tiny", *words) == 2
    assert message in capsys.readouterr().err


def test_perplexity_of_text_shorter_than_context(run: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the old bridge")
    out = tmp_path / "deep" / "short.json"
    assert evaluate(run, "--tasks", f"perplexity:{tmp_path / 'short.txt'}", "--out", out) == 0
    (result,) = read(out)
    model, tokenizer = load_model(run, "cpu")
    ids = [tokenizer.end_of_text, *tokenizer.encode("the old bridge").tolist()]
    with torch.no_grad():
        assert result.metrics["loss"] == pytest.approx(
            float(model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))), rel=1e-5
        )


def test_checkpoint_path_with_lm_eval_protocol(run: Path) -> None:
    words = (run / "checkpoints/step_00000004", "--tasks", "hellaswag", "--hellaswag-file", OWN)
    assert evaluate(*words, "--protocol", "lm-eval", "--hellaswag-examples", 7) == 0
    (result,) = read(run / "eval.json")
    assert (result.settings["protocol"], result.metrics["n_examples"]) == ("lm-eval", 7)


def test_results_added_or_replaced(run: Path, tmp_path: Path) -> None:
    """Another task, protocol, text, kind of weights or step stands beside; the same question again, in its place."""
    text = tmp_path / "own.txt"
    text.write_text("the old bridge")
    hellaswag = ("--tasks", "hellaswag", "--hellaswag-file", OWN, "--hellaswag-examples", 2)
    perplexity = ("--tasks", f"perplexity:{text}")
    assert evaluate("tiny", *hellaswag) == 0
    assert evaluate("tiny", *hellaswag, "--protocol", "lm-eval") == 0
    assert evaluate("tiny", *perplexity) == 0
    before = read(run / "eval.json")
    text.write_text("the old river")
    assert evaluate("tiny", *perplexity) == 0
    assert evaluate("tiny", *perplexity, "--int8") == 0
    newer = shutil.copytree(run / "checkpoints/step_00000004", run / "checkpoints/step_00000009")
    rewrite(newer, "state.json", {"step": 9})
    assert evaluate(newer, *hellaswag) == 0
    assert evaluate("tiny", *hellaswag, "--protocol", "lm-eval", "--out", run / "eval.json") == 0
    after = read(run / "eval.json")
    summary = [(result.task.partition(":")[0], result.settings.get("protocol"), result.weights) for result in after]
    assert summary == [
        ("hellaswag", "nanogpt", "float32"), ("hellaswag", "lm-eval", "float32"), ("perplexity", None, "float32"),
        ("perplexity", None, "float32"), ("perplexity", None, "int8"), ("hellaswag", "nanogpt", "float32"),
        ("hellaswag", "lm-eval", "float32"),
    ]  # fmt: skip
    assert after[:3] == before
    assert after[2].metrics != after[3].metrics != after[4].metrics
    again = after[1]._replace(seconds=0.0, metrics={"acc": 2})
    add(run / "eval.json", again)
    assert read(run / "eval.json") == [after[0], again, *after[2:]]


def test_version_1_results_file_loads(tmp_path: Path) -> None:
    rest = {"checkpoint": "c", "step": 4, "weights": "float32", "settings": {}, "device": "cpu", "seconds": 1.0}
    tasks = {"quantisation": "quantization", "quantisation:quantisation": "quantization:quantisation", "cloze": "cloze"}
    old = [{"task": task, "figures": {"acc": 0.5}, **rest} for task in tasks]
    (tmp_path / "eval.json").write_text(json.dumps({"format": "myllm-eval", "version": 1, "results": old}))
    expected = [Result(task=task, metrics={"acc": 0.5}, **rest) for task in tasks.values()]
    assert read(tmp_path / "eval.json") == expected
    add(tmp_path / "eval.json", expected[0])
    assert json.loads((tmp_path / "eval.json").read_text())["version"] == 2
    assert read(tmp_path / "eval.json") == expected


def test_unrecognized_results_file_preserved(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ('{"tasks": {}}', "not JSON", "[]"):
        (run / "eval.json").write_text(content)
        assert evaluate("tiny", "--tasks", "cloze") == 2
        assert "is not a result file of `myllm eval`" in capsys.readouterr().err
        assert (run / "eval.json").read_text() == content


def test_checkpoint_folder_with_any_name(run: Path, tmp_path: Path) -> None:
    """A checkpoint that was copied elsewhere, such as to another machine."""
    folder = shutil.copytree(run / "checkpoints/step_00000004", tmp_path / "mine")
    assert evaluate(folder, "--tasks", "cloze") == 0
    (result,) = read(folder / "eval.json")
    assert (result.checkpoint, result.step) == (str(folder), 4)


def test_tasks_share_checkpoint_during_training(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_another(*_: object) -> Evaluation:
        shutil.copytree(run / "checkpoints/step_00000004", run / "checkpoints/step_00000009")
        return Evaluation({}, lambda model: 0.5, lambda acc: {"acc": acc})

    monkeypatch.setitem(registry.EVALUATIONS, "cloze", save_another)
    assert evaluate("tiny", "--tasks", "cloze", "validation") == 0
    assert all(result.checkpoint.endswith("step_00000004") for result in read(run / "eval.json"))


def test_unrelated_damaged_datasets_ignored(run: Path) -> None:
    for name, content in (("aaa", "{}"), ("zzz", "not JSON")):
        (run.parent.parent / "datasets" / name).mkdir()
        (run.parent.parent / "datasets" / name / "manifest.json").write_text(content)
    assert evaluate("tiny", "--tasks", "cloze") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", "helaswag"), "unknown task 'helaswag', did you mean 'hellaswag'?"),
        (("--tasks", "perplexity:"), "unknown task 'perplexity:'"),
        (("--tasks", "perplexity:nowhere.txt"), "cannot read nowhere.txt"),
        (("--tasks", "hellaswag", "--hellaswag-file", "nowhere.jsonl"), "no hellaswag file at nowhere.jsonl"),
        (("--tasks", "generation", "--dataset", "nowhere"), "no prepared data set 'nowhere'"),
        (("--tasks", "quantization:"), "unknown task 'quantization:'"),
        (("--tasks", "speed:x"), "unknown task 'speed:x'"),
        (("--tasks", "cloze", "--dataset", "nowhere"), "no prepared data set 'nowhere'"),
        (("--batch-size", 0), "batch_size is 0, but must be at least 1"),
        (("--tasks", f"perplexity:{OWN}", "--stride", 65), "the stride is 65, but must be at least 1"),
    ],
)
def test_invalid_arguments_rejected(words: tuple, message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("tiny", *words) == 2
    assert message in capsys.readouterr().err
    assert not (run / "eval.json").exists()


def test_failed_task_does_not_stop_others(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for manifest in (run.parent.parent / "datasets").glob("*/manifest.json"):
        manifest.rename(manifest.with_name("elsewhere.json"))
    assert evaluate("tiny", "--tasks", "validation", "hellaswag", "--hellaswag-file", OWN) == 2
    assert "validation: the training data of" in capsys.readouterr().err
    assert [result.task for result in read(run / "eval.json")] == ["hellaswag"]


def test_unwritable_run_still_evaluated(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's: the figures are shown first, then it is said where they could not be kept."""

    def refuse(file: Path, result: Result) -> None:
        raise UserError(f"cannot write {file}: Permission denied; give another file with --out")

    monkeypatch.setattr("myllm.cli.eval.unwritable_reason", lambda file: "Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(eval_results, "add", refuse)
        assert evaluate("tiny", "--tasks", "validation", "cloze") == 2
    output = capsys.readouterr()
    assert "perplexity" in output.out
    assert "acc_blind" in output.out
    assert "eval.json (Permission denied): results are only printed; --out saves them" in output.err
    assert "cloze was printed, but not saved: cannot write" in output.err
    assert evaluate("tiny", "--tasks", "cloze", "--out", tmp_path / "mine.json") == 0
    assert read(tmp_path / "mine.json")[0].task == "cloze"


@pytest.mark.parametrize("out", ["file/eval.json", "", "/proc/nothing/eval.json"])
def test_unwritable_output_fails_before_evaluation(
    out: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert evaluate("tiny", "--tasks", "cloze", "--out", tmp_path / out) == 2
    output = capsys.readouterr().err
    assert "evaluating" not in output
    assert "give another file with --out" in output


def test_unavailable_hellaswag_fails_only_if_named(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object) -> None:
        raise UserError("could not download HellaSwag")

    monkeypatch.setitem(registry.EVALUATIONS, "hellaswag", unreachable)
    assert evaluate("tiny") == 0
    assert "skipped hellaswag: could not download HellaSwag" in capsys.readouterr().err
    assert [result.task for result in read(run / "eval.json")] == ["validation", "cloze"]
    assert evaluate("tiny", "--tasks", "validation", "hellaswag") == 2
    assert "hellaswag: could not download HellaSwag" in capsys.readouterr().err


def test_results_saved_incrementally(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setitem(registry.EVALUATIONS, "speed", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        evaluate("tiny", "--tasks", "cloze", "speed")
    assert [result.task for result in read(run / "eval.json")] == ["cloze"]


def test_generation_speed_and_quantization(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_quality, "SAMPLES_PER_PROMPT", 1)
    monkeypatch.setattr(sample_quality, "NEW_TOKENS", 12)
    monkeypatch.setattr(speed_module, "NEW_TOKENS", 8)
    assert evaluate("tiny", "--tasks", "generation", "speed", "quantization", f"quantization:{OWN}") == 0
    output = capsys.readouterr().out
    generation, speed, quantization, of_a_file = read(run / "eval.json")
    assert generation.settings | {"seed": 0, "temperature": 0.8} == generation.settings
    assert generation.metrics["n_samples"] == generation.settings["prompts"] * generation.settings["samples"]
    assert generation.metrics["distinct_1_of_held_out"] > 0
    assert {"device", "dtype", "threads"} <= speed.settings.keys()
    assert all(value > 0 for value in speed.metrics.values())
    assert {f"{phase}_tokens_per_s_{batch}" for phase in ("prefill", "decode") for batch in (1, 16)} <= (
        speed.metrics.keys()
    )
    model, _ = load_model("tiny", "cpu")
    assert speed.metrics["weights_mb"] == 4 * sum(map(torch.Tensor.numel, model.parameters())) / 1e6
    last = eval_rows(run, "validation")[-1]
    assert quantization.metrics["perplexity_float"] == pytest.approx(last["perplexity"], rel=1e-5)
    for result in (quantization, of_a_file):
        metrics = result.metrics
        cost = metrics["perplexity_int8"] - metrics["perplexity_float"]
        assert metrics["perplexity_cost"] == cost
        assert 0 < abs(cost) < 0.01 * metrics["perplexity_float"]
        # d_model is 16 here: a scale and a zero beside 16 weights.
        assert 3 < metrics["weights_mb_float"] / metrics["weights_mb_int8"] < 4
        assert min(metrics["decode_tokens_per_s_float"], metrics["decode_tokens_per_s_int8"]) > 0
    assert f"{quantization.metrics['perplexity_cost']:.4f}" in output
    # The model that was compared is left as it was, and int8 against itself is refused.
    assert evaluate("tiny", "--tasks", "quantization", "--int8") == 2
    assert "remove --int8" in capsys.readouterr().err
