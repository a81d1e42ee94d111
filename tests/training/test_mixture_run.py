"""A run on a mixture: its rows, its words, its evaluation, and what a resume refuses."""

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import eval_rows, launch, train_rows, with_train, write_corpora, write_run_config
from training.test_loop import run, run_until

from myllm.checkpoint.layout import list_checkpoints
from myllm.cli.launch import parse_args
from myllm.config import RunConfig
from myllm.data.find import find_dataset
from myllm.data.mixture.mixed_dataset import COMPONENT_BITS, MixedDataset
from myllm.data.prepare.background import check_data_names
from myllm.data.prepare.prepare import prepare
from myllm.data.sampler import DataPosition
from myllm.errors import UserError
from myllm.evals.validation import held_out_dataset
from myllm.files import read_json
from myllm.hub.model_card import read_card_data, render_model_card
from myllm.inference.load import find_model
from myllm.model.transformer import Transformer
from myllm.paths import RunPaths
from myllm.planning.batch import batch_plan
from myllm.runs.catalog import runs_by_dataset
from myllm.runs.history import read_metrics
from myllm.runs.report.evaluations import eval_columns
from myllm.runs.trackers.rows import SentRows
from myllm.training.preflight.data_and_disk import find_prepared, inspect_data_and_disk

NAMES = ("validation/files-a", "validation/files-b")


@pytest.fixture
def mixture(tiny: RunConfig, tmp_path: Path) -> RunConfig:
    a, b = write_corpora(tmp_path / "corpora", a=20, b=12)
    evals = replace(tiny.eval, validation_every_steps=3, cloze_every_steps=0, sample_every_steps=0)
    data = replace(tiny.data, source=f"{a}:0.5 {b}:0.5 @4 {a}:0.25 {b}:0.75", val_tokens=300)
    return with_train(replace(tiny, data=data, eval=evals), max_steps=6, save_every_steps=3)


def test_mixture_run(mixture: RunConfig) -> None:
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


@pytest.fixture
def still(mixture: RunConfig) -> RunConfig:
    """A run whose weights stay as they were made: every loss can be computed by hand."""
    model = replace(mixture.model, dropout_embedding=0.0, dropout_attention_residual=0.0, dropout_ffn=0.0)
    still = replace(mixture, model=model, optim=replace(mixture.optim, max_lr=1e-30))
    return with_train(still, batch_tokens=256, log_every_steps=2)


def by_hand(config: RunConfig, start: int, end: int) -> dict[str, float]:
    """In float64, over all logits: the mean loss of each component's sequences in some steps; its tokens until then."""
    dataset, found = prepare(config.data), {}
    order = dataset.order(batch_plan(config, 1))
    first, taken = (order.take(DataPosition(0, 0, config.train.seed, ""), 4 * end)[part] for part in
                    (slice(4 * start), slice(4 * start, None)))  # fmt: skip
    rows = torch.from_numpy(order.read(taken).astype(np.int64))
    with torch.no_grad():
        logits = Transformer(config.model, config.train.seed).double().eval()(rows[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(len(taken), -1)
    for number, name in enumerate(("files-a", "files-b")):
        found[f"loss/{name}"] = float(losses[taken >> COMPONENT_BITS == number].mean())
        before = sum(int((part >> COMPONENT_BITS == number).sum()) for part in (first, taken))
        found[f"tokens/{name}"] = before * config.model.max_seq_len
    return found


def check_rows(config: RunConfig, root: Path, *spans: tuple[int, int]) -> None:
    rows = {row["step"]: row for row in train_rows(root)}
    assert list(rows) == [end for _, end in spans]
    for start, end in spans:
        expected = by_hand(config, start, end)
        assert {key: rows[end][key] for key in expected} == pytest.approx(expected, rel=1e-5)
        assert rows[end]["tokens"] == sum(value for key, value in expected.items() if key.startswith("tokens/"))


def test_component_training_losses_match_reference(still: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the steps since the last row, also where a resume begins between two."""
    run_until(still, 5, monkeypatch)
    root = run(still)
    check_rows(still, root, (0, 2), (3, 4), (4, 6))
    row = read_metrics(root / "metrics.jsonl").train[0]
    assert SentRows(root / "tracker.json").take(row)["train/loss/files-a"] == row["loss/files-a"]


@pytest.mark.slow
def test_mixture_with_hf_datasets_components(mixture: RunConfig, tmp_path: Path) -> None:
    """A folder of `save_to_disk` and a CSV file beside a folder of texts: each is trained on, and measured."""
    files, more = write_corpora(tmp_path / "corpora", texts=12, more=24)
    texts = [path.read_text() for path in sorted(Path(more.removeprefix("files:")).iterdir())]
    datasets.Dataset.from_dict({"text": texts[:12]}).save_to_disk(tmp_path / "saved")
    datasets.Dataset.from_dict({"text": texts[12:]}).to_csv(tmp_path / "table" / "rows.csv")
    source = f"{files}:0.5 datasets:{tmp_path / 'saved'}:0.25 datasets:{tmp_path / 'table'}:0.25"
    config = with_train(replace(mixture, data=replace(mixture.data, source=source)), max_steps=8, batch_tokens=256)
    root, dataset = run(config), prepare(config.data)
    assert isinstance(dataset, MixedDataset)
    rows = train_rows(root)
    for label, weight in zip(dataset.labels, (0.5, 0.25, 0.25), strict=True):
        assert abs(rows[-1][f"tokens/{label}"] - weight * rows[-1]["tokens"]) <= 2 * 64
        assert any(f"loss/{label}" in row for row in rows)
        assert [row["step"] for row in eval_rows(root, f"validation/{label}")] == [0, 3, 6, 8]
    saved = dataset.tokenizer().decode(dataset.components[1].train.read(0, 200))
    assert any(saved.split("<|endoftext|>")[1] in text for text in texts[:12])


@pytest.mark.slow
def test_component_losses_are_summed_across_ranks(still: RunConfig, tmp_path: Path) -> None:
    """One of them prepares a further validation set."""
    (far,) = write_corpora(tmp_path / "far", far=6)
    config = replace(still, eval=replace(still.eval, validation_sets=(f"far={far}",)))
    done = launch("--config", write_run_config(config, tmp_path / "run.json"), ranks=2)
    assert done.returncode == 0, done.stderr
    root = RunPaths.of(still.name).root
    check_rows(still, root, (0, 2), (2, 4), (4, 6))
    assert [row["n_tokens"] for row in eval_rows(root, "validation/far")] == [256] * 3


def test_unprepared_mixture_is_not_found(mixture: RunConfig) -> None:
    assert find_prepared(mixture.data) is None
    assert inspect_data_and_disk(mixture).tokens is None


def test_exhausted_mixture_raises_before_first_step(mixture: RunConfig) -> None:
    with pytest.raises(UserError, match=r"(?s)more than train.max_epochs 4 .*repeat.*stop earlier.*re-weight"):
        run(with_train(mixture, max_steps=2_000))
    assert not RunPaths.of(mixture.name).checkpoints.exists()


def test_mixture_command_line(temp_data: Path) -> None:
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
