"""Greedy text from the same weights in transformers is ours, token for token."""

from dataclasses import replace

import pytest
import torch
from model.test_parity import SMALL, peer_of, random_model

from myllm.inference.generate import Sequence, generate_batch
from myllm.inference.sampling_params import SamplingParams

PROMPTS = [[7], [3, 14, 15], [9, 8, 7, 6, 5, 4, 3, 2, 1]]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}, {"qk_norm": True, "head_dim": 16}], ids=str)
@torch.no_grad()
def test_greedy_tokens_equal_transformers(changes: dict, penalty: float) -> None:
    model = random_model(replace(SMALL, **changes))
    peer = peer_of(model)
    batch = [Sequence(prompt, 0) for prompt in PROMPTS]
    list(generate_batch(model, batch, 15, SamplingParams(temperature=0, repetition_penalty=penalty)))
    for row in batch:
        made = peer.generate(
            torch.tensor([row.prompt]), attention_mask=torch.ones(1, len(row.prompt)), max_new_tokens=15,
            do_sample=False, repetition_penalty=penalty, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert row.generated == made[0, len(row.prompt) :].tolist()
