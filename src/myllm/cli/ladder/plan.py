"""Which cells a ladder has, and the config of each: recipes x widths x lengths x seeds.

A cell is a whole decayed run. Cells that differ only in their recipe are paired: the same seed, data order and
validation text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from myllm import paths
from myllm.cli.trials import as_trial
from myllm.config import DataConfig, ModelConfig, OptimConfig, RunConfig, load_config
from myllm.data.dataset import Dataset
from myllm.data.mixture.mixed_dataset import MixedDataset
from myllm.data.settings import dataset_option
from myllm.errors import UserError, bullets, did_you_mean
from myllm.formatting import format_si, format_table
from myllm.planning.config_checks import check_config
from myllm.planning.flops import block_matrices
from myllm.planning.length import warmup_steps
from myllm.presets import PRESETS, get_preset

from .rates import RecipeRates

MAX_MICRO_BATCH = 32
"""Sequences per forward pass, at most."""


@dataclass(frozen=True)
class Grid:
    """What the recipes of a ladder share."""

    name: str
    dataset: Dataset
    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    """Tokens of the runs."""
    layers: int
    head_dim: int
    seq_len: int
    batch_tokens: int
    validation_tokens: int

    @property
    def middle_length(self) -> int:
        """The length at which rates are tuned."""
        return self.lengths[(len(self.lengths) - 1) // 2]


@dataclass(frozen=True)
class Cell:
    """One run of a ladder."""

    recipe: str
    width: int
    seed: int
    config: RunConfig

    @property
    def tokens(self) -> int:
        return self.config.train.max_steps * self.config.train.batch_tokens

    @property
    def parameters(self) -> int:
        """N of the fits: matrices and head."""
        return count_matrices(self.config.model)


def count_matrices(model: ModelConfig) -> int:
    """Weights of the matrices that a token is multiplied with: those of the blocks, and the head, tied or not.

    With this count nanochat found exponents of N and D near 1/2 (its LOG, runs/scaling_laws.sh).
    """
    return block_matrices(model) + model.vocab_size * model.d_model


def load_recipes(words: Sequence[str]) -> dict[str, RunConfig]:
    """Recipes by name: presets, or config files (named by their "name", or else by the file).

    Raises:
        UserError: unknown recipe, or two of the same name.
    """
    recipes: dict[str, RunConfig] = {}
    for word in words:
        path = paths.user_path(word)
        if word in PRESETS:
            name, config = word, get_preset(word)
        elif path.is_file():
            config = load_config(path, RunConfig())
            name = path.stem if config.name == RunConfig().name else config.name
        else:
            raise UserError(
                f"unknown recipe {word!r}{did_you_mean(word, list(PRESETS))}: expected a preset "
                f"({', '.join(PRESETS)}) or the path of a config file"
            )
        if name in recipes:
            raise UserError(f"two recipes are named {name!r}: give each config file another name")
        recipes[name] = config
    return recipes


def check_grid(grid: Grid, max_epochs: float) -> None:
    """Raises a UserError with every error."""
    errors = []
    for width in grid.widths:
        if width % grid.head_dim:
            down, up = width // grid.head_dim * grid.head_dim, -(-width // grid.head_dim) * grid.head_dim
            near = " or ".join(str(n) for n in (down, up) if n)
            errors.append(f"width {width} is not a multiple of --head-dim {grid.head_dim}; use {near}")
    has = grid.dataset.known_train_tokens or 0
    if not max(grid.lengths) <= max_epochs * has:  # also rejects NaN
        errors.append(
            f"a run of {format_si(max(grid.lengths))} tokens reads the {format_si(has)} training tokens of "
            f"{grid.dataset.name} {max(grid.lengths) / has:.2g} times, at most --max-epochs {max_epochs:g} are "
            "allowed; prepare more text, lower --tokens, or raise --max-epochs"
        )
    if min(grid.lengths) < grid.batch_tokens:
        errors.append(f"--tokens {min(grid.lengths):,} is less than one step of --batch-tokens {grid.batch_tokens:,}")
    if errors:
        raise UserError(f"the ladder cannot be run:\n{bullets(errors)}")


def plan_cells(
    recipes: Mapping[str, RunConfig], grid: Grid, rates: Mapping[str, RecipeRates], seeds: int
) -> list[Cell]:
    """All cells, so that whatever is done after a while can be compared: by seed, then length, width and recipe.

    Raises:
        UserError: a cell's config is invalid.
    """
    return [
        make_cell(name, recipe, grid, (width, tokens, seed), rates[name].at(recipe.optim, width, tokens))
        for seed in range(seeds)
        for tokens in grid.lengths
        for width in grid.widths
        for name, recipe in recipes.items()
    ]


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
    has = grid.dataset.known_train_tokens or 0
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


def make_cell(
    name: str, recipe: RunConfig, grid: Grid, place: tuple[int, int, int], optim: OptimConfig, variant: str = ""
) -> Cell:
    """One cell.

    Args:
        place: width, tokens and seed.
        optim: with the rates of the cell, and the recipe's warm-up.
        variant: added to the recipe's name, such as a part that is off.
    """
    width, tokens, seed = place
    steps = round(tokens / grid.batch_tokens)
    optim = scale_warmups(optim, recipe.train.max_steps, steps)
    rate = f"lr{optim.max_lr:.3g}" + (f"-mu{optim.muon_lr:.3g}" if optim.optimizer == "muon" else "")
    label = f"{name}{variant}"
    config = replace(
        recipe,
        name=f"ladder-{grid.name}-{label}-d{width}-{steps}steps-{rate}-wd{optim.weight_decay:.3g}-s{seed}",
        model=scale_model(recipe.model, grid, width),
        data=DataConfig(dataset=dataset_option(grid.dataset)),
        optim=optim,
        train=replace(
            recipe.train, max_steps=steps, epochs=None, batch_tokens=grid.batch_tokens, seed=seed,
            micro_batch_size=_micro_batch(grid),
        ),
        eval=replace(recipe.eval, validation_tokens=grid.validation_tokens),
    )  # fmt: skip
    # Only the loss of the finished run counts: losses in mid-run, before the decay, rank recipes wrongly.
    config = as_trial(config)
    check_config(config, world_size=1)
    if isinstance(grid.dataset, MixedDataset):
        grid.dataset.check_epochs(config)
    return Cell(label, width, seed, config)


def scale_warmups(optim: OptimConfig, recipe_steps: int, steps: int) -> OptimConfig:
    """Warm-ups as the same fraction of the run as in the recipe, at least one step if the recipe has any."""

    def scaled(recipe_warmup: int) -> int:
        return max(round(steps * recipe_warmup / recipe_steps), min(recipe_warmup, 1))

    optim = replace(
        optim,
        warmup_steps=scaled(optim.warmup_steps),
        muon_momentum_warmup_steps=scaled(optim.muon_momentum_warmup_steps),
    )
    return replace(optim, warmup_steps=warmup_steps(optim, steps))


def scale_model(model: ModelConfig, grid: Grid, width: int) -> ModelConfig:
    """The recipe's model at another size: its switches, its ratios of d_ff to d_model and of heads to key heads."""
    heads = width // grid.head_dim
    return replace(
        model, vocab_size=grid.dataset.manifest["tokenizer"]["vocab_size"], max_seq_len=grid.seq_len, d_model=width,
        n_layers=grid.layers, n_heads=heads, head_dim=None, d_ff=round(width * model.d_ff / model.d_model),
        n_kv_heads=model.n_kv_heads and max(1, heads * model.n_kv_heads // model.n_heads),
    )  # fmt: skip


def _micro_batch(grid: Grid) -> int:
    """The largest number of sequences, up to MAX_MICRO_BATCH, that divides the batch."""
    sequences = grid.batch_tokens // grid.seq_len
    return max((n for n in range(1, MAX_MICRO_BATCH + 1) if n <= sequences and sequences % n == 0), default=1)
