"""The cells of a ladder: their models, rates, warm-ups and names, and what is refused before anything is trained."""

from dataclasses import replace
from pathlib import Path

import pytest

from myllm.cli.ladder import plan
from myllm.cli.ladder.rates import RecipeRates, read_rates, write_rates
from myllm.cli.main import main
from myllm.config import RunConfig
from myllm.data.find import find_dataset
from myllm.errors import UserError
from myllm.planning.flops import n_parameters
from myllm.presets import get_preset

RECIPES = ["lf-llm-269m", "lf-llm-269m-modern", "lf-llm-269m-adamw"]


@pytest.fixture
def grid(prepared_data: None) -> plan.Grid:
    return plan.Grid("g", find_dataset("files"), (16, 32), (2_560, 5_120), 2, 8, 32, 128, 256)


def cells_of(grid: plan.Grid, rates: RecipeRates | None = None) -> list[plan.Cell]:
    recipes = plan.load_recipes(RECIPES)
    return plan.plan_cells(recipes, grid, dict.fromkeys(recipes, rates or RecipeRates(2_560)), seeds=2)


def test_cells_paired_and_preserve_recipe_settings(grid: plan.Grid) -> None:
    cells = cells_of(grid)
    assert len(cells) == len({cell.config.name for cell in cells}) == 3 * 2 * 2 * 2
    for cell in cells:
        recipe, config = get_preset(cell.recipe), cell.config
        assert (config.model.d_model, config.model.n_layers, config.model.n_heads) == (cell.width, 2, cell.width // 8)
        assert config.model.d_ff == 4 * cell.width  # 4,096 / 1,024
        assert config.model.vocab_size == grid.dataset.manifest["tokenizer"]["vocab_size"]
        for name in ("bias", "qk_norm", "init", "dropout_ffn", "tie_embeddings"):
            assert getattr(config.model, name) == getattr(recipe.model, name)
        assert config.optim.schedule == recipe.optim.schedule
        assert cell.tokens == config.train.max_steps * 128
    by_place: dict[tuple, list[RunConfig]] = {}
    for cell in cells:
        by_place.setdefault((cell.width, cell.tokens, cell.seed), []).append(cell.config)
    for configs in by_place.values():
        assert len(configs) == 3
        assert len({(c.train.seed, c.train.batch_tokens, c.data, c.eval) for c in configs}) == 1
    # The first paired seed comes first, so that a stopped ladder can be compared.
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


def test_size_counts_matrices_and_head(grid: plan.Grid) -> None:
    model = replace(cells_of(grid)[0].config.model, bias=False, qk_norm=False)
    norms = (2 * model.n_layers + 1) * model.d_model
    assert plan.count_matrices(model) == n_parameters(model) - norms  # the tied embedding is the head


def test_warmup_scales_with_run_length(grid: plan.Grid) -> None:
    steps = {(cell.recipe, cell.config.train.max_steps): cell.config.optim for cell in cells_of(grid)}
    assert {key: optim.warmup_steps for key, optim in steps.items()} == {
        ("lf-llm-269m", 20): 1, ("lf-llm-269m", 40): 1,  # 226 / 19,073
        ("lf-llm-269m-modern", 20): 1, ("lf-llm-269m-modern", 40): 1,  # 40 / 7,630
        ("lf-llm-269m-adamw", 20): 5, ("lf-llm-269m-adamw", 40): 10,  # 2,000 / 7,630, at most a quarter
    }  # fmt: skip
    assert steps["lf-llm-269m-modern", 40].muon_momentum_warmup_steps == round(40 * 300 / 7_630)


def test_rates_scale_with_length_and_width() -> None:
    optim = get_preset("lf-llm-269m-modern").optim
    rates = RecipeRates(1_000, {64: {"max_lr": 0.02, "muon_lr": 0.04}, 16: {"max_lr": 0.04, "muon_lr": 0.01}})
    assert rates.at(optim, 64, 1_000).max_lr == 0.02
    assert rates.at(optim, 32, 1_000).max_lr == pytest.approx(0.02 * 2**0.5)
    assert rates.at(optim, 256, 1_000).max_lr == pytest.approx(0.01)  # width^-1/2 goes on
    assert rates.at(optim, 256, 1_000).muon_lr == pytest.approx(0.04)  # never rises
    steep = RecipeRates(1_000, {16: {"max_lr": 0.08}, 32: {"max_lr": 0.01}})
    assert steep.at(optim, 64, 1_000).max_lr == pytest.approx(0.005)  # width^-1 at most
    longer = rates.at(optim, 64, 4_000)
    assert longer.max_lr == pytest.approx(0.02 * 4**-0.32)
    assert longer.max_lr * longer.weight_decay * 4 == pytest.approx(0.02 * optim.weight_decay)
    assert RecipeRates(1_000).at(optim, 64, 1_000) == optim


def test_more_seeds_and_lengths_preserve_cells(grid: plan.Grid) -> None:
    recipes = plan.load_recipes(RECIPES[:2])
    rates = dict.fromkeys(recipes, RecipeRates(2_560))
    few = {cell.config.name: cell.config for cell in plan.plan_cells(recipes, grid, rates, 1)}
    longer = replace(grid, lengths=(1_280, 2_560, 5_120))
    many = {cell.config.name: cell.config for cell in plan.plan_cells(recipes, longer, rates, 3)}
    assert few.items() <= many.items()
    assert len(many) == 2 * 2 * 3 * 3


def test_cell_names_stable(grid: plan.Grid) -> None:
    """Renaming them would train everything again."""
    assert [cell.config.name for cell in cells_of(grid)[:3]] == [
        "ladder-g-lf-llm-269m-d16-20steps-lr0.0021-wd0.1-s0",
        "ladder-g-lf-llm-269m-modern-d16-20steps-lr0.0024-mu0.01-wd0.1-s0",
        "ladder-g-lf-llm-269m-adamw-d16-20steps-lr0.004-wd0.1-s0",
    ]


def test_rates_file_round_trip_and_validation(tmp_path: Path) -> None:
    rates = {"a": RecipeRates(500, {16: {"max_lr": 0.01}}), "b": RecipeRates(500)}
    path = tmp_path / "rates.json"
    write_rates(path, rates)
    assert read_rates(path, ["a", "b"]) == rates
    with pytest.raises(UserError, match="no rates of c; it has those of a, b"):
        read_rates(path, ["a", "c"])
    path.write_text('{"tokens": 500, "recipes": {"a": {"16": {"speed": 1}}}}')
    with pytest.raises(UserError, match=r"a: expected \{WIDTH"):
        read_rates(path, ["a"])
    path.write_text("{}")
    with pytest.raises(UserError, match="not a rates file"):
        read_rates(path, ["a"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lf-llm-269m"], "at least two recipes"),
        (["lf-llm-269m", "lf-llm-269m-modem"], "unknown recipe 'lf-llm-269m-modem'.*modern"),
        (["lf-llm-269m", "lf-llm-269m"], "two recipes are named"),
        (["lf-llm-269m", "debug", "--widths", "20"], "width 20 is not a multiple of --head-dim 8; use 16 or 24"),
        (["lf-llm-269m", "debug", "--tokens", "5M"], "reads the .* training tokens .* times, at most --max-epochs 1"),
        (["lf-llm-269m", "debug", "--tokens", "100"], "less than one step"),
        (["lf-llm-269m", "debug", "--seeds", "0"], "--seeds is 0"),
        (["lf-llm-269m", "debug", "--data.dataset", "none"], "no prepared data set 'none'"),
    ],
)  # fmt: skip
def test_invalid_arguments_rejected_before_training(
    words: list[str], message: str, prepared_data: None, temp_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = "--data.dataset files --widths 16 --head-dim 8 --layers 2 --seq-len 32 --batch-tokens 128 --tokens 2560"
    with pytest.raises(SystemExit, match="2"):
        main(["ladder", *words[:2], *base.split(), *words[2:]])
    error = " ".join(capsys.readouterr().err.split())
    import re

    assert re.search(message, error), error
    assert not (temp_data / "runs").exists()
