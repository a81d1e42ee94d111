"""A run on a mixture: its rows, its words, its evaluation, and what a resume refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import eval_rows, train_rows, with_train, write_corpora
from training.test_loop import run

from myllm.checkpoint.layout import list_checkpoints
from myllm.cli.launch import parse_args
from myllm.config import RunConfig
from myllm.data.find import find_dataset
from myllm.data.mixture.mixed_dataset import MixedDataset
from myllm.data.prepare.background import check_data_names
from myllm.data.prepare.prepare import prepare
from myllm.errors import UserError
from myllm.evals.validation import held_out_dataset
from myllm.files import read_json
from myllm.hub.model_card import read_card_data, render_model_card
from myllm.inference.load import find_model
from myllm.paths import RunPaths
from myllm.runs.catalog import runs_by_dataset
from myllm.runs.history import read_metrics
from myllm.runs.report.evaluations import eval_columns
from myllm.training.preflight.data_and_disk import find_prepared, inspect_data_and_disk

NAMES = ("validation/files-a", "validation/files-b")


@pytest.fixture
def mixture(tiny: RunConfig, tmp_path: Path) -> RunConfig:
    a, b = write_corpora(tmp_path / "corpora", a=20, b=12)
    evals = replace(tiny.eval, validation_every_steps=3, cloze_every_steps=0, sample_every_steps=0)
    data = replace(tiny.data, source=f"{a}:0.5 {b}:0.5 @4 {a}:0.25 {b}:0.75", val_tokens=300)
    return with_train(replace(tiny, data=data, eval=evals), max_steps=6, save_every_steps=3)


def test_a_run_on_a_mixture(mixture: RunConfig) -> None:
    root = run(mixture)
    log = (root / "log.txt").read_text()
    dataset = prepare(mixture.data)
    assert isinstance(dataset, MixedDataset)

    # Each component has its rows, and the mean by the final weights is the validation loss.
    rows = {name: {row["step"]: row for row in eval_rows(root, name)} for name in ("validation", *NAMES)}
    for step in (0, 3, 6):
        whole, first, second = (rows[name][step] for name in ("validation", *NAMES))
        assert whole["loss"] == pytest.approx(0.25 * first["loss"] + 0.75 * second["loss"], rel=1e-12)
        assert whole["n_tokens"] == first["n_tokens"] + second["n_tokens"]
        assert first["train_tokens"] + second["train_tokens"] == 128 * step
        assert "components" not in whole
        assert first["loss"] != second["loss"]
    assert "  files-a: " in log
    assert "validation/files-b: loss" in log

    # What the run says about its data.
    environment = read_json(root / "environment.json")
    assert environment["dataset_hash"] == dataset.fingerprint
    assert [part["name"] for part in environment["components"]] == ["files-a", "files-b"]
    assert environment["source"] == "files-a:0.5 files-b:0.5 @4 files-a:0.25 files-b:0.75"
    state = read_json(list_checkpoints(root / "checkpoints")[0] / "state.json")
    assert state["data"] == {"epoch": 0, "index": 12, "seed": mixture.train.seed, "dataset_hash": dataset.fingerprint}

    # The name is the data set's own, and evaluations find the text again.
    saved = read_json(root / "config.json")["data"]["dataset"]
    assert find_dataset(saved).fingerprint == dataset.fingerprint
    source = find_model(str(root))
    assert held_out_dataset(source, dataset.tokenizer(), None).fingerprint == dataset.fingerprint
    found = inspect_data_and_disk(mixture)
    assert found.tokens == dataset.known_train_tokens
    assert found.describe_length(mixture)[1].startswith("  files-a: ")

    # The report has a column for each, and the card their epochs.
    titles = [(column.group, column.title) for column in eval_columns(read_metrics(root / "metrics.jsonl"))]
    assert [title for title in titles if title[0] in NAMES] == [(name, "loss") for name in NAMES]
    assert titles.count(("", "epochs")) == 2
    card = render_model_card(read_card_data(RunPaths(root), 6, "me/mine", None, {}))
    assert "| epochs | files-a 0.0" in card
    assert "files-a:0.5 files-b:0.5 @4" in card
    assert set(runs_by_dataset()) == {component.name for component in dataset.components}

    # More steps continue; other weights do not.
    run(with_train(mixture, max_steps=7))
    assert [row["step"] for row in train_rows(root)] == list(range(1, 8))
    other = replace(mixture.data, source=mixture.data.source.replace("0.25", "0.35").replace("0.75", "0.65"))
    with pytest.raises(UserError, match="was trained on other data than"):
        run(with_train(replace(mixture, data=other), max_steps=8))


def test_a_mixture_that_is_not_all_prepared_is_not_found(mixture: RunConfig) -> None:
    assert find_prepared(mixture.data) is None
    assert inspect_data_and_disk(mixture).tokens is None


def test_running_dry_is_said_before_the_first_step(mixture: RunConfig) -> None:
    with pytest.raises(UserError, match=r"(?s)more than train.max_epochs 4 .*repeat.*stop earlier.*re-weight"):
        run(with_train(mixture, max_steps=2_000))
    assert not RunPaths.of(mixture.name).checkpoints.exists()


def test_the_command_line(temp_data: Path) -> None:
    args = parse_args(["debug", "--data.source", "python-stdlib:0.5 c4:0.5"])
    assert not args.own_text
    check_data_names(args.config.data)
    with pytest.raises(UserError, match="need one vocabulary, and train:512 would learn one for each"):
        check_data_names(replace(args.config.data, tokenizer="train:512"))
    with pytest.raises(UserError, match="unknown source 'nowhere'"):
        check_data_names(replace(args.config.data, source="python-stdlib:0.5 nowhere:0.5"))
    with pytest.raises(UserError, match=r"must add up to 1, but 0\.5 \+ 0\.4 = 0\.9"):
        parse_args(["debug", "--data.source", "python-stdlib:0.5 c4:0.4"])
    with pytest.raises(UserError, match=r"set the length of a mixture with --train\.max-steps"):
        parse_args(["debug", "--data.dataset", "A:0.5 B:0.5", "--train.epochs", "2"])
