"""HellaSwag and other public multiple-choice tasks: where their rows are, and how a row becomes a question.

HellaSwag has a second protocol. They give different numbers for the same model:

    nanogpt    the text unchanged; " " + ending tokenized separately; acc_norm by the mean log-probability per token.
               Source: hellaswag.py of build-nanogpt and of llm.c. GPT-2 124M: acc_norm 29.5 %.
    lm-eval    the activity label first, bracketed remarks removed; text and ending tokenized together; acc_norm by the
               log-probability per character. Source: lm-evaluation-harness, task hellaswag. GPT-2 124M: acc 28.9 %,
               acc_norm 31.1 %.

To add a task, write a function from a row to a Question and put a Task into TASKS.

Data: HellaSwag (arXiv 1905.07830), ARC (1803.05457), PIQA (1911.11641), OpenBookQA (1809.02789), WinoGrande
(1907.10641), LAMBADA (1606.06031) as OpenAI prepared it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Protocol = Literal["nanogpt", "lm-eval"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A text and its possible endings. A space joins them."""

    contexts: tuple[str, ...]
    """One for all endings, or one for each."""
    endings: tuple[str, ...]
    answer: int
    """Index of the correct ending."""


@dataclass(frozen=True)
class Task:
    """A data set and its questions."""

    source: str
    """On the Hub: NAMESPACE/NAME[@REVISION][:CONFIG]:SPLIT, as after `datasets:` in `--data.source`."""
    n_examples: int
    question: Callable[[Row], Question]
    """Raises ValueError for a row whose values are impossible."""
    sample: Row
    """A made-up row with the fields that `question` reads."""
    is_last_word: bool = False
    """The answer is the only ending: count how often the model's greedy choice is it."""


# -- from rows to questions -------------------------------------------------------------------------------------------


def hellaswag_question(row: Row) -> Question:
    """By lm-eval's protocol."""
    context = _clean_text(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    endings = [_clean_text(ending) for ending in row["endings"]]
    return Question((context,), tuple(endings), _index(str(row["label"]), "label", "0123"[: len(row["endings"])]))


def nanogpt_hellaswag_question(row: Row) -> Question:
    """By the protocol of build-nanogpt and llm.c."""
    return Question(
        (row["ctx"],), tuple(row["endings"]), _index(str(row["label"]), "label", "0123"[: len(row["endings"])])
    )


def _clean_text(text: str) -> str:
    """Remove the markup of WikiHow pages."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def arc_question(row: Row) -> Question:
    choices = row["choices"]
    answer = _index(row["answerKey"], "answerKey", choices["label"])
    return Question((f"Question: {row['question']}\nAnswer:",), tuple(choices["text"]), answer)


def openbookqa_question(row: Row) -> Question:
    choices = row["choices"]
    answer = _index(row["answerKey"].lstrip(), "answerKey", choices["label"])
    return Question((row["question_stem"],), tuple(choices["text"]), answer)


def piqa_question(row: Row) -> Question:
    answer = _index(str(row["label"]), "label", "01")
    return Question((f"Question: {row['goal']}\nAnswer:",), (row["sol1"], row["sol2"]), answer)


def winogrande_question(row: Row) -> Question:
    """The common ending after each option. Its log-probability says which option it suits."""
    before, gap, after = row["sentence"].partition("_")
    if not gap:
        raise ValueError(f"the sentence {row['sentence']!r} has no gap _")
    contexts = before + row["option1"], before + row["option2"]
    return Question(contexts, (after.strip(),) * 2, _index(row["answer"], "answer", "12"))


def lambada_question(row: Row) -> Question:
    context, _, word = row["text"].rpartition(" ")
    return Question((context,), (word,), 0)


def _index(value: str, name: str, expected: Sequence[str]) -> int:
    if value not in list(expected):
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(expected)}; test splits may have no labels")
    return list(expected).index(value)


# -- the table --------------------------------------------------------------------------------------------------------

CHOICES = {"text": ["the river", "an old bridge", "the wind", "a lantern in the window"], "label": ["A", "B", "C", "D"]}
STORY = "the river ran under the old stone bridge while " * 12

TASKS = {
    "hellaswag": Task(
        "Rowan/hellaswag@218ec52e09a7e7462a5400043bb9a69a41d06b76:validation", 10_042, hellaswag_question,
        # As long as the longer rows.
        {
            "activity_label": "Walking", "ctx_a": STORY, "ctx_b": "", "ctx": STORY, "label": 0,
            "endings": ["the children counted boats and sang " * 4] * 4,
        },
    ),
    "arc-easy": Task(
        "allenai/ai2_arc:ARC-Easy:test", 2_376, arc_question,
        {"question": "What carries boats to the sea?", "choices": CHOICES, "answerKey": "A"},
    ),
    "arc-challenge": Task(
        "allenai/ai2_arc:ARC-Challenge:test", 1_172, arc_question,
        {"question": "Which of these slows down a sailing boat?", "choices": CHOICES, "answerKey": "C"},
    ),
    "piqa": Task(
        "baber/piqa:validation", 1_838, piqa_question,
        {"goal": "To cross a river,", "sol1": "walk over a bridge.", "sol2": "walk under a bridge.", "label": 0},
    ),
    "openbookqa": Task(
        "allenai/openbookqa:main:test", 500, openbookqa_question,
        {"question_stem": "At night, boats are led home by", "choices": CHOICES, "answerKey": "D"},
    ),
    "winogrande": Task(
        "allenai/winogrande:winogrande_xl:validation", 1_267, winogrande_question,
        {
            "sentence": "The boat did not pass the bridge because the _ was too high.", "option1": "mast",
            "option2": "gate", "answer": "1",
        },
    ),
    "lambada": Task(
        "EleutherAI/lambada_openai:default:test", 5_153, lambada_question,
        {"text": f"{STORY}the children waved at the boats from the bridge"}, is_last_word=True,
    ),
}  # fmt: skip
"""By name. Repositories, configurations and splits are lm-eval's. `runs.history.TASK_TITLES` has their titles."""
