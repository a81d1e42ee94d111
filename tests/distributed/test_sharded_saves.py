"""Saved by two ranks, whole on each or in parts; read by one, by two and by four, into either kind."""

from pathlib import Path

import pytest
import torch
from support import warm_start
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from myllm.checkpoint.format import load_checkpoint
from myllm.checkpoint.integrity import verify_checkpoint

pytestmark = pytest.mark.slow  # real processes, half a minute and more in all

SCRIPT = Path(__file__).parent / "programs/save_on_ranks.py"


def torchrun(ranks: int, *words: str | Path) -> None:
    done = warm_start.run(SCRIPT, *words, ranks=ranks)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    torchrun(2, "save", folder)
    return folder


@pytest.mark.parametrize("kind", ["whole", "parts"])
def test_single_process_loads_two_rank_checkpoint(saved: Path, kind: str, tmp_path: Path) -> None:
    folder = saved / kind / "checkpoints/step_00000003"
    assert not list(verify_checkpoint(folder))
    expected = torch.load(saved / f"{kind}.pt", weights_only=True)
    found = load_checkpoint(folder)
    flat = {f"{name}.{key}": tensor for name, kinds in found.optimizer.items() for key, tensor in kinds.items()}
    for part, tensors in (("weights", found.model), ("optimizer", flat)):
        sizes = [(folder / part / f"__{rank}_0.distcp").stat().st_size for rank in (0, 1)]
        assert min(sizes) > 0.4 * sum(sizes)  # each wrote its share
        dcp_to_torch_save(folder / part, tmp_path / "converted.pt")  # PyTorch's own reader sees the same
        converted = torch.load(tmp_path / "converted.pt", weights_only=True)
        assert tensors.keys() == converted.keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            assert torch.equal(tensors[name], tensor), name
            assert torch.equal(converted[name], tensor), name
    assert len(found.random) == 2


@pytest.mark.slow
def test_four_ranks_load_two_rank_checkpoint(saved: Path) -> None:
    torchrun(4, "load", saved)


def test_verify_detects_missing_or_changed_shard(saved: Path) -> None:
    shard = saved / "parts/checkpoints/step_00000002/optimizer/__1_0.distcp"
    content = shard.read_bytes()
    shard.unlink()
    assert list(verify_checkpoint(shard.parents[1])) == ["optimizer/__1_0.distcp is missing"]
    shard.write_bytes(content[:-1] + b"x")
    assert list(verify_checkpoint(shard.parents[1])) == ["the content of optimizer/__1_0.distcp has changed"]
