"""`myllm prove-resume`: what it takes for a proof, and what it does not."""

from dataclasses import replace
from pathlib import Path

import pytest
from support import warm_start

from myllm.cli import main as cli
from myllm.cli.prove_resume.command import shrink_config
from myllm.cli.prove_resume.compare import REFERENCE, REPEATED, Result, Trial, format_results, judge_trial
from myllm.config import RunConfig
from myllm.planning.batch import batch_plan
from myllm.planning.config_checks import check_config
from myllm.presets import PRESETS, get_preset

TINY = (
    "--model.d-model 16 --model.n-layers 2 --model.n-heads 2 --model.d-ff 32 --model.max-seq-len 64 "
    "--train.batch-tokens 256 --data.target-tokens 20000 --train.max-steps 12"
)
OTHER = Trial("1 rank, 2 ranks, 1 rank", (1, 2, 1))
CPU = replace(get_preset("debug"), name="proof")


def rows(steps: int = 5, **changes: object) -> dict[int, dict[str, object]]:
    by_step = {step: {"loss": 10.0 - step, "sample_digest": f"{step:032x}"} for step in range(1, steps + 1)}
    for word, value in changes.items():
        name, _, step = word.rpartition("_")
        by_step[int(step)][name] = value
    return by_step


def errors(trial: Trial, found: dict[int, dict[str, object]], noise: float = 0.0, config: RunConfig = CPU) -> str:
    result = Result(trial, found)
    judge_trial(result, Result(REFERENCE, rows()), config, noise)
    assert ("FAILED" in format_results([Result(REFERENCE), result])) == bool(result.errors)
    return "; ".join(result.errors)


def test_judge_trial_detects_differences() -> None:
    assert errors(REPEATED, rows()) == errors(OTHER, rows()) == ""
    assert "from step 3 on, it trained on other samples" in errors(
        REPEATED, rows(sample_digest_3="0", sample_digest_5="1")
    )
    assert "other samples" in errors(OTHER, rows(sample_digest_5="0"))
    assert "steps [4, 5] are not logged" in errors(REPEATED, rows(3))
    # To the last bit on the same layout, unless the machine does not repeat itself; within a tolerance on another.
    near, far = rows(loss_4=6.0 + 1e-7), rows(loss_4=6.01)
    assert "losses differ by up to 1e-07, allowed 0" in errors(REPEATED, near)
    assert errors(REPEATED, near, noise=1e-6) == errors(OTHER, near) == ""
    assert "allowed 0.001" in errors(OTHER, far)
    assert "allowed 0.001" in errors(REPEATED, far, noise=1e-6)
    dropout = replace(CPU, model=replace(CPU.model, dropout_ffn=0.1))
    assert errors(OTHER, far, config=dropout) == ""
    assert "other samples" in errors(OTHER, rows(sample_digest_2="0"), config=dropout)
    assert errors(REPEATED, far, config=dropout) != ""


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_can_be_shrunk(name: str) -> None:
    config = shrink_config(get_preset(name))
    assert config.model == get_preset(name).model
    for world_size in (1, 2):
        check_config(config, world_size)
        batch = batch_plan(config, world_size)
    assert config.train.max_steps * batch.batch_tokens < config.data.target_tokens
    assert config.data.source == "python-stdlib", "it must work without a network"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "nonsense"),
        (["--config=absent.json"], "cannot read the config absent.json"),
        (["--config", "absent.json"], "cannot read the config absent.json"),
        (["--train.log-every-steps", "5"], "train.log_every_steps is 5"),
        (["--train.max-steps", "2"], "train.max_steps 2"),
        (["--train.batch-tokens", "256"], "micro"),
    ],
)
def test_invalid_arguments_rejected(
    words: list[str], message: str, temp_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["prove-resume", *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not temp_data.exists()


@pytest.mark.slow
def test_prove_resume_command(temp_data: Path) -> None:
    done = warm_start.run("-m", "myllm", "prove-resume", *TINY.split(), "--seed", "3", timeout=1_000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("12 of 12 equal") == 3
    assert done.stdout.count("bitwise equal") >= 2
    assert "--seed 3" in done.stdout
    assert not list(temp_data.iterdir()), "it cleans up after itself"
