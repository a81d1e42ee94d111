"""The rehearsal of a run: what it measures, what it makes of that, and that it leaves everything as it was."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import log, nan
from pathlib import Path
from stat import S_ISDIR
from typing import Any

import pytest
import torch
from conftest import ROOT, losses, tiny_config, with_train, write_run_config
from support import warm_start

from myllm import paths
from myllm.cli.main import main
from myllm.config import RunConfig, load_config
from myllm.data.prepare.prepare import prepare
from myllm.data.tokenizer.load import load_tokenizer
from myllm.distributed import precision
from myllm.distributed.collectives import DistContext
from myllm.errors import UserError
from myllm.evals import registry
from myllm.evals.tasks import TASKS
from myllm.files import TEMP_SUFFIX
from myllm.planning.disk import checkpoint_bytes
from myllm.planning.forecast import CPU_TOKENS, MPS_TOKENS, Hardware, candidate_sizes, describe, predict
from myllm.presets import get_preset
from myllm.training.loop import train
from myllm.training.preflight import batch_size, rehearsal, summary
from myllm.training.preflight.batch_size import (
    largest_that_fits,
    measure_peak_bytes,
    resolve_micro_batch_size,
    save_for_run,
)
from myllm.training.preflight.data_and_disk import DataAndDisk, find_prepared, inspect_data_and_disk
from myllm.training.preflight.device_memory import peak_bytes, reset_peak
from myllm.training.preflight.rehearsal import preflight
from myllm.training.preflight.scratch import random_dataset, scratch_folder
from myllm.training.preflight.summary import Limits, Measurements, PreflightResult, count_due

CPU = torch.device("cpu")
ALONE = DistContext(0, 0, 1, CPU)
OVERSIZED = ROOT / "tests/support/oversized_micro_batch.py"
HELLASWAG = Path(__file__).parents[2] / "evals/hellaswag_own.jsonl"


def content(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Every file and folder below; of files, what shows that one was touched."""
    stats = {str(path): path.stat() for path in folder.rglob("*")}
    return {name: None if S_ISDIR(stat.st_mode) else (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.fixture(scope="module")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Evaluations of every kind."""
    base, folder = tiny_config(corpus), tmp_path_factory.mktemp("rows")
    files = {name: folder / f"{name}.jsonl" for name in ("winogrande", "lambada")}
    for name, file in files.items():
        file.write_text(json.dumps(TASKS[name].sample))
    evals = replace(
        base.eval, hellaswag_every_steps=6, hellaswag_file=str(HELLASWAG),
        tasks=tuple(f"{name}:{file}" for name, file in files.items()),
    )  # fmt: skip
    return replace(base, eval=evals)


@pytest.fixture(scope="module")
def rehearsed(
    config: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PreflightResult, Path, dict, dict]]:
    """One rehearsal beside a prepared data set and a run that has begun, with what was there before and after."""
    folder = tmp_path_factory.mktemp("preflight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYLLM_DATA", str(folder))
        dataset = prepare(config.data, progress=False)
        train(with_train(config, max_steps=4), dataset, ALONE)
        before = content(folder)
        torch.manual_seed(3)
        random = torch.get_rng_state()
        result = preflight(config, ALONE, Limits(dollars_per_hour=36), lambda line: None)
        assert torch.equal(torch.get_rng_state(), random)
        yield result, folder, before, content(folder)


def test_rehearsal_leaves_files_unchanged(rehearsed) -> None:
    _, _, before, after = rehearsed
    assert after == before


def test_measurements(rehearsed, config: RunConfig) -> None:
    result, folder, _, _ = rehearsed
    measured = result.measured
    assert abs(measured.loss - log(50_257)) < 0.2  # it knows nothing yet
    assert measured.finite
    assert measured.steps == 3
    assert measured.fraction == 1
    assert 0 < measured.step_s < 30
    assert measured.evals.keys() == {"validation", "cloze", "hellaswag", "winogrande", "lambada", "samples"}
    assert not any(failure for _, failure in measured.evals.values())
    assert 16 * checkpoint_bytes(config) / 12 < measured.peak_bytes < 8e9
    real = folder / "runs/tiny/checkpoints/step_00000004"
    assert (
        abs(measured.checkpoint_bytes - sum(path.stat().st_size for path in real.rglob("*") if path.is_file())) < 2_000
    )
    assert result.steps_done == 4
    assert result.problems() == []
    assert result.storage.tokens_are_exact
    assert result.storage.shards_bytes == 0


def test_result_table(rehearsed) -> None:
    result, *_ = rehearsed
    output = result.table()
    total = sum(result.seconds_left.values())
    for words in (
        "preflight of tiny on 1 x",
        "1 sequences x 64 tokens",
        "of one rank (estimate 0.3",
        "(median of 3)",
        "after step 4",
    ):
        assert words in output
    assert f"cost left    ${total / 100:,.2f} at $36.00 per hour" in output


def test_preflight_does_not_change_run(config: RunConfig, temp_data: Path) -> None:
    dataset = prepare(config.data, progress=False)
    short = with_train(config, max_steps=2)
    train(replace(short, name="without"), dataset, ALONE)
    preflight(short, ALONE, Limits(), lambda line: None)
    train(replace(short, name="with"), dataset, ALONE)
    assert losses(temp_data / "runs/with") == losses(temp_data / "runs/without")


# -- arithmetic, against figures made by hand -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "done", "max_steps", "times"),
    [(10, 0, 100, 11), (10, 0, 95, 11), (10, 41, 100, 6), (10, 40, 100, 7), (0, 0, 100, 0), (500, 1, 100, 1)],
)
def test_count_due(every: int, done: int, max_steps: int, times: int) -> None:
    """As `Eval.due` says it, step by step."""
    assert count_due(every, done, max_steps) == times
    assert times == sum(every > 0 and (s % every == 0 or s == max_steps) for s in range(done, max_steps + 1))


@pytest.fixture
def result(config: RunConfig) -> PreflightResult:
    """100 steps of 2 s, 4 of them behind; two batches of validation of 1 s at 10 steps; saves of 3 s."""
    train = replace(config.train, max_steps=100, save_every_steps=50, keep_last=3)
    evals = replace(config.eval, validation_every_steps=10, validation_tokens=128)
    data = replace(config.data, target_tokens=1_000_000, val_tokens=128)
    room = DataAndDisk(Path("/disk"), 10**9, 2_000_000, 0, 0, 2_000_000, True, "the text")
    measured = Measurements(2.0, 3, 1.0, 10.8, 1.0, evals={"validation": (1.0, "")}, save_s=3.0, checkpoint_bytes=10**8)
    whole = replace(config, train=train, eval=evals, data=data)
    return PreflightResult(whole, ALONE, Limits(), room, 2**30, 4, measured)


def test_seconds_left(result: PreflightResult) -> None:
    assert result.seconds_left == {"training": 192.0, "validation": 20.0, "saves": 6.0}
    assert result.problems() == []


def test_memory_estimate_depends_on_compilation(result: PreflightResult, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_train(result.config, compile="auto")
    on_card = replace(result, config=config, dist=DistContext(0, 0, 1, torch.device("cuda")))
    output = []
    for works in (True, False):
        monkeypatch.setattr(summary, "has_triton", lambda device, works=works: works)
        output.append(on_card._memory_line())
    assert output[0] != output[1]


def test_max_hours_exceeded(result: PreflightResult) -> None:
    (problem,) = replace(result, limits=Limits(max_hours=0.02)).problems()
    # 72 s of 218 s are 33 % of the 96 steps ahead.
    assert "0.06 more hours, but --max-hours is 0.02; lower train.max_steps from 100 to 35, or raise" in problem
    assert replace(result, limits=Limits(max_hours=0.07)).problems() == []


def test_insufficient_disk_space(result: PreflightResult) -> None:
    """Two checkpoints and one in the making, 100 MB each, and 2 MB of shards; 250 MB free."""
    tight = replace(result, storage=replace(result.storage, free_bytes=250_000_000))
    (problem,) = tight.problems()
    assert "not enough disk space at /disk: 302.0 MB to write" in problem
    assert "250.0 MB free, 52.0 MB missing; lower train.keep_last from 3, or lower data.target_tokens, or" in problem
    assert replace(result, storage=replace(result.storage, free_bytes=302_000_000)).problems() == []
    resumed = replace(tight.storage, run_bytes=100_000_000)  # what a resumed run has saved already
    assert replace(tight, storage=resumed).problems() == []


def test_too_little_text_is_noted(result: PreflightResult) -> None:
    """Training takes what there is, and so does its rehearsal; both say it."""
    few = replace(result.storage, tokens=600_000)
    short, note = replace(result, storage=few), "note: data.target_tokens 1,000,000 is more than the source has"
    assert short.problems() == []
    assert note in short.table()
    assert note not in replace(result, storage=replace(few, tokens_are_exact=False)).table()  # it may be so far off
    assert replace(result, storage=replace(few, tokens=None)).problems() == []


def test_out_of_memory_suggests_micro_batch_size(result: PreflightResult) -> None:
    (problem,) = replace(result, measured=None, out_of_memory=True, fitting_size=4).problems()
    assert "train.micro_batch_size 1 needs more than the 1.00 GiB that one rank may use; set it to 4" in problem
    (problem,) = replace(result, measured=None, out_of_memory=True).problems()
    assert "not even one sequence of model.max_seq_len 64 fits in the 1.00 GiB" in problem


def test_failed_evaluation_is_reported(result: PreflightResult) -> None:
    failed = replace(result.measured, evals={"samples": (1.0, "the samples evaluation failed at step 3: x; more")})
    assert replace(result, measured=failed).problems() == [
        "the samples evaluation failed at step 3: x; lower train.micro_batch_size, or set eval.sample_every_steps to 0"
    ]


# -- what really goes wrong -------------------------------------------------------------------------------------------


def test_nonfinite_first_step_is_reported(config: RunConfig, temp_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "train_step", lambda *_: (torch.tensor(nan), torch.tensor(1.0), 0.0))
    (problem,) = preflight(config, ALONE, Limits(), lambda line: None).problems()
    assert "the first step is not finite (loss nan, gradient norm 1.0): lower optim.max_lr 0.003" in problem


def test_preflight_detects_failing_evaluation(
    config: RunConfig, temp_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setitem(registry.EVALUATIONS, "cloze", lambda inputs: registry.Evaluation({}, failing, dict))
    (problem,) = preflight(config, ALONE, Limits(), lambda line: None).problems()
    assert "the cloze evaluation failed" in problem
    assert "eval.cloze_every_steps to 0" in problem


@pytest.mark.slow
def test_oversized_micro_batch_suggests_fitting_size(config: RunConfig, tmp_path: Path, temp_data: Path) -> None:
    """A limit half-way between what one and eight sequences take: the number that the refusal names fits."""
    # Much to keep for the backward pass, little to compute.
    model = replace(config.model, max_seq_len=256, n_layers=16, d_ff=2_048)
    off = {f"{name}_every_steps": 0 for name in ("validation", "cloze", "hellaswag", "sample")}
    wide = replace(
        with_train(config, batch_tokens=8 * 256, micro_batch_size=8), model=model, eval=replace(config.eval, **off)
    )
    done = warm_start.run(OVERSIZED, write_run_config(wide, tmp_path / "wide.json"), timeout=380)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    one, eight = found["peaks"]
    assert eight - one > 900e6, "the peak of one size varies by more than 100 MB with the heap's fragmentation"
    assert found["out_of_memory"]
    assert found["fitting_size"] in (1, 2, 4)
    assert f"set it to {found['fitting_size']}, the largest that fits" in found["problems"][0]
    assert found["auto"] in (1, 2, 4)
    assert "error: out of memory: not even one sequence" in found["refusal"]
    assert list(temp_data.parent.glob(".preflight.*")) == []


def test_oversized_cpu_model_is_rejected_before_allocation(temp_data: Path) -> None:
    """320M parameters and their moments in 1 GiB: refused before any is made."""
    large = with_train(get_preset("lf-llm-269m"), device="cpu")
    result = preflight(large, ALONE, Limits(), lambda line: None, 2**30)
    assert result.out_of_memory
    assert any("not even one sequence of model.max_seq_len 2,048 fits in the 1.00 GiB" in r for r in result.problems())


def test_reset_peak_forgets_freed_memory() -> None:
    """512 MB more are seen, and no longer once they are given back; the rest of the process may vary by 200 MB."""
    reset_peak(CPU)
    before = peak_bytes(CPU)
    block = torch.ones(128 << 20)
    assert peak_bytes(CPU) - before > 300e6
    del block
    reset_peak(CPU)
    assert peak_bytes(CPU) - before < 200e6


# -- the largest that fits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "expected", "tried"),
    [
        (1_000, 16, [1, 2, 16]),  # 200 + 20 a sequence: all fit
        (460, 8, [1, 2, 8]),
        (359, 4, [1, 2, 4]),
        (225, 1, [1, 2]),
        (219, None, [1]),
    ],
)
def test_largest_that_fits(limit: int, expected: int | None, tried: list[int]) -> None:
    measured_sizes: list[int] = []

    def measure(size: int) -> int | None:
        measured_sizes.append(size)
        peak = 200 + 20 * size
        return peak if peak <= limit else None

    assert largest_that_fits([1, 2, 4, 8, 16], measure, limit) == expected
    assert measured_sizes == tried


def test_largest_that_fits_with_nonlinear_memory() -> None:
    """A size that the line promised and the device refused, and one that it did not expect: 4 in the end."""
    peaks = {1: 100, 2: 110, 4: 180, 8: None, 16: None}
    measured_sizes: list[int] = []
    assert largest_that_fits(list(peaks), lambda size: measured_sizes.append(size) or peaks[size], 200) == 4
    assert measured_sizes == [1, 2, 8, 4]


def test_candidate_sizes_divide_batch(config: RunConfig) -> None:
    twelve = with_train(config, batch_tokens=12 * 64)
    assert candidate_sizes(twelve, 1, "cpu") == [1, 2, 3, 4, 6, 12]
    assert candidate_sizes(twelve, 1, "cpu", val_tokens=5 * 64) == [1, 2, 3, 4]
    assert candidate_sizes(twelve, 2, "cpu") == [1, 2, 3, 6]
    assert candidate_sizes(with_train(config, batch_tokens=128 * 64), 1, "cpu")[-1] == CPU_TOKENS // 64
    assert candidate_sizes(with_train(config, batch_tokens=128 * 64), 1, "cuda")[-1] == 128
    large = with_train(config, batch_tokens=1_024 * 64)
    assert [candidate_sizes(large, 1, device)[-1] for device in ("cuda", "mps")] == [1_024, 256]
    assert 256 * 64 <= MPS_TOKENS < 512 * 64


@pytest.mark.slow
def test_auto_micro_batch_size_persists_across_resume(config: RunConfig, temp_data: Path) -> None:
    """The number is in the run's config.json, a resume takes it, and losses are those of a run that was given it."""
    config = replace(config, optim=replace(config.optim, warmup_steps=1, min_lr_ratio=1.0))  # for any max_steps
    auto = with_train(config, micro_batch_size="auto", batch_tokens=256, max_steps=8)
    dataset = prepare(config.data, progress=False)

    def run_auto(config: RunConfig) -> None:
        config, note = resolve_micro_batch_size(
            config, dataset.tokenizer(), ALONE, dataset.val.tokens, use_preflight=True
        )
        train(config, dataset, ALONE, notes=[note])

    run_auto(with_train(auto, max_steps=4))
    run = temp_data / "runs/tiny"
    chosen = json.loads((run / "config.json").read_text())["train"]["micro_batch_size"]
    assert chosen == 4
    assert f"micro_batch_size auto: {chosen}, the largest of 1, 2, 4 that fits" in (run / "log.txt").read_text()
    run_auto(auto)
    assert f"micro_batch_size auto: {chosen}, as this run began" in (run / "log.txt").read_text()
    assert "changed since then: train.micro_batch_size" not in (run / "log.txt").read_text()
    train(replace(with_train(auto, micro_batch_size=chosen), name="whole"), dataset, ALONE)
    assert losses(run) == losses(temp_data / "runs/whole")


@pytest.mark.slow
def test_run_reuses_preflight_micro_batch_size(
    config: RunConfig, tmp_path: Path, temp_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The preflight's command and then the run: no size is tried a second time."""
    auto = with_train(config, micro_batch_size="auto", batch_tokens=256, max_steps=2)
    main(["preflight", "--config", str(write_run_config(auto, tmp_path / "auto.json"))])
    assert not (temp_data / "runs").exists()
    monkeypatch.setattr(batch_size, "memory_probe", lambda *_: pytest.fail("a size was tried again"))
    dataset = prepare(config.data, progress=False)
    resolved, note = resolve_micro_batch_size(auto, dataset.tokenizer(), ALONE, dataset.val.tokens, use_preflight=True)
    train(resolved, dataset, ALONE, notes=[note])
    assert "micro_batch_size auto: 4, from the preflight" in (temp_data / "runs/tiny/log.txt").read_text()
    assert json.loads((temp_data / "runs/tiny/config.json").read_text())["train"]["micro_batch_size"] == 4


@pytest.mark.slow
def test_preflight_micro_batch_size_requires_matching_conditions(
    config: RunConfig, temp_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = with_train(config, micro_batch_size="auto", batch_tokens=256)
    monkeypatch.setattr(batch_size, "memory_probe", lambda *_: lambda size: size)  # finds 4, the largest
    tokenizer = load_tokenizer("r50k_base")

    def taken(config: RunConfig, limit: int = 2**30, val_tokens: int | None = None, use_preflight: bool = True) -> int:
        resolved, reason = resolve_micro_batch_size(config, tokenizer, ALONE, val_tokens, limit, use_preflight)
        assert ("from the preflight" in reason) == (resolved.train.micro_batch_size == 2)
        return resolved.train.micro_batch_size

    save_for_run(with_train(auto, micro_batch_size=2), ALONE, 2**29)
    assert taken(auto) == 2
    assert taken(with_train(auto, max_steps=9, seed=5, fresh=True)) == 2  # which no memory depends on
    assert taken(auto, use_preflight=False) == 4
    assert taken(auto, limit=2**28) == 4  # there is less memory now than it took
    assert taken(auto, val_tokens=65) == 1  # there is no batch of 2 to validate with
    assert taken(with_train(auto, precision="bfloat16")) == 4
    assert taken(replace(auto, model=replace(auto.model, n_layers=1))) == 4
    assert taken(replace(auto, name="other")) == 4
    file = paths.micro_batch_file(auto.name)
    saved = json.loads(file.read_text())
    odd = [{"device_name": "a card"}, {"torch": "2.0"}, {"world_size": 8}, {"micro_batch_size": 3}]
    odd += [{"micro_batch_size": "2"}, {"micro_batch_size": True}, {"peak_bytes": None}, {"more": 1}]
    for text in (*(json.dumps(saved | change) for change in odd), "[]", "{", "", "\0"):
        file.write_text(text)
        assert taken(auto) == 4
    file.unlink()
    file.mkdir()
    assert taken(auto) == 4


# -- the config and the command line ----------------------------------------------------------------------------------


def test_auto_micro_batch_in_config_and_plan(config: RunConfig, tmp_path: Path) -> None:
    path = write_run_config(with_train(config, micro_batch_size="auto"), tmp_path / "auto.json")
    assert load_config(path, RunConfig()).train.micro_batch_size == "auto"
    path.write_text('{"train": {"micro_batch_size": "most"}}')
    with pytest.raises(UserError, match=r"train\.micro_batch_size: expected an integer or 'auto', found 'most'"):
        load_config(path, RunConfig())
    output = describe(predict(with_train(config, micro_batch_size="auto", batch_tokens=256), Hardware(1)))
    assert "4 sequences x 64 tokens x 1 rank(s) x 1 accumulation step(s) = 256 tokens per step" in output
    assert "auto: training takes the largest micro-batch that fits of 1, 2, 4; the memory below is for 4" in output


def test_preflight_command(
    config: RunConfig, tmp_path: Path, temp_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_run_config(config, tmp_path / "tiny.json"))
    main(["preflight", "--config", path, "--eval.hellaswag-every-steps", "0"])
    assert "time left" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["preflight", "--config", path, "--max-hours", "1e-9", "--train.micro-batch-size", "auto"])
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert "but --max-hours is 1e-09; raise --max-hours to" in output.err
    assert "micro_batch_size auto: 2" in output.out
    with pytest.raises(SystemExit) as caught:
        main(["preflight", "--config", path, "--max-hours", "-1"])
    assert caught.value.code == 2
    assert "--max-hours is -1.0, but must be above 0" in capsys.readouterr().err
    assert not temp_data.exists()


# -- the disk and the text --------------------------------------------------------------------------------------------


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in (["preflight", "--help"], 0), (["preflight"], 2):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == code
        assert "usage: myllm preflight PRESET" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["preflight", "debug", "--help"])
    output = capsys.readouterr().out
    assert "usage: myllm preflight debug" in output
    assert "--dry-run" not in output


def test_find_prepared_matches_data_settings(config: RunConfig, temp_data: Path) -> None:
    assert find_prepared(config.data) is None
    with pytest.raises(UserError, match="no text found"):
        preflight(replace(config, data=replace(config.data, source="files:/nowhere")), ALONE, Limits(), print)
    room = inspect_data_and_disk(config)
    assert (room.tokens_are_exact, room.run_bytes) == (False, 0)
    dataset = prepare(config.data, progress=False)
    assert abs(room.tokens / dataset.train.tokens - 1) < 0.5
    assert find_prepared(config.data).folder == dataset.folder
    assert find_prepared(replace(config.data, workers=7)).folder == dataset.folder  # which changes no byte
    assert find_prepared(replace(config.data, min_chars=3)) is None
    assert find_prepared(replace(config.data, suffixes=(".rst",))) is None
    assert inspect_data_and_disk(config).tokens == dataset.train.tokens
    large = with_train(config, batch_tokens=64 * 1_024)
    with pytest.raises(UserError, match="fewer than the 1,024 of one step"):
        preflight(large, ALONE, Limits(), print)


def test_public_corpus_size_needs_no_download(config: RunConfig, temp_data: Path) -> None:
    corpus = replace(config.data, source="fineweb-edu-10bt", target_tokens=None)
    room = inspect_data_and_disk(replace(config, data=corpus))
    assert (room.tokens, room.tokens_are_exact) == (10_000_000_000, False)
    assert room.downloads_bytes == 8_000_000_000
    assert not temp_data.exists()


def test_stale_scratch_folders_are_removed(temp_data: Path) -> None:
    runs = temp_data / "runs"
    killed, somebodys = runs / f".preflight.{'0' * 16}{TEMP_SUFFIX}", runs / ".preflight.notes"
    for folder in (killed, somebodys):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    with scratch_folder(ALONE) as folder:
        assert set(runs.iterdir()) == {folder, somebodys}
        with scratch_folder(ALONE) as other:  # of another process
            assert set(runs.iterdir()) == {folder, other, somebodys}
    assert list(runs.iterdir()) == [somebodys]


# `myllm preflight` that never completes its first step.
ENDLESS = """
import sys, time
from myllm.cli.main import main
from myllm.training.preflight import rehearsal
rehearsal.train_step = lambda *_: time.sleep(600)
main(["preflight", *sys.argv[1:]])
"""


def test_sigterm_removes_scratch_folder(config: RunConfig, tmp_path: Path) -> None:
    """SIGTERM in the middle of it: the folder goes, as at its own end."""
    path = write_run_config(config, tmp_path / "tiny.json")
    (tmp_path / "data/runs").mkdir(parents=True)
    words = [sys.executable, "-c", ENDLESS, "--config", str(path)]
    environment = os.environ | {"MYLLM_DATA": str(tmp_path / "data")}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "data/runs").glob(".preflight.*/dataset/manifest.json")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 143, stderr
    assert "Traceback" not in stderr
    assert list((tmp_path / "data/runs").iterdir()) == []


def test_rehearsal_uses_training_functions() -> None:
    """What a rehearsal does goes through the functions that `train` calls."""
    from myllm.training import loop, services

    for name, owner in {
        "run_eval": loop, "build_evals": services, "AsyncSaver": services, "full_params": loop, "build": loop,
        "train_step": loop,
    }.items():  # fmt: skip
        assert getattr(rehearsal, name) is getattr(owner, name)


@pytest.mark.usefixtures("one_rank", "temp_data")
@pytest.mark.parametrize("kind", ["trial", "rehearsal", "benchmark"])
def test_compiles_and_steps_with_same_matmul_precision(
    kind: str, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With DDP too, which compiles before the first step: else what is measured is not what runs."""
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(precision, "may_use_tf32", lambda *_: True)
    step, pair = rehearsal.train_step, replace(ALONE, world_size=2)

    def compiled(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        seen.append(("compile", torch.get_float32_matmul_precision()))
        return graph

    def stepped(*arguments: Any) -> Any:
        seen.append(("step", torch.get_float32_matmul_precision()))
        return step(*arguments)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiled))
    for module in (rehearsal, batch_size):
        monkeypatch.setattr(module, "train_step", stepped)
    monkeypatch.setattr(rehearsal, "_time_checkpoint", lambda *_: (0.0, 0.0, 0))  # of two ranks, where there is one
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    ways = importlib.import_module("throughput_ways")
    monkeypatch.setattr(ways, "train_step", stepped)
    config = with_train(config, compile="on")
    with scratch_folder(pair) as folder, ExitStack() as stack:
        torch.compiler.reset()
        dataset = random_dataset(config, folder, load_tokenizer("r50k_base"), pair)
        if kind == "trial":
            assert measure_peak_bytes(with_train(config, micro_batch_size=1), dataset, pair, 2**40)
        elif kind == "benchmark":
            ways.ours(config, pair, dataset, stack, print).step()
        else:
            assert preflight(config, pair, Limits(), limit_bytes=2**40).measured.finite
    assert {kind for kind, _ in seen} == {"compile", "step"}
    assert {setting for _, setting in seen} == {"high"}
    assert torch.get_float32_matmul_precision() == "highest"
