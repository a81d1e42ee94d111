"""Our figures under lm-eval's protocol are those of lm-evaluation-harness, example by example."""

import json
import random
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from model.test_parity import peer_of, random_model
from transformers import PreTrainedTokenizerFast

from myllm.config import ModelConfig
from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.load import load_tokenizer
from myllm.data.tokenizer.train import train_tokenizer
from myllm.distributed.collectives import DistContext
from myllm.evals.choice import (
    TokenizedQuestion,
    choice_sums,
    ending_log_probs,
    finish,
    finish_last_word,
    last_word_log_probs,
    last_word_sums,
    tokenize_questions,
)
from myllm.evals.examples import load_questions
from myllm.evals.tasks import TASKS
from myllm.model.transformer import Transformer
from myllm.runs.history import TASK_TITLES

OWN = Path(__file__).with_name("hellaswag_own.jsonl")
CPU = torch.device("cpu")
ALONE = DistContext(0, 0, 1, CPU)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [text for row in load_questions("hellaswag", OWN) for text in (*row.contexts, *row.endings)]
    return load_tokenizer(
        train_tokenizer(texts, 600, tmp_path_factory.mktemp("own") / "tokenizer.json", progress=False)
    )


def exported(model: Transformer, tokenizer: Tokenizer, folder: Path) -> Path:
    """The model as transformers would open it."""
    peer_of(model).save_pretrained(folder)
    end = tokenizer.decode([tokenizer.end_of_text])
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.file), bos_token=end, eos_token=end, pad_token=end)
    reference.save_pretrained(folder)
    return folder


def by_the_harness(folder: Path, tasks: dict[str, tuple[str, str, Path]], batch_size: int) -> dict[str, Any]:
    """What lm_eval's own tasks make of our rows, by our names of the tasks.

    Args:
        tasks: the path of the harness's YAML file, the split that it uses, and a file of rows.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (folder / "tasks").mkdir()
    for name, (yaml, split, rows) in tasks.items():
        # Its own task to the letter, but for where the rows come from.
        task = {
            "include": str(files("lm_eval") / "tasks" / yaml),
            "task": f"own_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(rows)}, "cache_dir": str(folder / "cache")},
            "training_split": None,
            "validation_split": split if split == "validation" else None,
            "test_split": split if split == "test" else None,
        }
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    harness = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch_size)
    names = [f"own_{name}" for name in tasks]
    return simple_evaluate(model=model, tasks=names, task_manager=harness, bootstrap_iters=2)


def small_model(tokenizer: Tokenizer, window: int) -> Transformer:
    return random_model(
        ModelConfig(
            vocab_size=tokenizer.vocab_size, max_seq_len=window, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2,
            d_ff=48,
        )
    )  # fmt: skip


def tokenize(name: str, file: Path, tokenizer: Tokenizer, window: int) -> list[TokenizedQuestion]:
    return tokenize_questions(load_questions(name, file), tokenizer.encode, tokenizer.end_of_text, window)


def check_choices(name: str, model: Transformer, tokenized: list[TokenizedQuestion], reference: dict[str, Any]) -> None:
    """Compare log-probabilities, right and wrong answers, and metrics with those of lm-eval."""
    actual = dict(ending_log_probs(model.score_continuations, tokenized, ALONE))
    samples = sorted(reference["samples"][f"own_{name}"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(tokenized)
    results = reference["results"][f"own_{name}"]
    for number, sample in enumerate(samples):
        expected = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert actual[number].tolist() == pytest.approx(expected, abs=5e-4)
        assert float(actual[number].argmax() == tokenized[number].answer) == sample["acc"]
        by_length = actual[number] / torch.tensor(tokenized[number].lengths)
        if "acc_norm" in sample:
            assert float(by_length.argmax() == tokenized[number].answer) == sample["acc_norm"]
    metrics = finish(choice_sums(model.score_continuations, tokenized, ALONE))
    for metric in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        if f"{metric},none" in results:
            assert metrics[metric] == pytest.approx(results[f"{metric},none"], abs=1e-12)
    assert 0 < metrics["acc"] < 1


@pytest.mark.parametrize("window", [256, 64], ids=["fits", "some are cut"])
def test_hellaswag(window: int, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = small_model(tokenizer, window)
    tasks = {"hellaswag": ("hellaswag/hellaswag.yaml", "validation", OWN)}
    reference = by_the_harness(exported(model, tokenizer, tmp_path), tasks, 4)
    tokenized = tokenize("hellaswag", OWN, tokenizer, window)
    assert any(len(item.contexts) > 1 for item in tokenized) == (window == 64)
    check_choices("hellaswag", model, tokenized, reference)


# -- the other tasks, on rows made here -------------------------------------------------------------------------------

HARNESS = {
    "arc-easy": ("arc/arc_easy.yaml", "test"),
    "arc-challenge": ("arc/arc_challenge.yaml", "test"),
    "piqa": ("piqa/piqa.yaml", "validation"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "test"),
    "winogrande": ("winogrande/default.yaml", "validation"),
    "lambada": ("lambada/lambada_openai.yaml", "test"),
}
WORDS = "the river ran under old stone bridge children counted boats and sang of salt wind Größe 3.5 (quiet)"


def rows_of(name: str, chance: random.Random) -> list[dict]:
    """Rows in the data set's format, with what its real rows have: three to five choices, labels in letters and digits,
    spaces at the ends of texts, a gap as the first word."""

    def text(least: int, most: int) -> str:
        return " ".join(chance.choice(WORDS.split()) for _ in range(chance.randint(least, most)))

    rows = []
    for number in range(20):
        labels = ("1234" if number % 3 == 0 else "ABCDE")[: chance.randint(3, 5)]
        choices = {"text": [text(1, 9) for _ in labels], "label": list(labels)}
        answer, space = chance.choice(labels), " " * (number % 4 == 0)
        if name.startswith("arc"):
            rows.append({"id": str(number), "question": text(4, 30) + space, "choices": choices, "answerKey": answer})
        elif name == "openbookqa":
            rows.append({"question_stem": text(2, 20) + space, "choices": choices, "answerKey": space + answer})
        elif name == "piqa":
            rows.append(
                {"goal": text(3, 20) + space, "sol1": text(1, 12), "sol2": space + text(1, 12), "label": number % 2}
            )
        elif name == "winogrande":
            before = "" if number == 0 else text(3, 15) + " "
            sentence = f"{before}_ {text(1, 12)}." if number % 5 else f"{before}_."
            rows.append(
                {"sentence": sentence, "option1": text(1, 2), "option2": text(1, 1), "answer": str(1 + number % 2)}
            )
        else:
            rows.append({"text": f"“{text(3, 40)}”{space} {text(2, 9)}\n\n{text(1, 3)}{' the' * (number % 3 > 0)}"})
    return rows


def prefer(word: str, model: Transformer, tokenizer: Tokenizer) -> None:
    """Make a word's logits so large that it is the greedy choice wherever they are positive."""
    (token,) = tokenizer.encode(word)
    with torch.no_grad():
        model.head_weight[int(token)] *= 30


@pytest.mark.slow
@pytest.mark.parametrize("window", [256, 48], ids=["fits", "some are cut"])
def test_other_tasks_match_lm_eval(
    window: int, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = small_model(tokenizer, window)
    prefer(" the", model, tokenizer)
    chance, tasks = random.Random(0), {}
    for name, (yaml, split) in HARNESS.items():
        rows, file = rows_of(name, chance), tmp_path / f"{name}.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        tasks[name] = (yaml, split, file)
    reference = by_the_harness(exported(model, tokenizer, tmp_path), tasks, 4)
    for name, (_, _, file) in tasks.items():
        tokenized = tokenize(name, file, tokenizer, window)
        if name == "lambada":
            check_last_words(model, tokenized, reference)
        else:
            check_choices(name, model, tokenized, reference)


def check_last_words(model: Transformer, tokenized: list[TokenizedQuestion], reference: dict[str, Any]) -> None:
    samples = sorted(reference["samples"]["own_lambada"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(tokenized)
    for number, log_prob, is_greedy in last_word_log_probs(model.evaluate, tokenized, ALONE):
        ((expected, expected_greedy),) = samples[number]["filtered_resps"]
        assert log_prob == pytest.approx(float(expected), abs=5e-4)
        assert is_greedy == (str(expected_greedy) == "True")
    metrics = finish_last_word(last_word_sums(model.evaluate, tokenized, ALONE))
    results = reference["results"]["own_lambada"]
    assert metrics["acc"] == pytest.approx(results["acc,none"], abs=1e-12)
    assert metrics["acc_stderr"] == pytest.approx(results["acc_stderr,none"], abs=1e-12)
    assert metrics["perplexity"] == pytest.approx(results["perplexity,none"], rel=1e-3)
    assert 0 < metrics["acc"] < 1


def test_every_task_has_a_title_and_a_reference() -> None:
    assert TASKS.keys() == TASK_TITLES.keys(), "reports show the tasks of TASK_TITLES (src/myllm/runs/history.py)"
    assert TASKS.keys() - {"hellaswag"} == HARNESS.keys(), "HARNESS names lm-eval's own task; `rows_of` makes its rows"


def test_task_table_matches_lm_eval() -> None:
    """Repositories, configs and splits."""
    for name, (yaml, split) in (HARNESS | {"hellaswag": ("hellaswag/hellaswag.yaml", "validation")}).items():
        text = (files("lm_eval") / "tasks" / yaml).read_text()
        config = dict(
            line.split(": ", 1) for line in text.splitlines() if line.startswith(("dataset_", f"{split}_split"))
        )
        repo, *config_name, task_split = TASKS[name].source.split(":")
        if name != "arc-challenge":  # includes the other one
            assert repo.partition("@")[0] == config["dataset_path"]
            assert config[f"{split}_split"] == split
        assert task_split == split
        assert config_name == [found for found in [config.get("dataset_name", "null")] if found != "null"]
