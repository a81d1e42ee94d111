"""Muon's work shared over ranks: 1, 2 and 3 make the same updates, with DDP's whole parameters and FSDP2's shards."""

from pathlib import Path

import pytest
import torch
from support import warm_start

from myllm.optim.ranks import Matrix, owned

PROGRAM = Path(__file__).parent / "programs/update_on_ranks.py"
SHAPES = 3


def results(folder: Path, ranks: int) -> dict[str, dict]:
    """By kind, after checking that all ranks have the same bits."""
    folder.mkdir()
    done = warm_start.run(PROGRAM, folder, ranks=ranks)
    assert done.returncode == 0, done.stderr
    found = {}
    for kind in ("whole", "shards", "few"):
        first, *others = (
            torch.load(folder / f"{kind}-rank{rank}.pt", weights_only=False)["tensors"] for rank in range(ranks)
        )
        assert all(torch.equal(other[name], first[name]) for other in others for name in first)
        found[kind] = torch.load(folder / f"{kind}-rank0.pt", weights_only=False)
    return found


@pytest.mark.slow
def test_updates_independent_of_world_size(tmp_path: Path) -> None:
    one, two, three = (results(tmp_path / str(ranks), ranks) for ranks in (1, 2, 3))
    for found in (one, two, three):
        for kind in ("whole", "shards", "few"):
            reference = one["few" if kind == "few" else "whole"]["tensors"]
            assert found[kind]["tensors"].keys() == reference.keys()
            for name, tensor in found[kind]["tensors"].items():
                torch.testing.assert_close(tensor, reference[name], rtol=1e-5, atol=1e-7, msg=name)
    for found in (two, three):  # in 4 steps
        assert found["whole"]["messages"] == {"gloo:all_gather": 4 * SHAPES}
        assert found["shards"]["messages"] == {"gloo:all_to_all": 4 * 2 * SHAPES}


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_matrices_have_unique_owners(n: int, world_size: int) -> None:
    matrices = [Matrix("w", 0, rows, 4, 9) for rows in range(1, n + 1)]
    shares = [owned(matrices, rank, world_size) for rank in range(world_size)]
    assert [matrix for share in shares for matrix in share] == matrices
    assert max(map(len, shares)) == -(-n // world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize(("start", "n_rows", "total"), [(0, 13, 13), (5, 5, 13), (8, 5, 13), (0, 1, 2)])
def test_local_rows_match_torch_chunks(start: int, n_rows: int, total: int, world_size: int) -> None:
    matrix, rows = Matrix("w", start, n_rows, 4, total), torch.arange(total)
    chunks = [*rows.chunk(world_size), *[rows[:0]] * world_size][:world_size]
    found = torch.cat([chunk[matrix.local_rows(rank, world_size)] for rank, chunk in enumerate(chunks)])
    assert found.tolist() == list(range(start, start + n_rows))
