"""Muon's matrices divided over ranks: each is orthogonalized by one rank, its owner.

The matrices of a shape are cut into equal runs, one a rank in their order, so that owners need no agreement. With DDP
every rank has all gradients: one all-gather a shape returns the updates. With FSDP2 each rank has some rows of every
parameter: one all-to-all a shape brings whole matrices to their owners, a second one takes the rows of the updates
back. Updates travel while the next shape is computed.

Shapes: N matrices of a shape, n of them this rank's; R, C rows and columns of a matrix; S, L its smaller and its larger
side.

Source: dion (github.com/microsoft/dion) shares shapes over ranks in the same way.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class Matrix:
    """Rows of a parameter that are a matrix of their own, such as the queries of a fused projection."""

    parameter: str
    start: int
    n_rows: int
    columns: int
    parameter_rows: int

    @property
    def is_tall(self) -> bool:
        return self.n_rows > self.columns

    def wide(self, matrix: Tensor) -> Tensor:
        """(R, C) to (S, L), and back: the iteration runs on the smaller side."""
        return matrix.mT if self.is_tall else matrix

    def local_rows(self, rank: int, world_size: int) -> slice:
        """Its rows among those of the parameter that FSDP2 gives to a rank."""
        per_rank = -(-self.parameter_rows // world_size)  # as torch.chunk
        first = min(rank * per_rank, self.parameter_rows)
        last = min(first + per_rank, self.parameter_rows)
        begin, end = max(self.start, first), min(self.start + self.n_rows, last)
        return slice(begin - first, max(end, begin) - first)


def cut(parameter: str, shape: torch.Size, row_sizes: tuple[int, ...]) -> Iterator[Matrix]:
    """The matrices that a parameter consists of."""
    assert sum(row_sizes) == shape[0], f"{parameter} has {shape[0]} rows, not {row_sizes}"
    for end, n_rows in zip(accumulate(row_sizes), row_sizes, strict=True):
        yield Matrix(parameter, end - n_rows, n_rows, shape[1], shape[0])


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, or all of a plain one. They share memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def owned(matrices: Sequence[Matrix], rank: int, world_size: int) -> Sequence[Matrix]:
    per_rank = -(-len(matrices) // world_size)
    return matrices[rank * per_rank : (rank + 1) * per_rank]


class Replicas:
    """Every rank has whole matrices: one process, or DDP."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._rank, self._world_size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)

    def rows(self, matrix: Matrix) -> slice:
        """Those of a matrix in this rank's part of its parameter."""
        return slice(matrix.start, matrix.start + matrix.n_rows)

    def to_owners(self, matrices: Sequence[Matrix], rows_of: Callable[[Matrix], Tensor]) -> Tensor:
        """The whole of each matrix that this rank owns.

        Args:
            matrices: all of a shape.
            rows_of: this rank's rows of a matrix.

        Shapes:
            returns (n, S, L)
        """
        own = owned(matrices, self._rank, self._world_size)
        return _stack([matrix.wide(rows_of(matrix)) for matrix in own], matrices[0], rows_of)

    def from_owners(self, matrices: Sequence[Matrix], updates: Tensor) -> Callable[[], list[Tensor]]:
        """Send the updates of this rank's matrices, (n, S, L).

        Returns:
            a function that waits for all updates: this rank's rows of each, in the order of `matrices`.
        """
        if self._group is None:
            return lambda: [matrix.wide(update) for matrix, update in zip(matrices, updates, strict=True)]
        per_rank = -(-len(matrices) // self._world_size)
        padded = updates.new_zeros(per_rank, *updates.shape[1:])
        padded[: len(updates)] = updates
        gathered = padded.new_empty(self._world_size * per_rank, *updates.shape[1:])
        # torch 2.13 renamed the function, and warns of its old name.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = all_gather(gathered, padded, group=self._group, async_op=True)

        def wait() -> list[Tensor]:
            work.wait()
            return [matrix.wide(update) for matrix, update in zip(matrices, gathered, strict=False)]

        return wait


class Shards:
    """Every rank holds some rows of each parameter: FSDP2. Methods as those of `Replicas`.

    Two ranks and four matrices: rank 0 owns a and b, rank 1 owns c and d. a0 are the rows of a that rank 0 holds, flat.

        to_owners      rank 0 sends  a0 b0 | c0 d0      and receives  a0 b0 | a1 b1, the whole of a and b
                       rank 1 sends  a1 b1 | c1 d1      and receives  c0 d0 | c1 d1, the whole of c and d
                         one part for each owner                      one part from each holder

        from_owners    the same with both columns exchanged: a part for each holder, a part from each owner
    """

    def __init__(self, parameter: DTensor) -> None:
        assert parameter.placements == (Shard(0),), f"expected rows on one mesh, got {parameter.placements}"
        self._group = parameter.device_mesh.get_group()
        self._rank, self._world_size = dist.get_rank(self._group), dist.get_world_size(self._group)

    def rows(self, matrix: Matrix) -> slice:
        return matrix.local_rows(self._rank, self._world_size)

    def to_owners(self, matrices: Sequence[Matrix], rows_of: Callable[[Matrix], Tensor]) -> Tensor:
        own = owned(matrices, self._rank, self._world_size)
        by_owner, by_holder = self._elements_by_owner(matrices), self._elements_by_holder(own)
        sent = torch.cat([rows_of(matrix).flatten() for matrix in matrices])  # (sum(by_owner),)
        received = sent.new_empty(sum(by_holder))
        dist.all_to_all_single(
            received, sent, output_split_sizes=by_holder, input_split_sizes=by_owner, group=self._group
        )
        pieces = [  # by holder, then by matrix: (its rows * C,)
            part.split(self._elements(own, holder)) for holder, part in enumerate(received.split(by_holder))
        ]
        whole = [  # (R, C) -> (S, L)
            matrix.wide(torch.cat([part[i].view(-1, matrix.columns) for part in pieces]))
            for i, matrix in enumerate(own)
        ]
        return _stack(whole, matrices[0], rows_of)

    def from_owners(self, matrices: Sequence[Matrix], updates: Tensor) -> Callable[[], list[Tensor]]:
        own = owned(matrices, self._rank, self._world_size)
        by_owner, by_holder = self._elements_by_owner(matrices), self._elements_by_holder(own)
        pieces = [  # by matrix, then by holder: (its rows, C)
            matrix.wide(update).split(self._row_counts(matrix)) for matrix, update in zip(own, updates, strict=True)
        ]
        flat = [rows[holder].flatten() for holder in range(self._world_size) for rows in pieces]
        sent = torch.cat(flat) if flat else updates.new_empty(0)  # (sum(by_holder),)
        received = sent.new_empty(sum(by_owner))
        work = dist.all_to_all_single(
            received, sent, output_split_sizes=by_owner, input_split_sizes=by_holder, group=self._group, async_op=True
        )

        def wait(sent: Tensor = sent) -> list[Tensor]:  # which must exist until it has arrived
            work.wait()
            parts = received.split(self._elements(matrices, self._rank))
            return [part.view(-1, matrix.columns) for matrix, part in zip(matrices, parts, strict=True)]

        return wait

    def _row_counts(self, matrix: Matrix) -> list[int]:
        """Rows of a matrix that each rank holds."""
        slices = (matrix.local_rows(rank, self._world_size) for rank in range(self._world_size))
        return [rows.stop - rows.start for rows in slices]

    def _elements(self, matrices: Sequence[Matrix], holder: int) -> list[int]:
        """Elements of each matrix that a rank holds."""
        return [self._row_counts(matrix)[holder] * matrix.columns for matrix in matrices]

    def _elements_by_holder(self, own: Sequence[Matrix]) -> list[int]:
        """Elements of this rank's matrices that each rank holds."""
        return [sum(self._elements(own, holder)) for holder in range(self._world_size)]

    def _elements_by_owner(self, matrices: Sequence[Matrix]) -> list[int]:
        """Elements of each owner's matrices that this rank holds."""
        owners = range(self._world_size)
        return [sum(self._elements(owned(matrices, owner, self._world_size), self._rank)) for owner in owners]


def _stack(whole: list[Tensor], first: Matrix, rows_of: Callable[[Matrix], Tensor]) -> Tensor:
    """(n, S, L), also if this rank has none."""
    if whole:
        return torch.stack(whole)
    return rows_of(first).new_empty(0, *sorted((first.n_rows, first.columns)))
