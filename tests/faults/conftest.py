"""What the tests of faults share: runs in forks, a run that nothing happened to, and how one is compared with it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_config, with_small_vocabulary, with_train, write_run_config
from support.fault_runs import Forks, Goes, Record, assert_tidy, record, run_of

from myllm.config import RunConfig
from myllm.data.dataset import Dataset
from myllm.data.prepare.prepare import prepare


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for all tests of a module, with a temp_data/ in it."""
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYLLM_DATA", str(folder / "temp_data"))
        yield folder


@pytest.fixture(scope="module")
def config(corpus: Path, place: Path) -> RunConfig:
    """Eight steps with a save every two: dropout, validation and all. A rank's share of a save has 0.4 MB."""
    base = with_train(with_small_vocabulary(tiny_config(corpus)), max_steps=8, save_every_steps=2, keep_last=2)
    # Few shards, so that the run reads from each of them.
    base = replace(base, model=replace(base.model, d_model=64), data=replace(base.data, shard_tokens=24_000))
    # Some tests begin with fewer steps, of which a warm-up takes at most a quarter.
    base = replace(base, optim=replace(base.optim, warmup_steps=1, min_lr_ratio=1.0))
    return replace(base, eval=replace(base.eval, validation_every_steps=4, cloze_every_steps=0, sample_every_steps=0))


@pytest.fixture(scope="module")
def dataset(config: RunConfig) -> Dataset:
    return prepare(config.data, progress=False)


@pytest.fixture(scope="module")
def forks(place: Path, dataset: Dataset) -> Iterator[Forks]:
    server = Forks(place, place / "temp_data")
    yield server
    server.process.stdin.close()
    assert server.process.wait(120) == 0


@pytest.fixture(scope="module")
def config_file(config: RunConfig, place: Path) -> Path:
    return write_run_config(config, place / "config.json")


@pytest.fixture(scope="module")
def whole(forks: Forks, config_file: Path, place: Path) -> Record:
    """Loss and receipt by step of a run that nothing happened to."""
    assert forks(config_file, "--name", "whole").code == 0
    rows = record(run_of(place, "whole"))
    assert len({receipt for _, receipt in rows.values()}) == 8
    return rows


@pytest.fixture
def goes_on(forks: Forks, config_file: Path, place: Path, whole: Record) -> Goes:
    """The same command once more: the run ends as the one that nothing happened to, and leaves nothing lying about."""

    def check(name: str) -> None:
        done = forks(config_file, "--name", name)
        assert done.code == 0, done.said
        assert record(run_of(place, name)) == whole
        assert_tidy(run_of(place, name).root)

    return check
