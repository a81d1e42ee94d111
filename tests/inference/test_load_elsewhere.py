"""Folders of transformers and models of the Hub, used where a run could be named: the same text, and no run is made."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.hub_server import HubServer
from support.saved_checkpoints import KINDS, Save

from myllm.cli.main import main as myllm
from myllm.errors import UserError
from myllm.hub.export.transformers import export_transformers
from myllm.inference.completion import generate
from myllm.inference.load import find_model, load_model


@pytest.fixture
def exported(save: Save, tmp_path: Path) -> Path:
    return export_transformers(save(KINDS["qwen3"]), tmp_path / "my models" / "an export", say=lambda _: None).folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_exported_folder_matches_run(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(exported)
    expected = generate(load_model("made", "cpu"), "the river", 8, temperature=0)
    assert generate(load_model(exported, "cpu"), "the river", 8, temperature=0) == expected
    monkeypatch.chdir(tmp_path)
    words = ["--prompt", "the river", "--max-new-tokens", "8", "--temperature", "0", "--num-samples", "1"]
    myllm(["sample", str(exported), *words])
    assert expected in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("the river ran under the old bridge")
    myllm(["eval", str(exported), "--tasks", "perplexity:text.txt"])
    external = json.loads((tmp_path / "eval.json").read_text())
    myllm(["eval", "made", "--tasks", "perplexity:text.txt"])
    own = json.loads((tmp_path / "temp_data/runs/made/eval.json").read_text())
    (external, own) = (report["results"][0] for report in (external, own))
    assert external["metrics"]["loss"] == pytest.approx(own["metrics"]["loss"], abs=1e-6)
    assert (external["step"], own["step"]) == (None, 7)
    assert files_of(exported) == before
    assert [path.name for path in (tmp_path / "temp_data/runs").iterdir()] == ["made"]
    with pytest.raises(SystemExit):
        myllm(["eval", str(exported), "--tasks", "cloze"])
    assert "does not record its training data; choose a data set with --dataset" in capsys.readouterr().err


def test_hub_model(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with HubServer() as hub, hub.reached(monkeypatch, tmp_path / "hf"):
        hub.models.add("someone/model", files_of(exported) | {"onnx/model.onnx": b"of no use here"}, tag="step-7")
        hub.models.add("someone/model", files_of(exported) | {"config.json": b"{}"})
        hub.cut_next("/cdn/.*safetensors", 100_000)
        expected = generate(load_model("made", "cpu"), "the river", 8, temperature=0)
        assert generate(load_model("someone/model@step-7", "cpu"), "the river", 8, temperature=0) == expected
        assert find_model("hub:someone/model@step-7").home == Path()
        assert not hub.seen("onnx/model")
        myllm(["import", "someone/model@step-7"])
        assert "imported as run model" in capsys.readouterr().out
        assert generate(load_model("model", "cpu"), "the river", 8, temperature=0) == expected
        for source, message in (
            ("someone/model", "has model_type None"),
            ("someone/nothing", "no model of that name on the Hub"),
            ("someone/model@later", "has no revision 'later'"),
        ):
            with pytest.raises(UserError, match=message):
                load_model(source)
        hub.down()
        assert generate(load_model("someone/model@step-7", "cpu"), "the river", 8, temperature=0) == expected  # kept
        with pytest.raises(UserError, match=r"cannot download other/model from the Hub"):
            load_model("other/model")


def test_run_takes_precedence_over_external_model(save: Save, temp_data: Path, tmp_path: Path) -> None:
    """Also where its only checkpoint is damaged, or none is there yet: no other model is taken for it."""
    folder = save(KINDS["qwen3"])
    (temp_data / "runs/made/config.json").write_text("{}")
    assert find_model("made").folder == find_model(temp_data / "runs/made").folder == folder
    assert find_model(folder).home == temp_data / "runs/made"
    (folder / "weights/__0_0.distcp").write_bytes(b"no")
    with pytest.raises(UserError, match="is intact"):
        find_model(temp_data / "runs/made")
    (temp_data / "runs/new").mkdir()
    (temp_data / "runs/new/config.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match="no checkpoint at"):
        find_model("new")


def test_loading_does_not_import_transformers_or_matplotlib() -> None:
    names = "('matplotlib', 'transformers', 'datasets')"
    code = f"import sys, myllm.inference.load; print([x for x in {names} if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout.strip() == "[]"
