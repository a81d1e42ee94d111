"""`myllm data ...` as it is typed: what it prints, what it makes, and how it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest

from myllm.cli.main import main as myllm
from myllm.data.sources.catalog import CORPORA
from myllm.errors import UserError
from myllm.formatting import parse_count, parse_target

pytestmark = pytest.mark.usefixtures("temp_data", "in_process")


@pytest.fixture
def run_data(capsys: pytest.CaptureFixture[str]):
    """Run a command; what it printed on the standard output."""

    def run(*words: str | Path) -> str:
        myllm(["data", *map(str, words)])
        return capsys.readouterr().out

    return run


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    with pytest.raises(SystemExit) as ended:
        myllm(["data", *map(str, words)])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_parse_count_and_target() -> None:
    for text, expected in {
        "10BT": 10**10, "10B": 10**10, "500M": 5 * 10**8, "2.5e9": 25 * 10**8, "1_000_000": 10**6, "1,000": 1_000,
        "7": 7, "1.5k": 1_500, "2T": 2 * 10**12, "0": 0,
    }.items():  # fmt: skip
        assert parse_count(text) == expected, text
    for text in ("", "ten", "-5", "1.5", "10GBT", "B", "1e", "10 B T", "1e400", "1e308B", "9" * 5_000):
        with pytest.raises(UserError, match="for example 10BT"):
            parse_count(text)
    assert parse_target("10GB") == ("bytes", 1e10)
    assert parse_target("10BT") == ("tokens", 1e10)
    assert parse_target("1.5 MB") == ("bytes", 1.5e6)
    assert parse_target("300MT") == ("tokens", 3e8)
    for text in ("10", "10BB", "GB", "0GB", "-1GB", "10 parrots", "1e400GB", "1e308TT"):
        with pytest.raises(UserError, match="such as 10GB"):
            parse_target(text)


def test_list_shows_known_and_prepared_sources(run_data, mixed_corpus: Path, temp_data: Path) -> None:
    shown = run_data("list")
    for corpus in CORPORA.values():
        row = next(line for line in shown.splitlines() if line.startswith(f"{corpus.name} "))
        assert corpus.license in row
        assert corpus.tokens in row
        assert f"{corpus.name}: {corpus.description}" in shown
    assert "hub:NAMESPACE/NAME" in shown
    assert "files:PATH" in shown
    assert "no prepared data sets yet" in shown
    folder = Path(run_data("prepare", f"files:{mixed_corpus}", "--val-tokens", "500").splitlines()[0])
    (temp_data / "datasets" / "broken").mkdir()
    (temp_data / "datasets" / "broken" / "settings.json").write_text("{}")
    shown = run_data("list")
    states = {line.split()[0]: line.split()[-1] for line in shown.splitlines() if line}
    assert (states[folder.name], states["broken"]) == ("complete", "incomplete")


def test_prepare_accepts_all_options(run_data, mixed_corpus: Path) -> None:
    options = [
        "--val-tokens", "500", "--target-tokens", "500K", "--shard-tokens", "10K",
        "--no-shuffle-files", "--shuffle-seed", "3", "--normalize-unicode", "--strip-control", "--min-chars", "20",
        "--dedup-exact", "--text-column", "text", "--workers", "1", "--keep-downloads", "--max-documents", "400",
    ]  # fmt: skip
    folder = Path(run_data("prepare", f"files:{mixed_corpus}", *options).splitlines()[0])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["shard_tokens"] == 10_000
    assert manifest["cleaning"] == {
        "normalise_unicode": True, "strip_control": True, "min_chars": 20, "dedup_exact": True
    }  # fmt: skip
    assert (manifest["shuffle_seed"], manifest["target_tokens"], manifest["max_documents"]) == (None, 500_000, 400)
    assert manifest["counts"]["duplicates_dropped"] > 0
    assert manifest["counts"]["passed_over"]["too_short"] > 0


def test_max_documents_spans_both_splits(run_data, mixed_corpus: Path) -> None:
    folder = Path(run_data("prepare", f"files:{mixed_corpus}", "--max-documents", "40").splitlines()[0])
    counts = json.loads((folder / "manifest.json").read_text())["counts"]
    assert counts["val_documents"] + counts["train_documents"] == 40
    assert 1 <= counts["val_documents"] <= 4
    assert 10 * counts["val_tokens"] <= counts["val_tokens"] + counts["train_tokens"]


def test_less_held_out_than_asked_for_is_said(run_data, mixed_corpus: Path) -> None:
    assert "val has less" not in run_data("prepare", f"files:{mixed_corpus}")
    assert "val has less than --val-tokens 90,000,000" in run_data(
        "prepare", f"files:{mixed_corpus}", "--val-tokens", "90000000"
    )


def test_worker_shards_verify_repair_and_show(run_data, mixed_corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = (f"files:{mixed_corpus}", "--val-tokens", "500", "--shard-tokens", "5K")
    whole = Path(run_data("prepare", *source).splitlines()[0])
    before = {path.name: path.read_bytes() for path in whole.glob("*.npy")}
    for path in sorted(whole.rglob("*"), reverse=True):
        path.unlink()
    whole.rmdir()
    for shard in ("2/2", "1/2"):
        assert f"myllm data merge {whole.name}" in run_data("prepare", *source, "--shard", shard)
    assert Path(run_data("merge", whole.name).splitlines()[0]) == whole
    assert {path.name: path.read_bytes() for path in whole.glob("*.npy")} == before

    assert "match the manifest" in run_data("verify", whole.name)
    (whole / "train_00001.npy").write_bytes(b"damaged")
    assert "train_00001.npy; `myllm data verify" in refused(capsys, "verify", whole.name)
    assert "match the manifest" in run_data("verify", whole.name, "--repair")
    assert (whole / "train_00001.npy").read_bytes() == before["train_00001.npy"]

    tokens = np.load(whole / "train_00000.npy")
    shown = run_data("show", whole.name, "--sequence", "0", "--seq-len", "50")
    assert "tokens 0 to 50" in shown
    assert "--- token 0: a document begins" in shown
    second = int(np.flatnonzero(tokens == 50_256)[1])
    assert f"at token {second:,}" in run_data("show", whole.name, "--document", "1")
    assert run_data("show", whole.name, "--sequence", "0", "--seq-len", "50", "--train-seed", "1") != shown


def test_estimate_prints_all_figures(run_data, mixed_corpus: Path) -> None:
    shown = run_data("estimate", f"files:{mixed_corpus}", "--target", "10MT", "--workers", "4")
    for name in ("documents", "text", "tokens", "tokens per byte", "to read", "shards on disk", "tokenizing"):
        assert f"\n  {name} " in shown, name
    assert "10M" in shown
    assert "20.0 MB" in shown
    assert "with 4 processes" in shown
    assert "times the source" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("prepare", "files:x", "--target-tokens", "many"), "invalid number 'many'"),
        (("prepare", "files:x", "--max-documents", "0"), "data.max_documents is 0"),
        (("prepare", "files:x", "--min-chars", "-1"), "data.min_chars is -1"),
        (("prepare", "python-stdlib", "--shard", "3/2"), "for example 3/16"),
        (("prepare", "python-stdlib", "--tokenizer", "nowhere.json"), "no tokenizer 'nowhere.json'"),
        (("prepare", "finewebedu"), "did you mean 'fineweb-edu-10bt'"),
        (("estimate", "python-stdlib", "--target", "10"), "such as 10GB"),
        (("show", "x"), "give --document N or --sequence N"),
        (("show", "x", "--document", "-1"), "numbers from 0"),
        (("show", "x", "--document", "1", "--split", "test"), "train or val"),
        (("merge", "nothing"), "no prepared data set"),
        (("verify", "nothing"), "no prepared data set"),
    ],
)
def test_invalid_arguments_report_error(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *words)


def test_unsupported_datasets_format_reports_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.xml").write_text("<rows><text>one</text></rows>")
    for command in ("prepare", "estimate"):
        run_data = refused(capsys, command, f"datasets:{tmp_path}/rows.xml")
        assert "with its module 'xml', expected one of" in run_data
        assert "`files:PATH --suffix .xml .html` reads other kinds of text as it is" in run_data
        assert "Traceback" not in run_data
