"""How long a run is: steps, or passes over a text whose size is known only once it is prepared."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import launch, write_corpus, write_run_config

from myllm.cli.launch import base_config, parse_args, read_config_files, uses_own_text
from myllm.config import DataConfig, RunConfig, to_dict
from myllm.data.dataset import FORMAT
from myllm.data.find import find_dataset
from myllm.data.prepare.prepare import prepare
from myllm.errors import UserError
from myllm.planning.length import describe_length, resolve_max_steps, tokens_to_resolve_max_steps
from myllm.presets import get_preset
from myllm.runs.saved_settings import keep_saved_settings

SMALL = replace(get_preset("small-50m"), data=DataConfig())
STEP = SMALL.train.batch_tokens


def steps(config: RunConfig, tokens: int, own_text: bool = False) -> int:
    return resolve_max_steps(config, tokens, own_text).train.max_steps


def test_epochs_resolve_to_steps() -> None:
    for epochs, expected in ((1.0, 10), (2.5, 25), (0.5, 5), (0.001, 1), (1_000, 10_000)):
        config = replace(SMALL, train=replace(SMALL.train, epochs=epochs))
        assert steps(config, 10 * STEP + 1) == expected
        resolved = resolve_max_steps(config, 10 * STEP + 1)
        assert resolved.train.epochs is None
        assert resolve_max_steps(resolved, 10 * STEP + 1) == resolved


def test_own_text_defaults_to_four_epochs() -> None:
    assert steps(SMALL, 10 * STEP + 1, own_text=True) == 40
    assert steps(SMALL, 10 * STEP + 1) == SMALL.train.max_steps
    assert steps(SMALL, 10**10, own_text=True) == SMALL.train.max_steps
    assert steps(SMALL, 5, own_text=True) == 1, "what is wrong with so little text is said elsewhere"


def test_tokens_needed_to_resolve_max_steps() -> None:
    assert tokens_to_resolve_max_steps(SMALL, own_text=False) == 0
    needed = tokens_to_resolve_max_steps(SMALL, own_text=True)
    assert steps(SMALL, int(needed), own_text=True) == SMALL.train.max_steps, "more text changes nothing"
    assert steps(SMALL, int(needed) - STEP, own_text=True) < SMALL.train.max_steps
    in_epochs = replace(SMALL, train=replace(SMALL.train, epochs=1.0))
    assert tokens_to_resolve_max_steps(in_epochs, own_text=False) == math.inf


def test_describe_length_warnings() -> None:
    first, many = describe_length(SMALL, 700_000)
    assert first.startswith("2,621,440,000 tokens in 20,000 steps: 3,")
    assert first.endswith("epochs of 700,000 training tokens")
    assert many.startswith("warning: 3,7")
    assert "--train.epochs 4 (21 steps)" in many
    one_step = replace(SMALL, train=replace(SMALL.train, max_steps=1))
    assert "lower train.batch_tokens" in describe_length(one_step, 21_000)[1], "no fewer steps than one"
    four = resolve_max_steps(SMALL, 700_000, own_text=True)
    _, few = describe_length(four, 700_000)
    assert few.startswith("warning: 21 steps of 131,072 tokens are few; this text suits --train.batch-tokens 2048 ")
    assert len(describe_length(SMALL, 10**9)) == 1
    assert "more than the source has" in describe_length(get_preset("small-50m"), 10**9)[1]
    assert "about 2.6" in describe_length(SMALL, 10**9, exact=False)[0]


@pytest.mark.parametrize(
    ("words", "own"),
    [
        ("small-50m", False),
        ("small-50m --data.source files:texts", True),
        ("small-50m --data.source=files:texts --name x", True),
        ("small-50m --data.dataset files-texts", True),
        ("small-50m --data.dataset files-texts --train.max-steps 5", False),
        ("small-50m --data.dataset files-texts --train.max_steps=5", False),
        ("small-50m --data.source files:texts --train.epochs 2", False),
        ("--config text.json", True),
        ("--config length.json", False),
        ("--config both.json", False),
        ("--config both.json --data.source files:texts", True),
        ("--config text.json --config length.json", False),
        ("--config=length.json --config=text.json", True),
    ],
)
def test_explicit_length_disables_own_text_default(
    words: str, own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, length = {"data": {"source": "files:texts"}}, {"train": {"max_steps": 7}}
    for name, values in (("text", text), ("length", length), ("both", text | length)):
        Path(f"{name}.json").write_text(json.dumps(values))
    assert uses_own_text(*read_config_files(words.split())) == own


def test_max_steps_and_epochs_are_exclusive(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="both set the length of the training"):
        parse_args(["debug", "--train.epochs", "2", "--train.max-steps", "5"])
    (tmp_path / "run.json").write_text(json.dumps({"train": {"epochs": 3}}))
    config = ["debug", "--config", str(tmp_path / "run.json")]
    assert parse_args(config).config.train.epochs == 3
    assert parse_args([*config, "--train.max-steps", "5"]).config.train.epochs is None
    for wrong in ("0", "-1", "nan", "inf"):
        with pytest.raises(UserError, match="epochs is"):
            parse_args(["debug", "--train.epochs", wrong])


def test_own_text_resets_preset_data_settings(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"data": {"source": "files:texts"}}))
    for name in ("small-50m", "debug", "lf-llm-269m", "dolma-75m"):
        for words in (["--data.source", "files:texts"], ["--config", str(tmp_path / "run.json")]):
            base, rest = base_config(*read_config_files([name, *words]))
            assert replace(base.data, source="files:texts") == DataConfig("files:texts"), (name, rest)
        assert (
            parse_args([name, "--data.source", "files:x", "--data.target-tokens", "5"]).config.data.target_tokens == 5
        )
        assert base_config([], [name])[0] == get_preset(name)
        same = {**to_dict(get_preset(name))["data"], "target_tokens": None}
        assert same == to_dict(RunConfig(data=DataConfig(get_preset(name).data.source)))["data"], "but for the amount"


def test_resume_keeps_dataset_and_length(tiny: RunConfig) -> None:
    """Whose defaults have changed since; a fresh one, or one on other text, takes today's."""
    run = Path(prepare(tiny.data, progress=False).folder).parent.parent / "runs" / "tiny"
    dataset = find_dataset(next(iter((run.parent.parent / "datasets").glob("files-*"))).name)
    today = replace(tiny, data=replace(tiny.data, val_tokens=77), train=replace(tiny.train, max_steps=999))
    (run / "checkpoints" / "step_00000004").mkdir(parents=True)
    (run / "checkpoints" / "step_00000004" / "manifest.json").write_text("{}")
    (run / "config.json").write_text(json.dumps(to_dict(tiny)))
    (run / "environment.json").write_text(json.dumps({"dataset": dataset.name, "dataset_hash": dataset.fingerprint}))
    config, own_text = keep_saved_settings(today, True)
    assert (config.data.dataset, config.train.max_steps, own_text) == (dataset.name, 12, False)
    assert keep_saved_settings(today, False)[0].train.max_steps == 999, "as it was said"
    assert keep_saved_settings(tiny, False) == (tiny, False), "found by its settings"
    without_prompts = replace(tiny, eval=replace(tiny.eval, sample_prompts=()))
    assert keep_saved_settings(without_prompts, False) == (tiny, False), "those that it began with"
    manifest = dataset.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(FORMAT, "myllm-shards-3"))
    assert keep_saved_settings(tiny, False)[0].data.dataset == dataset.name
    for other in (
        replace(today, data=replace(today.data, source="files:other")),
        replace(today, train=replace(today.train, fresh=True)),
        replace(today, name="another"),
    ):
        assert keep_saved_settings(other, False) == (other, False)
    (dataset.folder.parent / "files-other").mkdir()
    for given, expected in (("files", dataset.name), (dataset.name, dataset.name), ("files-other", "files-other")):
        by_name = replace(tiny, data=replace(tiny.data, dataset=given))
        assert keep_saved_settings(by_name, False)[0].data.dataset == expected
    (run / "config.json").write_text(json.dumps(to_dict(replace(tiny, optim=replace(tiny.optim, decay_fraction=0.2)))))
    assert keep_saved_settings(tiny, False)[0].optim.decay_fraction == 0.2
    assert keep_saved_settings(tiny, False, ["--optim.decay-fraction"])[0].optim.decay_fraction == 0.8


def pretrain(folder: Path, *words: str) -> str:
    done = launch("--config", folder / "run.json", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_epochs_end_to_end(tiny: RunConfig, tmp_path: Path, temp_data: Path) -> None:
    """While its text is still in the making it waits; the resolved number stays with the run."""
    write_run_config(replace(tiny, train=replace(tiny.train, max_steps=10_000)), tmp_path / "run.json")
    words = ("--data.source", f"files:{write_corpus(tmp_path / 'texts', documents=12, words=60)}")
    output = pretrain(tmp_path, *words, "--train.epochs", "0.5")
    config = json.loads((temp_data / "runs" / "tiny" / "config.json").read_text())["train"]
    tokens = find_dataset("files-texts").train.tokens
    assert config["epochs"] is None
    assert config["max_steps"] == round(0.5 * ((tokens - 1) // 64) / 2)
    assert f"{config['max_steps']} steps: 0.5" in output
    assert "with a larger --train.epochs than 0.5 it continues" in output, (
        "--train.max-steps would be refused beside it"
    )
    assert "nothing left to train" in pretrain(tmp_path, *words, "--train.epochs", "0.5")
    assert "nothing left to train" in pretrain(tmp_path, *words), "a run that was begun keeps its length"
    planned = pretrain(tmp_path, *words, "--name", "other", "--dry-run")
    assert f"steps        {4 * ((tokens - 1) // 64) // 2} steps" in planned
    assert "epochs of " in planned
