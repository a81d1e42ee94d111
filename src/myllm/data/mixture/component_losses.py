"""The training loss of each component of a mixture."""

import numpy as np
import torch
from torch import Tensor

from myllm.data.sampler import DataPosition
from myllm.planning.batch import BatchPlan

from .interleaving import Interleaving
from .mixed_dataset import MixedDataset


class ComponentLosses:
    """Keeps the loss of each sequence on the device until a row of metrics.jsonl is due.

    Which component a sequence comes from follows from its place in the run, so training's thread neither reads nor
    sends anything in between. A number per sequence is a few kilobytes per rank, or megabytes with a row every
    thousand steps.
    """

    def __init__(self, dataset: MixedDataset, batch: BatchPlan, position: DataPosition, rank: int) -> None:
        """
        Args:
            position: of the first step to come.
        """
        self._labels, self._batch, self._rank = dataset.labels, batch, rank
        self._interleaving = Interleaving(dataset.mixture.stages, batch.sequences, position.seed)
        self._position, self._losses = position, list[Tensor]()
        self._counts = np.zeros(len(self._labels), dtype=np.int64)

    def add(self, token_losses: Tensor) -> None:
        """Take over the losses of a micro-step, (B T,)."""
        self._losses.append(token_losses.unflatten(0, (-1, self._batch.seq_len)).mean(dim=1))  # (B,)

    def take_sums(self, position: DataPosition) -> Tensor:
        """The losses of this rank's sequences since the last call, added up by component: (C,) float32 on the device.

        Args:
            position: behind the last step.
        """
        batch, start, count = self._batch, self._position.index, position.index - self._position.index
        components = self._interleaving.components(start, count)
        self._counts = np.bincount(components, minlength=len(self._labels))
        by_rank = components.reshape(-1, batch.grad_accum_steps, batch.world_size, batch.micro_batch_size)
        losses = torch.cat(self._losses)  # (N,)
        own = torch.from_numpy(by_rank[:, :, self._rank].reshape(-1)).to(losses.device)  # (N,)
        numbers = torch.arange(len(self._labels), device=losses.device).unsqueeze(1)  # (C, 1)
        self._position, self._losses = position, []
        # Not index_add, which adds in any order on a GPU, nor a product, which may round to TF32.
        return torch.where(own == numbers, losses, 0.0).sum(dim=1)

    def figures(self, sums: list[float]) -> dict[str, float]:
        """What the row says of each component: its mean loss since the last row, and its tokens since the first step.

        Args:
            sums: of `take_sums`, over all ranks.
        """
        total = self._interleaving.counts(self._position.index)
        figures: dict[str, float] = {}
        for label, loss, count, read in zip(self._labels, sums, self._counts, total, strict=True):
            figures |= {f"loss/{label}": loss / count} if count else {}
            figures[f"tokens/{label}"] = int(read) * self._batch.seq_len
        return figures
