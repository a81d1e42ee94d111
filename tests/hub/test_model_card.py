"""The model card: every figure against the files it comes from, and nothing private."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.kinds import by_optimizer
from support.published_run import REPO, write_run

from myllm.config import DataConfig, HubConfig, RunConfig
from myllm.hub import publish as publishing
from myllm.hub.model_card import read_card_data, render_model_card, strip_local_paths
from myllm.paths import RunPaths


def card(run: RunPaths, step: int = 12, license: str | None = None, curves: tuple[str, ...] = ()) -> str:
    data = read_card_data(run, step, REPO, license, {"architectures": ["Qwen3ForCausalLM"], "dtype": "float32"})
    return render_model_card(data, {name: f"{name} by step" for name in curves})


def front_matter(text: str) -> dict[str, object]:
    return yaml.safe_load(text.split("---\n")[1])


def row(text: str, name: str) -> str:
    """The value of a row of the card's tables."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return line.split("|", 2)[2].strip(" |")


def test_card_describes_run(run: RunPaths) -> None:
    text = card(run, license="apache-2.0", curves=("loss", "accuracy"))
    metadata = front_matter(text)
    evals = {
        f"{result['dataset']['name']} {metric['type']}": metric["value"]
        for result in metadata.pop("model-index")[0]["results"]
        for metric in result["metrics"]
    }
    assert evals == {"cloze acc": 0.4, "cloze acc_norm": 0.36, "validation loss": 20 / 12}
    assert metadata == {
        "library_name": "transformers", "license": "apache-2.0", "pipeline_tag": "text-generation",
        "tags": ["myllm", "pretrained"],
    }  # fmt: skip
    assert text.count("\n# ") == 1
    assert "trained from scratch with MyLLM" in text
    assert f'name, revision = "{REPO}", "step-12"' in text
    assert row(text, "architecture") == "Qwen3ForCausalLM"
    assert row(text, "layers").startswith("2 of 16, feed-forward 32")
    assert row(text, "source") == "files-texts"
    assert row(text, "data set fingerprint") == f"`{'d' * 64}`"
    assert row(text, "tokens seen") == "1,536 (1.54 epochs of 1,000)"
    assert row(text, "learning rate") == "peak 0.003; linear, 3 warm-up steps, ends at 0.1 of the peak"
    assert row(text, "precision") == "bfloat16 autocast, float32 weights"  # it ran on a GPU
    assert row(text, "devices") == "8 x Some GPU"
    assert row(text, "training").startswith(f"6 s, {12 * 128 / 256 * 8 / 3600:.3g} device hours")
    assert row(text, "code") == f"commit `{'c' * 40}`, changed"
    assert "python pretrain.py debug --data.source files:texts" in text
    assert "![loss by step](plots/loss.png)" in text
    assert "](plots/accuracy.png)" in text
    assert "the river at step 12" in text
    assert "The weights have the license `apache-2.0`." in text
    assert "## Limitations" in text


def test_card_describes_muon_and_adamw(tiny: RunConfig, temp_data: Path) -> None:
    optim = replace(
        tiny.optim, optimizer="muon", muon_lr=0.02, weight_decay=0.05, decay_embeddings=False, cautious_decay=True,
        schedule="wsd", decay_shape="sqrt",
    )  # fmt: skip
    text = card(write_run(replace(tiny, optim=optim)))
    assert row(text, "optimizer") == "Muon for the matrices inside the blocks, AdamW for the rest"
    assert row(text, "Muon") == "momentum 0.95 (Nesterov), from 0.85 at the first step; update scale original"
    assert row(text, "AdamW") == "betas 0.9 and 0.95, eps 1e-08"
    assert row(text, "weight decay") == "0.05, on matrices; cautious"
    assert row(text, "learning rate") == (
        "peak 0.003, Muon's 0.02; level, then a decay (sqrt) over 0.8 of the steps, 3 warm-up steps, ends at 0.1 of "
        "the peak"
    )
    plain = card(write_run(replace(tiny, name="plain")))
    assert (row(plain, "optimizer"), row(plain, "weight decay")) == ("AdamW", "0.1, on matrices and embeddings")
    assert "Muon" not in plain


@by_optimizer
def test_card_describes_every_optimizer(tiny: RunConfig, temp_data: Path, optimizer: str) -> None:
    """hub/model_card.md has a description of each."""
    run = write_run(replace(tiny, optim=replace(tiny.optim, optimizer=optimizer)), steps=(12,))
    assert row(card(run), "optimizer").lower().startswith(optimizer)


def test_evaluation_standard_errors(run: RunPaths) -> None:
    lines = [
        line.strip("| ").split(" | ") for line in card(run).splitlines() if line.startswith(("| cloze", "| valid"))
    ]
    assert lines[0][2:] == ["40.0\N{NO-BREAK SPACE}%", "± 4.9\N{NO-BREAK SPACE}%", "100 examples"]  # as measured
    assert lines[1][3] == f"± {100 * math.sqrt(0.36 * 0.64 / 100):.1f}\N{NO-BREAK SPACE}%"
    assert lines[2][1:] == ["loss, nats per token", f"{20 / 12:.4f}", "", "4,096 held-out tokens"]


def test_earlier_step_card_excludes_later_results(run: RunPaths) -> None:
    text = card(run, 10)
    assert "This revision is step 10 of 12: training was not finished." in text
    assert "100 examples, at step 8" in text
    assert "at step 12" not in text
    assert "model-index" not in front_matter(text)  # nothing was measured at this step


def test_public_data_name_and_license(tiny: RunConfig, temp_data: Path) -> None:
    run = write_run(replace(tiny, data=DataConfig(source="fineweb-edu-10bt")), source="fineweb-edu-10bt")
    text = card(run)
    assert front_matter(text)["datasets"] == ["HuggingFaceFW/fineweb-edu"]
    assert "https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu" in row(text, "source")
    assert row(text, "license") == "ODC-By 1.0"
    assert "The weights have no license yet. Their training data has the license ODC-By 1.0." in text
    hub = DataConfig(source="hub:some/texts@main:data/*.parquet")
    other = write_run(replace(tiny, name="other", data=hub), source="hub-some-texts-data---parquet")
    assert front_matter(card(other))["datasets"] == ["some/texts"]


@pytest.mark.parametrize("recorded", ["files-texts", None])
def test_private_data_is_not_labeled_public(tiny: RunConfig, temp_data: Path, recorded: str | None) -> None:
    """Earlier versions kept the preset's source in config.json if the data set was given by name."""
    data = DataConfig(source="fineweb-edu-10bt", dataset="files-texts-0123456789ab")
    run = write_run(replace(tiny, data=data), source=recorded)
    for text in (card(run), read_card_data(run, 12, REPO, None, {}).config.data.source):
        assert "files-texts" in text
        assert not any(word in text.lower() for word in ("fineweb-edu", "odc-by", "datasets:"))


def test_card_from_checkpoint_alone(run: RunPaths) -> None:
    for path in (run.metrics, run.samples, run.environment):
        path.unlink()
    text = card(run)
    assert "## Results" not in text
    assert "## Sample" not in text
    assert row(text, "layers").startswith("2 of 16")


def test_samples_cannot_escape_code_fence(run: RunPaths) -> None:
    run.samples.write_text(json.dumps({"step": 12, "prompt": "a|b\n", "text": "```\n# Not a heading\n````", "seed": 1}))
    text = card(run)
    assert "`````text\na|b\n```\n# Not a heading\n````\n`````" in text


def test_card_includes_curves(run: RunPaths, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    publishing.add_run_files(folder, run, 8, HubConfig(REPO))
    drawn = {path.name for path in (folder / "plots").iterdir()}
    assert {"loss.png", "accuracy.png", "throughput.png"} <= drawn
    assert "loss_compact.png" not in drawn
    text = (folder / "README.md").read_text()
    assert all(f"](plots/{name})" in text for name in drawn)
    assert (folder / "plots/loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("files:/home/me/texts", "files:texts"),
        ("/home/me/pretrain.py", "pretrain.py"),
        ("~/vocabulary/tokenizer.json", "tokenizer.json"),
        ("--data.source=files:~/a/b/*.txt", "--data.source=files:*.txt"),
        ("hub:some/texts:data/*.parquet", "hub:some/texts:data/*.parquet"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("Once upon a time", "Once upon a time"),
    ],
)
def test_strip_local_paths(text: str, expected: str) -> None:
    assert strip_local_paths(text) == expected


def test_card_credits_imported_weights(run: RunPaths) -> None:
    run.imported.write_text(json.dumps({"source": "some/model@v1"}))
    text = card(run)
    assert "trained further with MyLLM from the weights of some/model@v1" in text
    assert front_matter(text)["base_model"] == "some/model"
    assert "The license of some/model@v1 also applies." in text
    assert "base model" not in text
    text = card(run, 0)
    assert "The weights of some/model@v1, imported with MyLLM and not trained further" in text
    assert "## Training" not in text
    assert "## Data" not in text


def test_command_arguments_are_quoted(run: RunPaths) -> None:
    environment = json.loads(run.environment.read_text())
    run.environment.write_text(json.dumps(environment | {"command": ["python", "pretrain.py", "--name", "my run"]}))
    assert "python pretrain.py --name 'my run'\n" in card(run)
