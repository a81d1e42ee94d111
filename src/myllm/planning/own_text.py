"""Which preset, batch and warm-up suit a text of a given size."""

from dataclasses import replace

from myllm.config import RunConfig
from myllm.presets import get_preset

PRESETS_BY_TOKENS: tuple[tuple[int, str, str], ...] = (
    (0, "debug", "words and layout of the text without sense, and passages known by heart"),
    (2_000_000, "tinystories-laptop", "sentences in the style of the text; stories, if the text is as simple"),
    (250_000_000, "small-50m", "fluent paragraphs that lose their thread"),
    (750_000_000, "default-150m", "fluent paragraphs on one topic, and common facts"),
    (1_500_000_000, "lf-llm-269m-modern", "pages that stay on their topic, and many facts, some of them wrong"),
)
"""From how many training tokens on, which preset, and what its samples look like. From small-50m on: five tokens for
each parameter, so that four epochs are the 20 of Hoffmann et al. 2022 (arXiv 2203.15556). The words are expectations,
not measurements."""
BATCH_FACTOR, BATCH_EXPONENT = 0.58, 0.571
"""The best batch, in tokens, is 0.58 D^0.571 for a run of D tokens ("Step Law", Li et al. 2025, arXiv 2503.04715). It
gives 138,000 for the 2.6B of small-50m, which has 131,072, and 780 for the 0.3M of debug, which has 512.

The learning rate can stay: it grows with the root of the batch and falls with D^0.32 (planning.transfer), so along this
law it is proportional to D^-0.03."""
WARMUP_FRACTION = 0.05
USUAL_EPOCHS = 4.0
"""Up to this many epochs, repeated text is nearly as good as new text; beyond, the validation loss rises.
Source: Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", arXiv 2305.16264."""


def preset_for(train_tokens: int) -> tuple[str, str]:
    """The largest preset that a text suffices for, and a sentence about it."""
    index = max(i for i, (tokens, _, _) in enumerate(PRESETS_BY_TOKENS) if tokens <= train_tokens)
    _, name, samples = PRESETS_BY_TOKENS[index]
    line = f"{train_tokens:,} training tokens suit {name}; expect {samples}"
    if index + 1 < len(PRESETS_BY_TOKENS):
        tokens, larger, _ = PRESETS_BY_TOKENS[index + 1]
        line += f" ({larger}: from {tokens / 1e6:,.0f}M tokens on)"
    return name, line


def command_for(dataset: str, train_tokens: int, vocab_size: int) -> tuple[str, str]:
    """The command that trains the preset that suits a data set, and a sentence about it.

    The run has the data set's name: that of the preset may be taken by a run on other text. It reads all of the text.
    """
    name, line = preset_for(train_tokens)
    preset = get_preset(name)
    command = f"python pretrain.py {name} --data.dataset {dataset} --name {dataset}"
    if vocab_size != preset.model.vocab_size:
        command += f" --model.vocab-size {vocab_size}"
    if preset.train.max_steps * preset.train.batch_tokens < train_tokens:
        command += " --train.epochs 1"
    return command, line


def fit_batch(config: RunConfig, train_tokens: int) -> RunConfig:
    """The config with a batch that suits its length in tokens, no larger than its own, and as many steps as make up the
    same tokens, at most USUAL_EPOCHS of the text; its warm-up is at most WARMUP_FRACTION of them.

    Args:
        train_tokens: of the text.
    """
    length, train = config.model.max_seq_len, config.train
    tokens, sequences = min(train.max_steps * train.batch_tokens, int(USUAL_EPOCHS * train_tokens)), 1
    while 2**0.5 * sequences * length < BATCH_FACTOR * tokens**BATCH_EXPONENT:  # the nearest power of two
        sequences *= 2
    if sequences * length >= train.batch_tokens:
        return config
    micro = train.micro_batch_size if train.micro_batch_size == "auto" else min(train.micro_batch_size, sequences)
    while micro != "auto" and sequences % micro:
        micro -= 1
    steps = max(tokens // (sequences * length), 1)
    warmup = min(config.optim.warmup_steps, max(int(WARMUP_FRACTION * steps), 1))
    return replace(
        config,
        optim=replace(config.optim, warmup_steps=warmup),
        train=replace(train, max_steps=steps, batch_tokens=sequences * length, micro_batch_size=micro),
    )


def fitting_options(config: RunConfig, train_tokens: int) -> str:
    """`fit_batch` as options of pretrain.py; empty if the config's batch is small enough."""
    fitted = fit_batch(config, train_tokens)
    changes = (
        ("--train.batch-tokens", config.train.batch_tokens, fitted.train.batch_tokens),
        ("--train.micro-batch-size", config.train.micro_batch_size, fitted.train.micro_batch_size),
        ("--optim.warmup-steps", config.optim.warmup_steps, fitted.optim.warmup_steps),
    )
    return " ".join(f"{option} {new}" for option, old, new in changes if new != old)
