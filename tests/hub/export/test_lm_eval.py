"""`lm_eval --model hf` on an exported folder scores as our own model does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.saved_checkpoints import KINDS, Save

from myllm.hub.export.transformers import export_transformers
from myllm.inference.load import LanguageModel, load_model

TASK = """
task: rivers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
QUESTIONS = [
    {"question": f"{a} {b} ran under the", "choices": ["bridge", "old lantern", "é"], "answer": i % 3}
    for i, (a, b) in enumerate((a, b) for a in ("the", "A", "one", "many") for b in ("river", "road", "song"))
]


def our_choice(pair: LanguageModel, question: str, choices: list[str]) -> tuple[int, list[float]]:
    """The likeliest choice by its summed log-probability, and all of these."""
    scores = []
    for choice in choices:
        context, whole = (pair.tokenizer.encode_document(text).tolist() for text in (question, f"{question} {choice}"))
        log_probs, _, _ = pair.model.evaluate(torch.tensor([whole[:-1]]), torch.tensor([whole[1:]]))
        scores.append(float(log_probs[0, len(context) - 1 :].sum()))
    return max(range(len(scores)), key=scores.__getitem__), scores


@pytest.mark.slow
def test_lm_eval_accuracy_matches(save: Save, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = export_transformers(save(KINDS["qwen3"]), tmp_path / "out", say=lambda _: None).folder
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    (tmp_path / "rivers.yaml").write_text(TASK.format(file=tmp_path / "questions.jsonl"))
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32",
         "--tasks", "rivers", "--include_path", tmp_path, "--device", "cpu", "--batch_size", "4", "--log_samples",
         "--output_path", tmp_path / "results"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}, cwd=tmp_path, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3_000:]
    (results,) = (tmp_path / "results").rglob("results_*.json")
    (logged,) = (tmp_path / "results").rglob("samples_*.jsonl")
    samples = sorted(map(json.loads, logged.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    pair, right = load_model("made", "cpu"), 0
    for question, sample in zip(QUESTIONS, samples, strict=True):
        choice, scores = our_choice(pair, question["question"], question["choices"])
        right += choice == question["answer"]
        theirs = [float(response[0][0]) for response in sample["resps"]]
        assert theirs == pytest.approx(scores, abs=1e-3)
    assert 0 < right < len(QUESTIONS)
    acc = json.loads(results.read_text())["results"]["rivers"]["acc,none"]
    assert acc == pytest.approx(right / len(QUESTIONS))
