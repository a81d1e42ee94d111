"""Which parts of a recipe matter: one part at a time is replaced by that of another recipe, with paired seeds."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from myllm.config import RunConfig
from myllm.formatting import format_si, format_table

from .cells import Results
from .plan import Cell, Grid, make_cell
from .rates import RecipeRates

DROPOUTS = ("dropout_embedding", "dropout_attention_residual", "dropout_ffn")


def parts_off(recipe: RunConfig, base: RunConfig) -> dict[str, RunConfig]:
    """The recipe with one part of `base` in place of its own, by the name of the part; those that differ.

    Weight decay and momentum warm-up are simply off.
    """
    model, optim = recipe.model, recipe.optim
    warmup = round(base.optim.warmup_steps * recipe.train.max_steps / base.train.max_steps)
    variants = {
        "muon": _with_optim(recipe, optimizer=base.optim.optimizer, max_lr=base.optim.max_lr),
        "qk-norm": _with_model(recipe, qk_norm=base.model.qk_norm),
        "zero-init": _with_model(recipe, init=base.model.init),
        "no-bias-no-dropout": _with_model(
            recipe, bias=base.model.bias, **{name: getattr(base.model, name) for name in DROPOUTS}
        ),
        "momentum-warmup": _with_optim(recipe, muon_momentum_start=optim.muon_momentum),
        "weight-decay": _with_optim(recipe, weight_decay=0.0),
        "linear-to-zero": _with_optim(
            recipe, schedule=base.optim.schedule, min_lr_ratio=base.optim.min_lr_ratio,
        ),
        "beta2": _with_optim(recipe, beta2=base.optim.beta2),
        "warmup": _with_optim(recipe, warmup_steps=warmup),
    }  # fmt: skip
    return {name: variant for name, variant in variants.items() if (variant.model, variant.optim) != (model, optim)}


def plan_ablation(
    recipes: Mapping[str, RunConfig], grid: Grid, rates: Mapping[str, RecipeRates], seeds: int
) -> list[Cell]:
    """The cells of the first recipe, whole and with each part of the second, at the second width and middle length."""
    (name, recipe), (base_name, base) = recipes.items()
    width, tokens = grid.widths[min(1, len(grid.widths) - 1)], grid.middle_length
    tuned = replace(recipe, optim=rates[name].at(recipe.optim, width, tokens))
    tuned_base = replace(base, optim=rates[base_name].at(base.optim, width, tokens))
    variants = {"": tuned, **{f"-no-{part}": config for part, config in parts_off(tuned, tuned_base).items()}}
    return [
        make_cell(name, config, grid, (width, tokens, seed), config.optim, variant)
        for seed in range(seeds)
        for variant, config in variants.items()
    ]


def analyze_ablation(results: Results) -> dict[str, Any]:
    """Nats lost without each part: the mean of paired differences and its standard error over seeds."""
    losses: dict[str, dict[int, float]] = {}
    for cell, trial in results:
        losses.setdefault(cell.recipe, {})[cell.seed] = trial.loss
    whole, *variants = losses
    parts: list[dict[str, Any]] = []
    for variant in variants:
        lost = np.array([losses[variant][seed] - losses[whole][seed] for seed in losses[whole]])
        parts.append({
            "part": variant.removeprefix(f"{whole}-no-"), "lost": float(lost.mean()),
            "stderr": float(lost.std(ddof=1) / len(lost) ** 0.5) if len(lost) > 1 else None,
        })  # fmt: skip
    parts.sort(key=lambda row: -row["lost"])
    return {
        "recipe": whole, "width": cell.width, "tokens": cell.tokens, "seeds": len(losses[whole]),
        "loss": float(np.mean(list(losses[whole].values()))), "parts": parts,
    }  # fmt: skip


def describe_ablation(found: Mapping[str, Any]) -> str:
    rows = [["without", "nats lost", "standard error"]]
    for part in found["parts"]:
        error = "" if part["stderr"] is None else f"{part['stderr']:.4f}"
        rows.append([part["part"], f"{part['lost']:+.4f}", error])
    return (
        f"{found['recipe']}, width {found['width']}, {format_si(found['tokens'])} tokens, {found['seeds']} paired "
        f"seed(s): loss {found['loss']:.4f}, and what is lost without one part\n{format_table(rows, right=(1, 2))}"
    )


def _with_optim(recipe: RunConfig, **changes: Any) -> RunConfig:
    return replace(recipe, optim=replace(recipe.optim, **changes))


def _with_model(recipe: RunConfig, **changes: Any) -> RunConfig:
    return replace(recipe, model=replace(recipe.model, **changes))
