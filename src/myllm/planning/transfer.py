"""Rules that carry tuned optimizer settings over to a run of another length."""

from dataclasses import replace

from myllm.config import OptimConfig

RATE_EXPONENT = -0.32
"""The best learning rate is proportional to the tokens to this power, for one model and one batch size: a longer run
needs a lower rate. Source: arXiv 2603.28743."""


def transfer(optim: OptimConfig, tokens_ratio: float) -> OptimConfig:
    """Settings for a run of `tokens_ratio` times as many tokens, with the same model and the same tokens per step.

    Both peak rates follow RATE_EXPONENT. The weight decay keeps rate x decay x steps, which is how much of the initial
    weights the decay removes by the end of the run (Wang and Aitchison 2024, arXiv 2405.13698).

    Raises:
        ValueError: the ratio is not above 0.
    """
    if not tokens_ratio > 0:
        raise ValueError(f"tokens_ratio is {tokens_ratio}, expected a number above 0")
    rate = tokens_ratio**RATE_EXPONENT
    return replace(
        optim,
        max_lr=optim.max_lr * rate,
        muon_lr=optim.muon_lr * rate,
        weight_decay=optim.weight_decay / (rate * tokens_ratio),
    )


def describe_transfer(before: OptimConfig, after: OptimConfig) -> str:
    """One sentence: what `transfer` changed and by which rule."""
    names = [*(["muon_lr"] if before.optimizer == "muon" else []), "max_lr", "weight_decay"]
    changes = ", ".join(f"{name} {getattr(before, name):.3g} -> {getattr(after, name):.3g}" for name in names)
    return (
        f"{changes}: the rate follows tokens^{RATE_EXPONENT:g} (arXiv 2603.28743), and the weight decay keeps rate x "
        "decay x steps"
    )
