"""DDP and FSDP2 on two ranks give what one rank gives: gradients, norms, losses, weights, whole runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import eval_rows, launch, losses, train_rows, with_train, write_run_config
from support import warm_start

from myllm.checkpoint.layout import list_checkpoints
from myllm.config import RunConfig
from myllm.inference.load import load_model
from myllm.runs.logs import JsonlFile

pytestmark = pytest.mark.slow  # real processes, half a minute and more in all

SCRIPT = Path(__file__).parent / "programs/train_sharded.py"


def results(folder: Path, ranks: int, *cases: str) -> dict[str, dict]:
    """The results by case, after checking that all ranks agree."""
    folder.mkdir()
    done = warm_start.run(SCRIPT, folder, *cases, ranks=ranks if ranks > 1 else None)
    assert done.returncode == 0, done.stderr
    found = {}
    for case in cases:
        found[case], *others = (torch.load(folder / f"{case}-rank{rank}.pt") for rank in range(ranks))
        for other in others:
            for key in ("losses", "norms", "scores"):
                assert other[key] == found[case][key], (case, key)
            for key in ("gradients", "weights", "moments"):
                assert all(torch.equal(other[key][name], value) for name, value in found[case][key].items())
            found[case]["parts"] = found[case]["part"] + other["part"]
    return found


def assert_close(mine: dict, other: dict, tolerance: float) -> None:
    for key in ("losses", "norms", "scores"):
        assert len(mine[key]) == 5
        assert mine[key] == pytest.approx(other[key], rel=tolerance), key
    for key in ("gradients", "weights", "moments"):
        assert mine[key].keys() == other[key].keys()
        for name, value in other[key].items():
            difference = (mine[key][name] - value).norm() / value.norm()
            assert difference < 10 * tolerance, f"{key} of {name} differ by {difference:.1e}"


def test_fsdp_and_ddp_match_single_rank(tmp_path: Path) -> None:
    """With two micro-steps per step, tied and untied embeddings, gradient clipping and decay groups."""
    alone = results(tmp_path / "one", 1, "ddp", "modern")
    two = results(tmp_path / "two", 2, "ddp", "fsdp", "modern", "ddp-bfloat16", "fsdp-bfloat16")
    one = alone["ddp"]
    assert min(one["norms"]) > 0.1, "the norm is meant to be clipped"
    assert_close(two["ddp"], one, 1e-5)
    assert_close(two["fsdp"], one, 1e-5)
    assert_close(two["modern"], alone["modern"], 1e-5)
    # In bfloat16 both round alike but for the norms' weights, which travel in bfloat16.
    assert_close(two["fsdp-bfloat16"], two["ddp-bfloat16"], 5e-3)
    assert two["fsdp-bfloat16"]["losses"] != two["fsdp"]["losses"]
    for case in ("fsdp", "fsdp-bfloat16"):
        assert all(weight.dtype == torch.float32 for weight in two[case]["weights"].values())
        assert two[case]["parts"] == one["part"]  # each weight is on one rank alone
        assert two[case]["kept_bytes"] == 0  # of what the evaluations saw


def test_muon_matches_across_rank_counts(tmp_path: Path) -> None:
    """It orthogonalizes in bfloat16 where that is fast, which turns a difference in the last bit into one of 1 %."""
    one = results(tmp_path / "one", 1, "ddp-muon")["ddp-muon"]
    for ranks in (2, 4):
        found = results(tmp_path / str(ranks), ranks, "ddp-muon", "fsdp-muon")
        for case in found.values():
            assert case["losses"] == pytest.approx(one["losses"], rel=1e-3)
            for name, weight in one["weights"].items():
                assert (case["weights"][name] - weight).norm() < 1e-2 * weight.norm(), name


def test_first_step_gradients_match_later_steps(tmp_path: Path) -> None:
    """On three ranks, where the order of a sum depends on the bucket: restarts are bit-identical."""
    done = warm_start.run(SCRIPT.with_name("repeat_gradients.py"), tmp_path, ranks=3)
    assert done.returncode == 0, done.stderr
    for rank in range(3):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found == {"ddp": [True, True], "fsdp": [True, True]}


def test_compiled_engines_match_eager(tmp_path: Path) -> None:
    cases = "ddp-compiled", "ddp-compiled-recomputed", "fsdp-compiled", "fsdp-compiled-recomputed"
    (one,) = results(tmp_path / "one", 1, "ddp").values()
    for found in results(tmp_path / "two", 2, *cases).values():
        assert_close(found, one, 1e-4)


def test_fsdp_run_matches_ddp_run(tiny: RunConfig, tmp_path: Path, temp_data: Path) -> None:
    """A whole run on FSDP with recomputed activations and dropout is the one on DDP: losses, every evaluation, samples,
    the best checkpoint, which opens everywhere."""
    evals = replace(tiny.eval, validation_every_steps=2, validation_tokens=320)  # five sequences: unequal shares
    base = replace(with_train(tiny, max_steps=6, early_stop_patience=9), eval=evals)
    base = with_train(base, batch_tokens=256)
    for name, changes in (("ddp", {}), ("fsdp", {"parallel": "fsdp", "activation_checkpointing": True})):
        config = replace(with_train(base, **changes), name=name)
        done = launch("--config", write_run_config(config, tmp_path / f"{name}.json"), ranks=2)
        assert done.returncode == 0, done.stderr
    ddp, fsdp = temp_data / "runs/ddp", temp_data / "runs/fsdp"
    assert losses(fsdp) == pytest.approx(losses(ddp), rel=1e-5)
    assert [row["grad_norm"] for row in train_rows(fsdp)] == pytest.approx(
        [row["grad_norm"] for row in train_rows(ddp)], rel=1e-4
    )
    for name in ("validation", "cloze"):
        mine, other = eval_rows(fsdp, name), eval_rows(ddp, name)
        assert [row["step"] for row in mine] == [row["step"] for row in other]
        for a, b in zip(mine, other, strict=True):
            a, b = ({key: v for key, v in row.items() if isinstance(v, float | int)} for row in (a, b))
            assert a | {"seconds": 0} == pytest.approx(b | {"seconds": 0}, rel=1e-4)
    assert "failed" not in (fsdp / "log.txt").read_text()
    texts = [[row["text"] for row in JsonlFile(run / "samples.jsonl").rows()] for run in (fsdp, ddp)]
    assert texts[0] == texts[1]
    assert list_checkpoints(fsdp / "best")[0].name == list_checkpoints(ddp / "best")[0].name
    mine, other = (load_model(run)[0].state_dict() for run in (fsdp, ddp))
    assert all(torch.allclose(mine[name], other[name], rtol=1e-3, atol=1e-6) for name in other)
