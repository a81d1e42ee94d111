"""A trained tokenizer from text to samples; tokenizers are never mixed up."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import eval_rows, losses, with_train

from myllm.cli.data import verify
from myllm.cli.main import main as myllm
from myllm.config import RunConfig, load_config
from myllm.data.find import find_dataset
from myllm.data.prepare.prepare import prepare
from myllm.data.tokenizer.load import load_tokenizer
from myllm.distributed.collectives import process_group
from myllm.errors import UserError
from myllm.hub.export.transformers import card_data, load_export_source
from myllm.hub.model_card import read_card_data, render_model_card
from myllm.inference.generate import stream_tokens
from myllm.inference.load import load_model
from myllm.inference.sampling_params import SamplingParams
from myllm.paths import RunPaths
from myllm.presets import get_preset
from myllm.runs.history import read_json_or_empty
from myllm.training.loop import train
from myllm.training.preflight.data_and_disk import find_prepared

Learn = Callable[[str, int], Path]


@pytest.fixture
def learn(corpus: Path, temp_data: Path, capsys: pytest.CaptureFixture[str]) -> Learn:
    """Train a tokenizer with the command; returns the path that it prints first."""

    def run(name: str, size: int) -> Path:
        capsys.readouterr()  # what ran before
        out = ["--out", str(temp_data / name), "--overwrite"]
        myllm(["tokenizer", "train", f"files:{corpus}", "--vocab-size", str(size), *out])
        return Path(capsys.readouterr().out.splitlines()[0])

    return run


def with_vocabulary(config: RunConfig, path: Path, size: int) -> RunConfig:
    model, data = replace(config.model, vocab_size=size), replace(config.data, tokenizer=str(path))
    return replace(config, model=model, data=data)


def run(config: RunConfig) -> Path:
    with process_group("cpu") as process:
        return train(config, prepare(config.data, progress=False), process).run.root


def test_train_and_sample_with_own_tokenizer(tiny: RunConfig, learn: Learn) -> None:
    config = with_vocabulary(tiny, learn("own", 400), 400)
    folder = run(config)
    assert list(losses(folder)) == list(range(1, 13))
    # Of 400 tokens an untrained model knows nothing: ln(400) = 5.99.
    assert eval_rows(folder, "validation")[0]["loss"] == pytest.approx(5.99, abs=0.1)
    learn("own", 300)  # what it was made from may change or go: the run and the data set have their own copies
    model, tokenizer = load_model("tiny", "cpu")
    assert tokenizer.vocab_size == 400
    prompt = [tokenizer.end_of_text, *tokenizer.encode("the river").tolist()]
    ids = stream_tokens(model, prompt, 5, SamplingParams(temperature=0))
    assert isinstance(tokenizer.decode(list(ids)), str)
    dataset = prepare(replace(tiny.data, dataset=next(folder.parents[1].glob("datasets/*-*")).name), progress=False)
    assert dataset.tokenizer().sha256 == tokenizer.sha256
    assert "Chapter" in dataset.tokenizer().decode(dataset.train.read(0, 50))


def test_mismatched_vocabularies_raise(tiny: RunConfig, learn: Learn) -> None:
    first, second = learn("first", 400), learn("second", 401)
    first_dataset = prepare(with_vocabulary(tiny, first, 400).data, progress=False)
    plain = prepare(tiny.data, progress=False)
    other = prepare(with_vocabulary(tiny, second, 401).data, progress=False)
    assert len({first_dataset.folder, plain.folder, other.folder}) == 3

    def on(config: RunConfig, name: str) -> RunConfig:
        return replace(config, data=replace(config.data, dataset=name))

    with pytest.raises(UserError, match="was made with the tokenizer bpe-400"):
        run(on(with_vocabulary(tiny, second, 401), first_dataset.name))
    with pytest.raises(UserError, match="was made with the tokenizer r50k_base"):
        run(on(with_vocabulary(tiny, first, 400), plain.name))
    with pytest.raises(UserError, match=r"model\.vocab_size is 50,257(.|\n)*set it to 400"):
        run(on(tiny, first_dataset.name))
    run(with_vocabulary(tiny, first, 400))
    # The same size, another vocabulary: a run does not go on with other data.
    same_size = learn("third", 400)
    same_size.write_text(same_size.read_text().replace('"version": "1.0"', '"version":  "1.0"'))
    with pytest.raises(UserError, match="was trained on other data"):
        run(with_vocabulary(tiny, same_size, 400))


def test_changed_vocabulary_rejected(tiny: RunConfig, learn: Learn) -> None:
    dataset = prepare(with_vocabulary(tiny, learn("own", 400), 400).data, progress=False)
    file = dataset.folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"version": "1.0"', '"version":  "1.0"'))
    with pytest.raises(UserError, match="was prepared with another vocabulary"):
        find_dataset(dataset.name).tokenizer()
    with pytest.raises(UserError, match="was prepared with another vocabulary"):
        verify(dataset.name)
    assert RunPaths.of("tiny").root.parent.name == "runs"


def test_run_records_source_and_vocabulary(tiny: RunConfig, learn: Learn, temp_data: Path, tmp_path: Path) -> None:
    """Not the preset's source, but the source of the data set that was given by name."""
    config = with_vocabulary(tiny, learn("own", 400), 400)
    dataset = prepare(replace(config.data, strip_control=True), progress=False)
    given = replace(get_preset("lf-llm-269m").data, dataset=dataset.name[:-3], workers=1)
    folder = run(replace(with_train(config, max_steps=2), data=given))
    saved = load_config(folder / "config.json", RunConfig())
    assert saved.data.source == config.data.source
    assert (saved.data.dataset, saved.data.strip_control) == (dataset.name, True)
    assert load_config(folder / "checkpoints/step_00000002/config.json", RunConfig()) == saved
    assert read_json_or_empty(folder / "environment.json")["tokenizer"] == dataset.tokenizer().describe()

    vocabulary = dataset.tokenizer()
    moved = temp_data.rename(tmp_path / "moved")  # and it works where everything was moved
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYLLM_DATA", str(moved))
        assert load_tokenizer(saved.data.tokenizer).sha256 == vocabulary.sha256
        assert load_tokenizer(dataset.folder / "tokenizer.json").sha256 == vocabulary.sha256  # as it was called before
        run(with_train(saved, max_steps=3))
        run_folder = RunPaths.of("tiny")
        text = render_model_card(read_card_data(run_folder, 3, "me/mine", None, {}))
        source = load_export_source(run_folder.checkpoints / "step_00000003")
    short = render_model_card(card_data(source, {}))
    for card in (text, short):
        assert "files-" in card or "files:" in card
        assert not any(word in card.lower() for word in ("fineweb", "odc-by", "r50k", "gpt-2", "datasets:"))
    assert vocabulary.name in text
    assert "control characters removed" in text


def test_preparation_trains_tokenizer(tiny: RunConfig, learn: Learn, temp_data: Path) -> None:
    """The same as that of `myllm tokenizer train`, and the same each time: from the text to a repaired shard."""
    data = replace(tiny.data, tokenizer="train:400")
    assert find_prepared(data) is None
    dataset = prepare(data, progress=False)
    assert (dataset.folder / "tokenizer.json").read_bytes() == learn("own", 400).read_bytes()
    assert find_prepared(data).folder == dataset.folder

    shutil.rmtree(temp_data / "tokenizers")
    assert prepare(data, progress=False).folder == dataset.folder
    shutil.rmtree(temp_data / "tokenizers")
    next(dataset.folder.glob("train*")).write_bytes(b"")
    verify(dataset.name, repair=True)

    config = with_train(replace(tiny, data=data, model=replace(tiny.model, vocab_size=400)), max_steps=2)
    folder = run(config)
    saved = load_config(folder / "config.json", RunConfig())
    assert saved.data.tokenizer in ("train:400", f"datasets/{dataset.name}/tokenizer.json")
    assert load_model(str(folder)).tokenizer.sha256 == dataset.tokenizer().sha256
    with pytest.raises(UserError, match="set it to 400"):
        run(with_train(replace(config, model=tiny.model, name="other"), max_steps=2))


def test_train_tokenizer_requires_vocab_size(tiny: RunConfig) -> None:
    for size, message in (("", "no number of tokens"), ("many", "no number of tokens"), ("3", "vocab_size is 3")):
        with pytest.raises(UserError, match=message):
            prepare(replace(tiny.data, tokenizer=f"train:{size}"), progress=False)
    with pytest.raises(UserError, match="exists only once data is prepared"):
        load_tokenizer("train:400")
