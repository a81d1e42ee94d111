"""Every preset under its own name, but small enough to train in a second: `python -m support.tiny_presets TEXTS WORDS`
runs pretrain.py with them."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from myllm import presets
from myllm.config import RunConfig


def shrink(config: RunConfig, texts: Path) -> RunConfig:
    """The preset with a tiny model, four steps, and the texts of a folder."""
    model, data, train, evals = config.model, config.data, config.train, config.eval
    return replace(
        config,
        model=replace(
            model, n_layers=2, d_model=16, n_heads=2, n_kv_heads=None, d_ff=32, max_seq_len=32, vocab_size=50_257
        ),
        data=replace(
            data, source=f"files:{texts}", tokenizer="r50k_base", val_tokens=2_000, shard_tokens=8_000, workers=1
        ),
        train=replace(
            train, max_steps=4, batch_tokens=128, micro_batch_size=2, save_every_steps=2, log_every_steps=1,
            device="cpu",
        ),
        eval=replace(evals, validation_tokens=256, hellaswag_every_steps=0, cloze_examples=4, sample_new_tokens=4),
    )  # fmt: skip


def tiny_presets(texts: Path) -> dict[str, Callable[[], RunConfig]]:
    def tiny(make: Callable[[], RunConfig]) -> Callable[[], RunConfig]:
        def preset() -> RunConfig:
            return shrink(make(), texts)

        preset.__doc__ = make.__doc__
        return preset

    return {name: tiny(make) for name, make in presets.PRESETS.items()}


if __name__ == "__main__":
    import pretrain

    presets.PRESETS.update(tiny_presets(Path(sys.argv[1])))
    sys.argv = ["pretrain.py", *sys.argv[2:]]
    pretrain.main()
