"""HellaSwag's figures against one full forward pass a sequence, for any batch and any number of ranks."""

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
from myllm.evals.hellaswag import Example, ending_log_probs, finish, hellaswag_sums, tokenize_examples
from myllm.evals.hellaswag_data import load_examples
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
    found = {}
    for numbers, sums in ending_log_probs(
        model.score_continuations, tokenized, DistContext(rank, rank, ranks, CPU), batch
    ):
        found |= dict(zip(numbers, sums.tolist(), strict=True))
    return found


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
def test_totals_are_those_of_one_sequence_at_a_time(protocol, changes, tokenizer, rows):
    config = replace(SMALL, **changes)
    model = random_model(config)
    tokenized = tokenize_examples(
        load_examples(OWN), tokenizer.encode, tokenizer.end_of_text, config.max_seq_len, protocol
    )
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
    assert hellaswag_sums(model.score_continuations, tokenized, ALONE).tolist() == [right, right_by_norm, len(rows)]
    assert 0 < right < len(rows)
    assert (cut > 0) == (config.max_seq_len == 40)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sums_do_not_depend_on_batches_and_ranks(protocol, tokenizer):
    model = random_model()
    tokenized = tokenize_examples(load_examples(OWN), tokenizer.encode, tokenizer.end_of_text, 160, protocol)
    full, score = totals(model, tokenized), model.score_continuations
    sums = hellaswag_sums(score, tokenized, ALONE)
    for batch in (1, 100):
        other = totals(model, tokenized, batch)
        assert other.keys() == full.keys()
        for number, expected in full.items():
            assert other[number] == pytest.approx(expected, abs=2e-4)
        assert torch.equal(hellaswag_sums(score, tokenized, ALONE, batch), sums)
    fours = totals(model, tokenized, 4)
    shares = [hellaswag_sums(score, tokenized, DistContext(rank, rank, 3, CPU), 4) for rank in range(3)]
    assert torch.equal(sum(shares), sums)
    for ranks in (2, 50):  # of 50 most have nothing to do
        split: dict = {}
        for rank in range(ranks):
            own = totals(model, tokenized, 4, rank, ranks)
            assert not split.keys() & own.keys()
            split |= own
        assert split == fours  # to the last bit


def test_contexts_run_once_and_only_endings_are_scored(tokenizer):
    tokenized, seen = tokenize_examples(load_examples(OWN), tokenizer.encode, tokenizer.end_of_text, 160), []

    def watch(prefixes, owners, tokens, targets):
        seen.append((prefixes, owners, tokens, targets))
        return torch.zeros(targets.shape)

    for (numbers, _), (prefixes, owners, _, targets) in zip(
        ending_log_probs(watch, tokenized, ALONE, 8), seen, strict=False
    ):
        batch = [tokenized[i] for i in numbers]
        assert len(prefixes) == len(batch)  # not four times
        assert prefixes.shape[1] == min(len(example_tokens.contexts[0]) for example_tokens in batch) - 1
        assert owners.tolist() == [n for n in range(len(batch)) for _ in range(4)]
        asked = [row[row != -1].tolist() for row in targets]
        assert asked == [ending.tolist() for example_tokens in batch for ending in example_tokens.endings]
    assert len(seen) == math.ceil(len(tokenized) / 8)


def example(**changes: object) -> Example:
    fields = {
        "activity_label": "Act", "ctx_a": "A man sits.", "ctx_b": "he LOOKS up", "ctx": "A man sits. he LOOKS up",
        "endings": ("a", "up", "the sky", "at"), "label": 0,
    }  # fmt: skip
    return Example(**(fields | changes))


def shown(one: Example, protocol: str, tokenizer: Tokenizer) -> tuple[str, list[str], tuple[int, ...]]:
    (example_tokens,) = tokenize_examples([one], tokenizer.encode, tokenizer.end_of_text, 160, protocol)
    return (
        tokenizer.decode(example_tokens.contexts[0]),
        [tokenizer.decode(ending) for ending in example_tokens.endings],
        example_tokens.lengths,
    )


def test_text_of_each_protocol(tokenizer):
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


def test_empty_text_is_replaced_by_end_of_text(tokenizer):
    (example_tokens,) = tokenize_examples([example(ctx="")], tokenizer.encode, tokenizer.end_of_text, 160)
    assert example_tokens.contexts[0].tolist() == [tokenizer.end_of_text]
    model = random_model()
    expected = [naive_total(model, [tokenizer.end_of_text], ending.tolist()) for ending in example_tokens.endings]
    assert totals(model, [example_tokens])[0] == pytest.approx(expected, abs=2e-4)


def test_an_ending_that_does_not_fit(tokenizer):
    with pytest.raises(UserError, match="an ending of example 0 has 2 tokens, the model's context is 1"):
        tokenize_examples([example()], tokenizer.encode, tokenizer.end_of_text, 1)
    (example_tokens,) = tokenize_examples([example()], tokenizer.encode, tokenizer.end_of_text, 2)
    assert [len(ending) for ending in example_tokens.contexts] == [2, 2, 1, 2]


def test_metrics():
    metrics = finish(torch.tensor([30.0, 40.0, 100.0]).double())
    assert metrics == {
        "acc": 0.3,
        "acc_norm": 0.4,
        "acc_stderr": pytest.approx(np.std([1] * 30 + [0] * 70, ddof=1) / 10),
        "acc_norm_stderr": pytest.approx(np.std([1] * 40 + [0] * 60, ddof=1) / 10),
        "n_examples": 100,
    }
    assert math.isnan(finish(torch.tensor([1.0, 1.0, 1.0]).double())["acc_stderr"])
