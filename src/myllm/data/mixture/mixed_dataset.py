"""Several prepared data sets, trained on as one: `MixedDataset` stands where a `Dataset` does."""

import json
import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import numpy as np

from myllm import paths
from myllm.config import RunConfig
from myllm.data.dataset import Dataset
from myllm.data.order import StreamOrder
from myllm.data.sampler import DataPosition, count_sequences
from myllm.data.token_stream import TokenStream
from myllm.errors import UserError
from myllm.planning.batch import BatchPlan

from .interleaving import Interleaving, fit_weights
from .spec import Mixture

FORMAT = "myllm-mixture-1"
COMPONENT_BITS = 40
"""A sequence's number is its component's number shifted by this many bits, plus its number in that component."""


@dataclass
class MixedDataset(Dataset):
    """Complete data sets with the same vocabulary. Its folder is that of the first, which has the tokenizer."""

    components: tuple[Dataset, ...] = ()
    mixture: Mixture = field(default_factory=lambda: Mixture((), ()))

    @classmethod
    def of(cls, mixture: Mixture, components: Sequence[Dataset]) -> "MixedDataset":
        """
        Raises:
            UserError: the components have different vocabularies, or two of them are the same data set.
        """
        first = components[0]
        vocabulary = first.manifest["tokenizer"]
        for component in components[1:]:
            other = component.manifest["tokenizer"]
            if other["sha256"] != vocabulary["sha256"]:
                raise UserError(
                    f"a mixture needs one vocabulary, but {first.name} was prepared with {vocabulary['name']} "
                    f"({vocabulary['vocab_size']:,} tokens) and {component.name} with {other['name']} "
                    f"({other['vocab_size']:,}); prepare both with the same --tokenizer"
                )
        fingerprints = [component.fingerprint for component in components]
        for index, fingerprint in enumerate(fingerprints):
            if fingerprint in fingerprints[:index]:
                same = mixture.names[fingerprints.index(fingerprint)]
                raise UserError(f"{same} and {mixture.names[index]} are the same data set; give it one weight")
        stages = [[stage.step, [str(weight) for weight in stage.weights]] for stage in mixture.stages]
        described = json.dumps([FORMAT, fingerprints, stages])
        manifest = {
            "fingerprint": sha256(described.encode()).hexdigest(),
            "source": mixture.format(_labels(components)),
            "tokenizer": vocabulary,
            "shards": [],
        }
        return cls(first.folder, manifest, components=tuple(components), mixture=mixture)

    @property
    def name(self) -> str:
        """As data.dataset would name it."""
        names = [paths.relative_to_data(component.folder, paths.datasets_dir()) for component in self.components]
        return self.mixture.format(tuple(names))

    @property
    def labels(self) -> tuple[str, ...]:
        """Short names of the components, each once."""
        return _labels(self.components)

    @property
    def final_weights(self) -> tuple[float, ...]:
        return tuple(float(weight) for weight in self.mixture.stages[-1].weights)

    @property
    def train(self) -> TokenStream:
        """
        Raises:
            UserError: always. What works on one stream of tokens cannot work on a mixture.
        """
        raise UserError(f"this needs a single data set, not the mixture {self.manifest['source']}; name one component")

    @property
    def val(self) -> TokenStream:
        """The held-out text of the component with the largest final weight, for evaluations that need one text."""
        weights = self.final_weights
        return self.components[weights.index(max(weights))].val

    @property
    def known_train_tokens(self) -> int:
        return sum(component.train.tokens for component in self.components)

    def order(self, batch: BatchPlan) -> "MixtureOrder":
        return MixtureOrder(self, batch)

    def refresh(self) -> None:
        """Its components are complete."""

    def counts(self, config: RunConfig, steps: int) -> np.ndarray:
        """Sequences of each component in the first steps of a run, (C,) int64."""
        step_sequences = config.train.batch_tokens // config.model.max_seq_len
        return Interleaving(self.mixture.stages, step_sequences, config.train.seed).counts(steps * step_sequences)

    def epochs(self, config: RunConfig, steps: int) -> np.ndarray:
        """How often the first steps of a run read each component, (C,) float64."""
        return self.counts(config, steps) / self._sequences(config)

    def describe_length(self, config: RunConfig) -> list[str]:
        """A line about the run, and one about each component: share, epochs, tokens."""
        steps, limit = config.train.max_steps, config.train.max_epochs
        counts, epochs = self.counts(config, steps), self.epochs(config, steps)
        lines = [f"{steps * config.train.batch_tokens:,} tokens in {steps:,} steps, a mixture:"]
        for label, component, count, passes in zip(self.labels, self.components, counts, epochs, strict=True):
            too_many = f", more than train.max_epochs {limit:g}" if passes > limit else ""
            lines.append(
                f"  {label}: {count / max(counts.sum(), 1):.2%} of the run, {passes:,.2f} epochs of "
                f"{component.train.tokens:,} training tokens{too_many}"
            )
        return lines

    def progress(self, config: RunConfig, steps: int) -> dict[str, dict[str, Any]]:
        """By component: tokens and epochs that the first steps of a run have read."""
        counts, epochs = self.counts(config, steps), self.epochs(config, steps)
        return {
            label: {"train_tokens": int(count) * config.model.max_seq_len, "epochs": float(passes)}
            for label, count, passes in zip(self.labels, counts, epochs, strict=True)
        }

    def describe_components(self) -> list[dict[str, Any]]:
        """For environment.json."""
        return [
            {
                "name": label,
                "dataset": component.name,
                "dataset_hash": component.fingerprint,
                "train_tokens": component.train.tokens,
            }
            for label, component in zip(self.labels, self.components, strict=True)
        ]

    def check_epochs(self, config: RunConfig) -> None:
        """
        Raises:
            UserError: a component is too small for one sequence, or the run would read one more often than
                train.max_epochs; with three ways out.
        """
        for component, count in zip(self.components, self._sequences(config), strict=True):
            if not count:
                raise UserError(
                    f"the data set {component.name} has {component.train.tokens:,} training tokens, fewer than one "
                    f"sequence of {config.model.max_seq_len:,}; add text or leave it out of the mixture"
                )
        steps, limit = config.train.max_steps, config.train.max_epochs
        epochs = self.epochs(config, steps)
        over = [
            f"{label} {passes:,.1f} times" for label, passes in zip(self.labels, epochs, strict=True) if passes > limit
        ]
        if not over:
            return
        longest = bisect_right(range(steps), False, key=lambda count: bool(max(self.epochs(config, count)) > limit)) - 1
        raise UserError(
            f"{steps:,} steps of this mixture read {' and '.join(over)}, more than train.max_epochs {limit:g} (up to "
            "about 4, repeated text is nearly as good as new: arXiv 2305.16264). Either\n"
            f"  - repeat: --train.max-epochs {math.ceil(max(epochs))}\n"
            f"  - stop earlier: --train.max-steps {longest}\n"
            f"  - re-weight: {self._weights_that_fit(config)}"
        )

    def _weights_that_fit(self, config: RunConfig) -> str:
        """A mixture of the same components that reads none of them more often than train.max_epochs."""
        steps = config.train.max_steps
        total = steps * (config.train.batch_tokens // config.model.max_seq_len)
        room = config.train.max_epochs * self._sequences(config) / total
        if len(self.mixture.stages) > 1:
            shares = (f"{label} {min(part, 1):.2%}" for label, part in zip(self.labels, room, strict=True))
            return f"over the whole run, at most {', '.join(shares)}"
        weights = fit_weights(np.array(self.final_weights), room)
        if weights is None:
            return "not possible, all components together are too small; add text"
        return " ".join(
            f"{name}:{weight:g}" for name, weight in zip(self.mixture.names, weights, strict=True) if weight
        )

    def _sequences(self, config: RunConfig) -> np.ndarray:
        """Of each component, (C,) int64."""
        seq_len = config.model.max_seq_len
        return np.array([count_sequences(component.train.tokens, seq_len) for component in self.components])


def _labels(components: Sequence[Dataset]) -> tuple[str, ...]:
    short = tuple(re.sub(r"-[0-9a-f]{12}$", "", component.name) for component in components)
    return short if len(set(short)) == len(short) else tuple(component.name for component in components)


class MixtureOrder:
    """The order of a mixture. Its position has epoch 0, and the run's sequences as its index.

    Each component advances through its own epochs in the order that a run on it alone, with the same seed, would have.
    """

    def __init__(self, dataset: MixedDataset, batch: BatchPlan) -> None:
        self.dataset, self._batch = dataset, batch
        self._orders = [StreamOrder(component.train, batch.seq_len) for component in dataset.components]

    def has(self, position: DataPosition, count: int) -> bool:
        return True

    def take(self, position: DataPosition, count: int) -> np.ndarray:
        interleaving = Interleaving(self.dataset.mixture.stages, self._batch.sequences, position.seed)
        before = interleaving.counts(position.index).tolist()
        components = interleaving.components(position.index, count)
        sequences = components << COMPONENT_BITS
        for number, order in enumerate(self._orders):
            own = components == number
            if own.any():
                epoch, index = divmod(before[number], order.n_sequences)
                sequences[own] += order.take(replace(position, epoch=epoch, index=index), int(own.sum()))
        return sequences

    def advance(self, position: DataPosition, count: int) -> DataPosition:
        return replace(position, index=position.index + count)

    def done(self, position: DataPosition) -> int:
        return position.index

    def read(self, sequences: np.ndarray) -> np.ndarray:
        components, own = np.divmod(sequences, 1 << COMPONENT_BITS)
        return np.concatenate(
            [self._orders[number].read(own[i : i + 1]) for i, number in enumerate(components.tolist())]
        )

    def verify(self, sequences: np.ndarray) -> None:
        components, own = np.divmod(sequences, 1 << COMPONENT_BITS)
        for number in np.unique(components).tolist():
            self._orders[number].verify(own[components == number])
