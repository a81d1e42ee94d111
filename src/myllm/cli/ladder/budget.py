"""What a ladder will cost: its plan in words, and hours from finished cells or from a short measurement."""

from collections.abc import Mapping, Sequence

from myllm.cli.trials import seconds_per_token
from myllm.config import RunConfig
from myllm.formatting import format_duration, format_si, format_table

from .cells import read_cell
from .plan import Cell, Grid
from .rates import RecipeRates


def describe_plan(
    recipes: Mapping[str, RunConfig], grid: Grid, rates: Mapping[str, RecipeRates], cells: Sequence[Cell]
) -> str:
    """The sizes, lengths and rates of a ladder, one line for each recipe, width and length."""
    first = {(cell.recipe, cell.width, cell.tokens): cell for cell in reversed(cells)}
    rows = [["recipe", "width", "N", "tokens", "steps", "warm-up", "max_lr", "muon_lr", "weight_decay"]]
    for (name, width, tokens), cell in sorted(first.items()):
        optim = cell.config.optim
        muon = f"{optim.muon_lr:.3g}" if optim.optimizer == "muon" else ""
        rows.append([
            name, str(width), format_si(cell.parameters), format_si(tokens), f"{cell.config.train.max_steps:,}",
            str(optim.warmup_steps), f"{optim.max_lr:.3g}", muon, f"{optim.weight_decay:.3g}",
        ])  # fmt: skip
    has = grid.dataset.train.tokens
    seeds = len({cell.seed for cell in cells})
    shape = (
        f"{grid.layers} layers, heads of {grid.head_dim}, context {grid.seq_len}, {grid.batch_tokens:,} tokens a step"
    )
    warmups = ", ".join(
        f"{name} {recipe.optim.warmup_steps:,}/{recipe.train.max_steps:,}" for name, recipe in recipes.items()
    )
    return "\n".join([
        f"ladder {grid.name}: {len(recipes)} recipes x {len(grid.widths)} widths x {len(grid.lengths)} lengths x "
        f"{seeds} paired seed(s) = {len(cells)} runs, {format_si(sum(cell.tokens for cell in cells))} tokens",
        shape,
        f"data {grid.dataset.name}: {format_si(has)} training tokens, the longest run reads "
        f"{max(cell.tokens for cell in cells) / has:.2f} epochs",
        f"warm-up is the recipe's own fraction of its steps: {warmups}",
        f"rates are known at {', '.join(sorted({format_si(recipe.tokens) for recipe in rates.values()}))} tokens, and "
        "carried over to other lengths as tokens^-0.32 (arXiv 2603.28743); weight decay keeps rate x decay x steps",
        "N counts matrices and the head",
        "",
        format_table(rows, right=range(1, len(rows[0]))),
    ])  # fmt: skip


def describe_cost(cells: Sequence[Cell], expected: Mapping[str, float], jobs: int) -> str:
    """Runs that are left, and their time."""
    left = [cell for cell in cells if read_cell(cell) is None]
    if not left:
        return f"all {len(cells)} runs are there"
    seconds = sum(expected[cell.config.name] for cell in left)
    return (
        f"{len(left)} of {len(cells)} runs are left: {format_duration(seconds)} of training, about "
        f"{format_duration(seconds / jobs)} with --jobs {jobs}"
    )


def expected_seconds(cells: Sequence[Cell], jobs: int) -> dict[str, float]:
    """Seconds of each run by its name: those it took, or its tokens x the seconds per token of its width.

    A width without a finished run is measured now, by a run of a few steps of each recipe.
    """
    took = {cell.config.name: result.seconds for cell in cells if (result := read_cell(cell))}
    known = {
        (cell.recipe, cell.width): took[cell.config.name] / cell.tokens for cell in cells if cell.config.name in took
    }
    unknown = {(cell.recipe, cell.width): cell for cell in reversed(cells) if (cell.recipe, cell.width) not in known}
    speeds = seconds_per_token([cell.config for cell in unknown.values()], jobs)
    known |= dict(zip(unknown, speeds, strict=True))
    return {
        cell.config.name: took.get(cell.config.name) or cell.tokens * known[cell.recipe, cell.width] for cell in cells
    }
