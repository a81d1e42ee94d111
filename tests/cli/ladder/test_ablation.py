"""Ablations: one part off at a time, paired differences; and the page of a ladder."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.synthetic_ladder import LENGTHS, SIZES, TARGET, ladder

from myllm.cli.ladder.ablation import analyze_ablation, describe_ablation, parts_off, plan_ablation
from myllm.cli.ladder.analysis import analyze
from myllm.cli.ladder.cells import write_results
from myllm.cli.ladder.plan import Cell, Grid, load_recipes
from myllm.cli.ladder.rates import RecipeRates
from myllm.cli.ladder.report import write_report
from myllm.cli.main import main
from myllm.cli.trials import TrialResult
from myllm.data.find import find_dataset
from myllm.presets import diff_settings, get_preset

PARTS = {
    "muon": {"optim.optimizer", "optim.max_lr"},
    "qk-norm": {"model.qk_norm"},
    "zero-init": {"model.init"},
    "no-bias-no-dropout": {"model.bias", "model.dropout_attention_residual", "model.dropout_ffn"},
    "momentum-warmup": {"optim.muon_momentum_start"},
    "weight-decay": {"optim.weight_decay"},
    "linear-to-zero": {"optim.schedule", "optim.min_lr_ratio"},
    "beta2": {"optim.beta2"},
    "warmup": {"optim.warmup_steps"},
}


def test_parts_change_only_their_settings() -> None:
    modern, reference = get_preset("lf-llm-269m-modern"), get_preset("lf-llm-269m")
    variants = parts_off(modern, reference)
    assert {name: set(diff_settings(modern, variant)) for name, variant in variants.items()} == PARTS
    assert variants["warmup"].optim.warmup_steps == round(7_630 * 226 / 19_073)
    assert set(parts_off(modern, get_preset("lf-llm-269m-adamw"))) == {
        "muon", "momentum-warmup", "weight-decay", "warmup",
    }  # fmt: skip


def test_ablation_losses_paired_by_seed(prepared_data: None) -> None:
    grid = Grid("g", find_dataset("files"), (16, 32), (1_280, 2_560, 5_120), 2, 8, 32, 128, 256)
    recipes = load_recipes(["lf-llm-269m-modern", "lf-llm-269m"])
    cells = plan_ablation(recipes, grid, dict.fromkeys(recipes, RecipeRates(2_560)), seeds=3)
    assert len({cell.config.name for cell in cells}) == len(cells) == 3 * (1 + len(PARTS))
    assert {(cell.width, cell.tokens) for cell in cells} == {(32, 2_560)}
    lost = {"lf-llm-269m-modern-no-muon": 0.1, "lf-llm-269m-modern-no-beta2": -0.01}

    def loss(cell: Cell) -> float:
        if "-no-" not in cell.recipe:
            return 4 + 0.05 * cell.seed
        return 4 + 0.05 * cell.seed + lost.get(cell.recipe, 0.02) + 0.001 * (cell.recipe[-1:] == "m")

    results = [(cell, TrialResult(cell.config.name, loss(cell), cell.tokens, 1.0)) for cell in cells]
    found = analyze_ablation(results)
    assert found["parts"][0]["part"] == "muon"
    assert found["parts"][0]["lost"] == pytest.approx(0.1)
    assert found["parts"][0]["stderr"] == pytest.approx(0, abs=1e-9)  # the seed's part cancels
    assert found["parts"][-1]["part"] == "beta2"
    assert "3 paired seed(s): loss 4.05" in describe_ablation(found)


def test_report_complete_and_self_contained(tmp_path: Path) -> None:
    losses = ladder(0.004)
    values = losses.values.copy()
    values[1, 0, 0, 0] = np.nan  # one run diverged
    analysis = analyze(replace(losses, values=values), np.ones((3, 3, 3, 2)), TARGET)
    cells = [
        {"run": f"run-{loss}", "parameters": SIZES[0], "tokens": LENGTHS[0], "seed": 0, "loss": loss, "seconds": 80.0}
        for loss in (3.5, np.inf)
    ]
    search = [{
        "recipe": "modern", "width": 48, "losses": {"-1": 4.1, "0": 4.0, "1": np.inf}, "optimum": {"max_lr": 0.01},
        "max_lr_alone": {"-1": 4.02, "0": 4.0, "1": 4.05},
    }]  # fmt: skip
    checks = [{"recipe": "modern", "width": 96, "losses": {"0.7": 4.1, "1": 4.0, "1.4": 4.05}, "cost": 0.0}]
    write_results(tmp_path / "ladder.json", {
        "name": "<t>", "dataset": "d", "recipes": losses.recipes, "widths": [48, 64, 96], "cells": cells,
        "rates": {"search": search, "checks": checks}, "analysis": analysis,
    })  # fmt: skip
    part = {"part": "qk-norm", "lost": 0.01, "stderr": None}
    write_results(tmp_path / "ablation.json", {
        "recipe": "modern", "width": 64, "tokens": 1.6e6, "seeds": 1, "loss": 4.0, "parts": [part],
    })  # fmt: skip
    page = write_report(tmp_path).read_text()
    for text in (
        "&lt;t&gt;",
        "held out, largest rung of modern",
        "EXTRAPOLATION",
        "diverged",
        "qk-norm",
        "the rule holds",
    ):
        assert text in page
    assert f"min-width: {round(3 * 4.2 * 70)}px" in page  # legible on a phone
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/png;base64,") == 4
    assert len(list((tmp_path / "plots").glob("*.png"))) == 4
    assert json.loads((tmp_path / "ladder.json").read_text())["version"] == 1


def test_ablation_without_rates_rejected(prepared_data: None, capsys: pytest.CaptureFixture[str]) -> None:
    words = "ladder --ablate lf-llm-269m-modern --data.dataset files --widths 16 --head-dim 8 --tokens 2560"
    with pytest.raises(SystemExit, match="2"):
        main([*words.split(), "--batch-tokens", "256"])
    assert "--ablate needs rates" in capsys.readouterr().err
