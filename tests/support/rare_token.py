"""A token that occurs once in the training data, so that a test can make one document harmful."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from myllm.config import ModelConfig, RunConfig
from myllm.data.dataset import Dataset
from myllm.data.sampler import DataPosition, count_sequences, step_sequences, window_sequences
from myllm.model.transformer import Transformer
from myllm.training import setup


class Rare(NamedTuple):
    """A token that only one sequence of the first epoch has."""

    token: int
    step: int
    """The update that contains its sequence, counted from 1."""
    sample: int
    """Index among the samples of that step."""
    sequence: int


def sequences_of_steps(config: RunConfig, dataset: Dataset, steps: int) -> np.ndarray:
    """(steps, samples of a step)"""
    position = DataPosition(0, 0, config.train.seed, dataset.fingerprint)
    per_step, seq_len = config.train.batch_tokens // config.model.max_seq_len, config.model.max_seq_len
    n_sequences = count_sequences(dataset.train.tokens, seq_len)
    return step_sequences(position, steps * per_step, n_sequences, window_sequences(seq_len)).reshape(steps, per_step)


def rare_token(config: RunConfig, dataset: Dataset, first_step: int, odd_sample: bool = False) -> Rare:
    """A token in a sequence of update `first_step` or soon after, not at the sequence's ends."""
    T = config.model.max_seq_len
    stream = dataset.train.read(0, dataset.train.tokens)
    ids, counts = np.unique(stream, return_counts=True)
    positions = {int(np.flatnonzero(stream == token)[0]): int(token) for token in ids[counts == 1]}
    inside = {position // T: token for position, token in positions.items() if 0 < position % T < T - 1}
    order = sequences_of_steps(config, dataset, 12)
    for step in range(first_step, 12):
        for sample, sequence in enumerate(order[step - 1].tolist()):
            if sequence in inside and (sample % 2 == 1 or not odd_sample):
                return Rare(inside[sequence], step, sample, sequence)
    raise AssertionError("no such token")


def poison(monkeypatch: pytest.MonkeyPatch, token: int) -> None:
    """Fresh models embed this token as numbers so large that dropout, which scales up, makes infinities of them."""

    def poisoned(config: ModelConfig, seed: int) -> Transformer:
        model = Transformer(config, seed)
        with torch.no_grad():
            model.embedding.weight[token] = 3.4e38
        return model

    monkeypatch.setattr(setup, "Transformer", poisoned)
