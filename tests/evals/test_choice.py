"""Scores against one full forward pass a sequence, on HellaSwag's rows and others, for any batches and ranks."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from myllm.config import ModelConfig
from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.load import load_tokenizer
from myllm.distributed.collectives import DistContext
from myllm.errors import UserError
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
from myllm.evals.tasks import Question, hellaswag_question, nanogpt_hellaswag_question
from myllm.model.transformer import Transformer

OWN = Path(__file__).with_name("hellaswag_own.jsonl")
CPU = torch.device("cpu")
ALONE = DistContext(0, 0, 1, CPU)
PROTOCOLS = ("nanogpt", "lm-eval")
SMALL = ModelConfig(max_seq_len=160, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, qk_norm=True)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in OWN.read_text(encoding="utf-8").splitlines()]


def random_model(config: ModelConfig = SMALL) -> Transformer:
    """Far from uniform: weights so large that endings differ by whole nats."""
    model, generator = Transformer(config).eval(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return model


def totals(
    model: Transformer, tokenized: list, batch: int = 16, rank: int = 0, ranks: int = 1
) -> dict[int, list[float]]:
    pairs = ending_log_probs(model.score_continuations, tokenized, DistContext(rank, rank, ranks, CPU), batch)
    return {number: sums.tolist() for number, sums in pairs}


def our_rows(protocol: str, tokenizer: Tokenizer, context_length: int = 160) -> list[TokenizedQuestion]:
    """Our rows by a protocol."""
    return tokenize(
        [json.loads(line) for line in OWN.read_text(encoding="utf-8").splitlines()], protocol, tokenizer, context_length
    )


def tokenize(
    rows: list[dict], protocol: str, tokenizer: Tokenizer, context_length: int = 160
) -> list[TokenizedQuestion]:
    is_nanogpt = protocol == "nanogpt"
    questions = [(nanogpt_hellaswag_question if is_nanogpt else hellaswag_question)(row) for row in rows]
    return tokenize_questions(questions, tokenizer.encode, tokenizer.end_of_text, context_length, is_nanogpt)


@torch.no_grad()
def naive_total(model: Transformer, context: list[int], ending: list[int]) -> float:
    """One sequence, the whole forward pass, no cache; the text's beginning is cut where the window ends."""
    full = (context + ending)[-(model.config.max_seq_len + 1) :]
    logits = model(torch.tensor([full[:-1]]))[0, -len(ending) :]  # (ending, V)
    log_probs = logits.double().log_softmax(dim=-1)
    return sum(float(row[token]) for row, token in zip(log_probs, ending, strict=True))


def naive_texts(row: dict, protocol: str, tokenizer: Tokenizer) -> tuple[list[int], list[list[int]], list[int]]:
    """Tokens and lengths, written from the description of each protocol."""

    def clean(text: str) -> str:
        return re.sub(r"\[[^\]\n]*\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    if protocol == "nanogpt":
        endings = [tokenizer.encode(" " + ending).tolist() for ending in row["endings"]]
        return tokenizer.encode(row["ctx"]).tolist(), endings, [len(ending) for ending in endings]
    context = clean(row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize())
    choices = [clean(ending) for ending in row["endings"]]
    front = tokenizer.encode(context.rstrip()).tolist()
    spaces = " " * (len(context) - len(context.rstrip()))
    joined = [tokenizer.encode(context.rstrip() + spaces + " " + choice).tolist() for choice in choices]
    return front, [full[len(front) :] for full in joined], [len(choice) for choice in choices]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"max_seq_len": 40}, {"position": "learned", "norm": "layernorm", "activation": "gelu", "bias": True}],
    ids=["fits", "some are cut", "gpt2"],
)
def test_totals_match_naive_scoring(protocol, changes, tokenizer, rows):
    config = replace(SMALL, **changes)
    model = random_model(config)
    tokenized = our_rows(protocol, tokenizer, config.max_seq_len)
    found = totals(model, tokenized)
    right, right_by_norm, cut = 0, 0, 0
    for number, row in enumerate(rows):
        context, endings, lengths = naive_texts(row, protocol, tokenizer)
        expected = np.array([naive_total(model, context, ending) for ending in endings])
        assert found[number] == pytest.approx(expected, abs=2e-4)
        assert np.ptp(expected) > 1  # not all the same
        right += int(expected.argmax()) == int(row["label"])
        right_by_norm += int((expected / lengths).argmax()) == int(row["label"])
        cut += len(context) + max(map(len, endings)) - 1 > config.max_seq_len
    assert choice_sums(model.score_continuations, tokenized, ALONE).tolist() == [
        right,
        right_by_norm,
        len(rows) / 4,
        len(rows),
    ]
    assert 0 < right < len(rows)
    assert (cut > 0) == (config.max_seq_len == 40)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sums_independent_of_batches_and_ranks(protocol, tokenizer):
    model = random_model()
    tokenized = our_rows(protocol, tokenizer)
    full, score = totals(model, tokenized), model.score_continuations
    sums = choice_sums(score, tokenized, ALONE)
    for batch in (1, 100):
        other = totals(model, tokenized, batch)
        assert other.keys() == full.keys()
        for number, expected in full.items():
            assert other[number] == pytest.approx(expected, abs=2e-4)
        assert torch.equal(choice_sums(score, tokenized, ALONE, batch), sums)
    fours = totals(model, tokenized, 4)
    shares = [choice_sums(score, tokenized, DistContext(rank, rank, 3, CPU), 4) for rank in range(3)]
    assert torch.equal(sum(shares), sums)
    for ranks in (2, 50):  # of 50 most have nothing to do
        split: dict = {}
        for rank in range(ranks):
            own = totals(model, tokenized, 4, rank, ranks)
            assert not split.keys() & own.keys()
            split |= own
        assert split == fours  # to the last bit


def test_contexts_run_once_only_endings_scored(tokenizer):
    tokenized, seen = our_rows("nanogpt", tokenizer), []

    def watch(prefixes, owners, tokens, targets):
        seen.append((prefixes, owners, tokens, targets))
        return torch.zeros(targets.shape)

    numbers = [number for number, _ in ending_log_probs(watch, tokenized, ALONE, 8)]
    for start, (prefixes, owners, _, targets) in zip(range(0, len(numbers), 8), seen, strict=True):
        batch = [tokenized[i] for i in numbers[start : start + 8]]
        assert len(prefixes) == len(batch)  # not four times
        assert prefixes.shape[1] == min(len(example_tokens.contexts[0]) for example_tokens in batch) - 1
        assert owners.tolist() == [n for n in range(len(batch)) for _ in range(4)]
        scored = [row[row != -1].tolist() for row in targets]
        assert scored == [ending.tolist() for example_tokens in batch for ending in example_tokens.endings]


def example(**changes: object) -> dict:
    fields = {
        "activity_label": "Act", "ctx_a": "A man sits.", "ctx_b": "he LOOKS up", "ctx": "A man sits. he LOOKS up",
        "endings": ("a", "up", "the sky", "at"), "label": 0,
    }  # fmt: skip
    return fields | changes


def shown(row: dict, protocol: str, tokenizer: Tokenizer) -> tuple[str, list[str], tuple[int, ...]]:
    (example_tokens,) = tokenize([row], protocol, tokenizer)
    return (
        tokenizer.decode(example_tokens.contexts[0]),
        [tokenizer.decode(ending) for ending in example_tokens.endings],
        example_tokens.lengths,
    )


def test_protocol_texts(tokenizer):
    endings = [" a", " up", " the sky", " at"]
    assert shown(example(), "nanogpt", tokenizer) == ("A man sits. he LOOKS up", endings, (1, 1, 2, 1))
    assert shown(example(), "lm-eval", tokenizer) == ("Act: A man sits. He looks up", endings, (1, 2, 7, 2))
    # WikiHow's marks go and leave their spaces, of which two become one. What is left of an ending keeps its own.
    wiki = example(
        ctx_a="[header] How to sit [title] Find a chair.  [step] Look.", ctx_b="",
        endings=("[substeps] Sit  down.", " up ", "y [title] z", "[a]"),
    )  # fmt: skip
    ctx, endings, lengths = shown(wiki, "lm-eval", tokenizer)
    assert ctx == "Act: How to sit. Find a chair.  Look."
    assert endings == ["  Sit down.", " up", " y. z", " "]
    assert lengths == (10, 2, 4, 0)


def test_empty_context_becomes_end_of_text(tokenizer):
    (example_tokens,) = tokenize([example(ctx="")], "nanogpt", tokenizer)
    assert example_tokens.contexts[0].tolist() == [tokenizer.end_of_text]
    model = random_model()
    expected = [naive_total(model, [tokenizer.end_of_text], ending.tolist()) for ending in example_tokens.endings]
    assert totals(model, [example_tokens])[0] == pytest.approx(expected, abs=2e-4)


def test_overlong_ending_raises(tokenizer):
    with pytest.raises(UserError, match="an ending of example 0 has 2 tokens, the model's context is 1"):
        tokenize([example()], "nanogpt", tokenizer, 1)
    (example_tokens,) = tokenize([example()], "nanogpt", tokenizer, 2)
    assert [len(ending) for ending in example_tokens.contexts] == [2, 2, 1, 2]


def test_multiple_contexts_and_variable_endings(tokenizer):
    """As in WinoGrande and ARC, together in one batch, and with a context so short that some are cut."""
    questions = [
        Question(("The bridge by the river", "The old boat under the bridge of the town"), ("was too high.",) * 2, 1),
        Question(("Question: Who sang?\nAnswer:",), ("the children", "wind", "a lantern on the water"), 0),
        Question(("Night",), ("fell.", "rose over the hill.", "a", "b", "c"), 4),
    ]
    for context_length in (160, 12):
        model = random_model(replace(SMALL, max_seq_len=context_length))
        tokenized = tokenize_questions(questions, tokenizer.encode, tokenizer.end_of_text, context_length)
        found = totals(model, tokenized)
        for number, question in enumerate(questions):
            contexts = question.contexts * (len(question.endings) // len(question.contexts))
            for context, ending, total in zip(contexts, question.endings, found[number], strict=True):
                front = tokenizer.encode(context).tolist()
                joined = tokenizer.encode(f"{context} {ending}").tolist()
                assert total == pytest.approx(naive_total(model, front, joined[len(front) :]), abs=2e-4)
    assert choice_sums(model.score_continuations, tokenized, ALONE)[2] == pytest.approx(1 / 2 + 1 / 3 + 1 / 5)


def test_last_word(tokenizer):
    """Greedy if every token of the word is the model's most likely one; the first question is made so."""
    model = random_model()
    context = tokenizer.encode("the river ran under the old").tolist()
    greedy = []
    for _ in range(2):
        greedy.append(int(model(torch.tensor([context + greedy]))[0, -1].argmax()))
    tokenized = [
        TokenizedQuestion((np.array(context),), (np.array(greedy),), (1,), 0),
        TokenizedQuestion((np.array(context),), (np.array([greedy[0], (greedy[1] + 1) % 50]),), (1,), 0),
        *tokenize_questions([Question(("a long text about the wind and",), ("salt",), 0)], tokenizer.encode, 0, 160),
    ]
    found = sorted(last_word_log_probs(model.evaluate, tokenized, ALONE, 2))
    assert [is_greedy for _, _, is_greedy in found] == [True, False, False]
    expected = [naive_total(model, item.contexts[0].tolist(), item.endings[0].tolist()) for item in tokenized]
    assert [total for _, total, _ in found] == pytest.approx(expected, abs=2e-4)
    sums = last_word_sums(model.evaluate, tokenized, ALONE)
    shares = [last_word_sums(model.evaluate, tokenized, DistContext(rank, rank, 2, CPU), 1) for rank in range(2)]
    torch.testing.assert_close(sum(shares), sums)
    metrics = finish_last_word(sums)
    assert metrics["acc"] == pytest.approx(1 / 3)
    assert metrics["perplexity"] == pytest.approx(math.exp(-np.mean(expected)), rel=1e-3)
    error = metrics["perplexity"] * np.std(expected, ddof=1) / math.sqrt(3)
    assert metrics["perplexity_stderr"] == pytest.approx(error, rel=1e-3)
    assert finish_last_word(torch.tensor([0.0, -9e9, 8.1e19, 1.0]).double())["perplexity"] == math.inf


def test_metrics():
    metrics = finish(torch.tensor([30.0, 40.0, 25.0, 100.0]).double())
    assert metrics == {
        "acc": 0.3,
        "acc_norm": 0.4,
        "acc_stderr": pytest.approx(np.std([1] * 30 + [0] * 70, ddof=1) / 10),
        "acc_norm_stderr": pytest.approx(np.std([1] * 40 + [0] * 60, ddof=1) / 10),
        "chance": 0.25,
        "n_examples": 100,
    }
    assert math.isnan(finish(torch.tensor([1.0, 1.0, 0.25, 1.0]).double())["acc_stderr"])
