"""Stage 1: optima come back, edges are extended and then refused. Losses are a formula; nothing is trained."""

import math
from collections.abc import Callable, Sequence

import pytest

from myllm.cli.ladder.plan import Cell, Grid, load_recipes
from myllm.cli.ladder.search import Line, check_rule, count_runs, describe_search, first_guess, search_rates
from myllm.data.find import find_dataset
from myllm.errors import UserError

RECIPES = load_recipes(["lf-llm-269m-adamw", "lf-llm-269m-modern"])


@pytest.fixture
def grid(prepared_data: None) -> Grid:
    return Grid("g", find_dataset("files"), (16, 32, 64), (1_280, 2_560, 5_120), 2, 8, 32, 128, 256)


def valley(max_lr: float, muon_lr: float, trained: list[str]) -> Callable[[Sequence[Cell]], list[float]]:
    """Losses that are a parabola in the logarithm of each rate, the same at all widths."""

    def run(cells: Sequence[Cell]) -> list[float]:
        trained.extend(cell.config.name for cell in cells)
        return [
            5
            + 0.05 * math.log2(cell.config.optim.max_lr / max_lr) ** 2
            + (0.04 * math.log2(cell.config.optim.muon_lr / muon_lr) ** 2 if "modern" in cell.recipe else 0.0)
            for cell in cells
        ]

    return run


def test_search_recovers_optima(grid: Grid) -> None:
    trained: list[str] = []
    rates, record = search_rates(RECIPES, grid, valley(0.027, 0.08, trained))
    for name in RECIPES:
        assert rates[name].tokens == 2_560
        assert set(rates[name].by_width) == {16, 32}
        for row in rates[name].by_width.values():
            assert row["max_lr"] == pytest.approx(0.027, rel=1e-6)
    assert rates["lf-llm-269m-adamw"].by_width[16] == pytest.approx({"max_lr": 0.027})
    assert rates["lf-llm-269m-modern"].by_width[16]["muon_lr"] == pytest.approx(0.08, rel=0.25)  # both moved at first
    checks = check_rule(RECIPES, grid, rates, valley(0.027, 0.08, trained))
    assert max(check["cost"] for check in checks) < 0.02
    assert "lf-llm-269m-modern width 64, checked: x0.7" in describe_search(record, checks)
    assert len(set(trained)) == count_runs(RECIPES, grid)


def test_search_extends_edge_at_most_twice(grid: Grid) -> None:
    guess = first_guess(RECIPES["lf-llm-269m-adamw"], 16).max_lr
    recipe = {"lf-llm-269m-adamw": RECIPES["lf-llm-269m-adamw"]}
    trained: list[str] = []
    rates, _ = search_rates(recipe, grid, valley(guess * 2**2.8, 1.0, trained))
    assert rates["lf-llm-269m-adamw"].by_width[16]["max_lr"] == pytest.approx(guess * 2**2.8)
    assert sum("-d16-" in name for name in trained) == 7
    with pytest.raises(UserError, match=r"edge.*\n.*adamw, width 16, max_lr: the highest is the best .*x16 "):
        search_rates(recipe, grid, valley(guess * 2**6, 1.0, []))
    with pytest.raises(UserError, match=r"the lowest is the best .*x0.0625 "):
        search_rates(recipe, grid, valley(guess * 2**-6, 1.0, []))


def test_diverged_neighbor_preserves_best_point() -> None:
    assert Line({-1: 5.2, 0: 5.0, 1: math.inf}).optimum == 0
    assert Line({-1: 5.2, 0: 5.0, 1: 5.1}).optimum == pytest.approx(1 / 6)
    assert Line({-1: 5.0, 0: 5.0, 1: 5.0}).beyond == -2  # flat: no optimum is seen
