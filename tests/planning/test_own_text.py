"""What suits a text of a given size."""

from dataclasses import replace

import pytest

from myllm.cli.launch import parse_args
from myllm.planning.config_checks import config_errors
from myllm.planning.flops import n_parameters
from myllm.planning.length import count_epochs, resolve_max_steps
from myllm.planning.own_text import PRESETS_BY_TOKENS, command_for, fit_batch, fitting_options, preset_for
from myllm.presets import get_preset


def test_larger_datasets_select_larger_presets() -> None:
    names = [preset_for(tokens)[0] for tokens in (1, 1_999_999, 2_000_000, 10**8, 3 * 10**8, 10**9, 10**12)]
    assert names == [
        "debug", "debug", "tinystories-laptop", "tinystories-laptop", "small-50m", "default-150m", "lf-llm-269m-modern",
    ]  # fmt: skip
    for tokens, name, _ in PRESETS_BY_TOKENS[2:]:
        assert tokens == pytest.approx(5 * n_parameters(get_preset(name).model), rel=0.1)
    assert "small-50m: from 250M tokens on" in preset_for(5_000_000)[1]


def test_command_names_run_and_vocabulary() -> None:
    assert command_for("files-x", 100, 50_257)[0] == "python pretrain.py debug --data.dataset files-x --name files-x"
    assert command_for("files-x", 5_000_000, 50_257)[0].endswith(" --name files-x --model.vocab-size 50257")
    assert command_for("files-x", 5_000_000, 4_096)[0].endswith(" --name files-x")


@pytest.mark.parametrize("tokens", [3 * 10**5, 1_770_000, 2 * 10**6, 10**8, 2 * 10**8, 10**9])
def test_command_covers_whole_text(tokens: int) -> None:
    config = parse_args(command_for("files-x", tokens, 4_096)[0].split()[2:]).config
    assert config.name == "files-x"
    config = resolve_max_steps(config, tokens, own_text=config.train.epochs is None)
    assert 0.99 < count_epochs(config, tokens) <= 4


@pytest.mark.parametrize("tokens", [10**4, 3 * 10**5, 10**7, 10**9])
@pytest.mark.parametrize("name", ["small-50m", "default-150m", "dolma-75m", "tinystories-laptop", "debug"])
def test_batch_follows_scaling_law(name: str, tokens: int) -> None:
    config = resolve_max_steps(get_preset(name), tokens, own_text=True)
    fitted = fit_batch(config, tokens)
    batch = fitted.train.batch_tokens
    total = min(config.train.max_steps * config.train.batch_tokens, 4 * tokens)  # a single step may be more
    law = 0.58 * total**0.571
    smallest = config.model.max_seq_len
    assert batch in (config.train.batch_tokens, smallest) or law / 2**0.5 <= batch <= law * 2**0.5
    assert batch <= config.train.batch_tokens
    assert abs(fitted.train.max_steps * batch - total) < batch
    assert not config_errors(fitted, world_size=1)
    words = ["--train.max-steps", str(fitted.train.max_steps), *fitting_options(config, tokens).split()]
    given = parse_args([name, *words]).config
    assert replace(given, model=fitted.model) == fitted


def test_presets_keep_batch_at_own_length() -> None:
    for name in ("debug", "small-50m", "tinystories-laptop"):
        assert fitting_options(get_preset(name), 10**10) == ""


def test_batch_advice_depends_on_text_size() -> None:
    config = get_preset("debug")
    advice = {
        fitting_options(replace(config, train=replace(config.train, batch_tokens=batch, max_steps=1)), 1_770_000)
        for batch in (2**24, 2**28, 2**36)
    }
    assert advice == {"--train.batch-tokens 4096"}
