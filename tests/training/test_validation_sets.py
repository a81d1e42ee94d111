"""Further validation sets: their rows, early stopping by one of them, and what is refused before a run."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import eval_rows, with_train, write_corpora
from training.test_loop import run

from myllm import paths
from myllm.cli.launch import parse_args
from myllm.config import RunConfig
from myllm.data.dataset import Dataset
from myllm.data.prepare import prepare as preparation
from myllm.data.prepare.prepare import prepare
from myllm.errors import UserError
from myllm.evals.validation_sets import check_validation_sets
from myllm.paths import RunPaths


@pytest.fixture
def two(tiny: RunConfig, tmp_path: Path) -> RunConfig:
    """A run on one text, validated on two others too; `same` is its own."""
    evals = replace(tiny.eval, validation_every_steps=3, cloze_every_steps=0, sample_every_steps=0)
    other, _ = write_corpora(tmp_path / "corpora", a=20, b=2)
    own = prepare(tiny.data, progress=False)
    far = prepare(replace(tiny.data, source=str(other), val_tokens=300), progress=False)
    sets = (f"same={own.name}", f"far={far.name}")
    return with_train(replace(tiny, eval=replace(evals, validation_sets=sets)), max_steps=9)


def test_validation_sets_have_own_rows(two: RunConfig) -> None:
    root = run(two)
    rows = {name: eval_rows(root, name) for name in ("validation", "validation/same", "validation/far")}
    for name in rows:
        assert [row["step"] for row in rows[name]] == [0, 3, 6, 9]
    for whole, same, far in zip(*rows.values(), strict=True):
        figures = {key: value for key, value in whole.items() if key not in ("name", "seconds")}
        assert figures == {key: value for key, value in same.items() if key not in ("name", "seconds")}
        assert far["loss"] != same["loss"]
        assert {"bits_per_byte", "token_accuracy"} <= far.keys()


def test_early_stop_on_validation_set(two: RunConfig) -> None:
    """The best step is that of the set, and best/ holds it."""
    root = run(with_train(two, early_stop_patience=9, early_stop_on="far"))
    losses = {row["step"]: row["loss"] for row in eval_rows(root, "validation/far") if row["step"]}
    assert (
        f"{min(losses.values()):.4f}, at step {min(losses, key=losses.__getitem__)}" in (root / "log.txt").read_text()
    )
    assert [path.name for path in RunPaths(root).best.iterdir()] == [f"step_{min(losses, key=losses.__getitem__):08d}"]


def test_validation_source_is_prepared_once(tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first tokens, whole and once; early stopping knows its name."""
    far, _ = write_corpora(tmp_path / "corpora", a=6, b=2)
    evals = replace(tiny.eval, validation_every_steps=2, cloze_every_steps=0, sample_every_steps=0)
    evals = replace(evals, validation_sets=(f"far={far}",), validation_tokens=512)
    config = with_train(replace(tiny, eval=evals), max_steps=2, early_stop_patience=9, early_stop_on="far")
    check_validation_sets(config)
    root = run(config)
    assert [row["n_tokens"] for row in eval_rows(root, "validation/far")] == [512, 512]
    assert f"validation set far: at most 513 tokens of {far}" in (root / "log.txt").read_text()
    assert "kept in" in (root / "log.txt").read_text()

    # The tokens are those of its documents, one after the other; only the two that had to be held out are missing.
    (folder,) = {path.parent for path in paths.datasets_dir().glob("files-a-*/manifest.json")}
    dataset = Dataset.open(folder)
    assert (dataset.train.tokens, dataset.val.tokens) == (513, 2)
    texts = [path.read_text() for path in sorted((tmp_path / "corpora" / "a").iterdir())]
    for piece in dataset.tokenizer().decode(dataset.train.read(0, 513)).split("<|endoftext|>")[1:]:
        assert any(piece in text for text in texts)
    monkeypatch.setattr(preparation, "_build", lambda *_: pytest.fail("prepared again"))
    run(with_train(config, max_steps=4))


@pytest.mark.slow
def test_known_source_is_reused_on_resume(tiny: RunConfig) -> None:
    """Its name begins that of the data set which the first start made."""
    evals = replace(tiny.eval, validation_sets=("code=python-stdlib",), cloze_every_steps=0, sample_every_steps=0)
    for steps in (1, 2):
        root = run(with_train(replace(tiny, eval=evals), max_steps=steps))
    assert [row["n_tokens"] for row in eval_rows(root, "validation/code") if row["step"] in (0, 2)] == [256, 256]


def test_training_source_as_validation_set_raises(two: RunConfig) -> None:
    with pytest.raises(UserError, match=r"the run trains on files:.* itself; its held-out part"):
        run(replace(two, eval=replace(two.eval, validation_sets=(f"own={two.data.source}",))))


@pytest.mark.parametrize(("text", "message"), [("files:/nowhere", "/nowhere"), ("fles:/a", "unknown source 'fles:/a'")])
def test_invalid_source_raises_before_reading(tiny: RunConfig, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_validation_sets(replace(tiny, eval=replace(tiny.eval, validation_sets=(f"x={text}",))))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["code"], "expected NAME=DATASET"),
        (["code="], "expected NAME=DATASET"),
        (["a/b=x"], "expected NAME=DATASET"),
        (["code=x", "code=y"], "has the name code twice"),
    ],
)
def test_malformed_validation_sets_raise(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_args(["debug", "--eval.validation-sets", *words])


def test_early_stop_on_without_patience_raises() -> None:
    with pytest.raises(UserError, match=r"train\.early_stop_patience is None: nothing stops"):
        parse_args(["debug", "--train.early-stop-on", "code"])


def test_unusable_validation_sets_raise(two: RunConfig) -> None:
    with pytest.raises(UserError, match="no prepared data set 'nothing'"):
        run(replace(two, eval=replace(two.eval, validation_sets=("x=nothing",))))
    with pytest.raises(UserError, match=r"train\.early_stop_on is 'other', which is no validation set of this run"):
        run(with_train(two, early_stop_patience=2, early_stop_on="other"))
    longer = replace(two, model=replace(two.model, max_seq_len=512), train=replace(two.train, batch_tokens=512))
    with pytest.raises(UserError, match="too few for one sequence of 512"):
        run(longer)
