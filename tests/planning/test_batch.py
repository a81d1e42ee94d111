"""The arithmetic of a run."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from myllm.config import TrainConfig
from myllm.model.transformer import Transformer
from myllm.planning.batch import BatchPlan, batch_plan
from myllm.planning.disk import SPARE_BYTES, checkpoint_bytes, disk_estimate_bytes
from myllm.planning.flops import n_parameters, stored_parameters
from myllm.planning.forecast import Hardware, describe, predict
from myllm.presets import PRESETS, get_preset

# -- batches ----------------------------------------------------------------------------------------------------------

plans = st.builds(
    BatchPlan,
    batch_tokens=st.integers(1, 100_000),
    seq_len=st.integers(1, 600),
    micro_batch_size=st.integers(1, 40),
    world_size=st.integers(1, 9),
)


def numbers_after(text: str, name: str) -> list[int]:
    """The values that a error suggests for a setting."""
    if f"{name} to " not in text:
        return []
    advice = text.split(f"{name} to ")[1].split(", or train.")[0]
    return [int(word.replace(",", "")) for word in advice.split(" or ")]


@given(plans, st.integers(1, 50))
def test_divisible_batch_has_no_error(some, accumulation):
    whole = replace(some, batch_tokens=some.micro_tokens * accumulation)
    assert whole.error() is None
    assert whole.grad_accum_steps == accumulation
    assert whole.micro_batch_size * whole.seq_len * whole.world_size * whole.grad_accum_steps == whole.batch_tokens
    assert whole.sequences * whole.seq_len == whole.batch_tokens


@given(plans)
def test_error_iff_batch_not_divisible(some):
    divides = some.batch_tokens % (some.micro_batch_size * some.seq_len * some.world_size) == 0
    assert (some.error() is None) == divides


@given(plans)
def test_suggested_values_are_valid(some):
    error = some.error()
    if error is None:
        return
    batches = numbers_after(error, "train.batch_tokens")
    assert batches, "there is always a batch that works"
    for tokens in batches:
        assert replace(some, batch_tokens=tokens).error() is None
        assert abs(tokens - some.batch_tokens) <= some.micro_tokens
    micro = numbers_after(error, "train.micro_batch_size")
    for size in micro:
        assert replace(some, micro_batch_size=size).error() is None
    # A micro-batch that works exists exactly if one of a single sequence does.
    assert bool(micro) == (replace(some, micro_batch_size=1).error() is None)


def test_error_message():
    error = BatchPlan(batch_tokens=500_000, seq_len=1_024, micro_batch_size=16, world_size=8).error()
    assert error == (
        "train.batch_tokens 500,000 is not a multiple of one micro-step: train.micro_batch_size 16 x "
        "model.max_seq_len 1,024 x 8 rank(s) = 131,072; set train.batch_tokens to 393,216 or 524,288"
    )
    error = BatchPlan(batch_tokens=6 * 1_024, seq_len=1_024, micro_batch_size=4, world_size=1).error()
    assert error.endswith("set train.batch_tokens to 4,096 or 8,192, or train.micro_batch_size to 2 or 3 or 6")


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_reference_run_batch(world_size):
    config = get_preset("lf-llm-269m")
    batch = batch_plan(config, world_size)
    assert batch.error() is None
    assert batch.grad_accum_steps == 16 // world_size
    assert str(batch) == (
        f"16 sequences x 2,048 tokens x {world_size} rank(s) x {16 // world_size} accumulation step(s) = "
        "524,288 tokens per step"
    )


# -- disk, words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_bytes_match_parameters(tied):
    """Padding included; a checkpoint has the weights and two moments in float32."""
    config = get_preset("lf-llm-269m")
    config = replace(config, model=replace(config.model, tie_embeddings=tied))
    with torch.device("meta"):
        held = sum(p.numel() for p in Transformer(config.model).parameters())
    assert stored_parameters(config.model) == held
    assert checkpoint_bytes(config) == 12 * held + SPARE_BYTES


@pytest.mark.parametrize(
    ("keep_last", "save_every_steps", "kept"), [(3, 50, 3), (1, 50, 1), (0, 50, 4), (0, 60, 4), (0, 0, 1), (3, 0, 1)]
)
def test_disk_estimate_includes_extra_checkpoint(keep_last, save_every_steps, kept):
    train = TrainConfig(max_steps=200, keep_last=keep_last, save_every_steps=save_every_steps)
    config = replace(get_preset("debug"), train=train)
    assert disk_estimate_bytes(config)["checkpoints"] == (kept + 1) * checkpoint_bytes(config)


def test_disk_estimate_includes_milestones():
    """Saves at 20, 40, ... 200; the last three stay, 180 among them, and those at 60 and 120; one more is written."""
    train = TrainConfig(max_steps=200, keep_last=3, save_every_steps=20, keep_every_steps=60)
    config = replace(get_preset("debug"), train=train)
    assert disk_estimate_bytes(config)["checkpoints"] == (3 + 2 + 1) * checkpoint_bytes(config)
    always = replace(config, train=replace(train, keep_last=0))
    assert disk_estimate_bytes(always)["checkpoints"] == (10 + 1) * checkpoint_bytes(config)


@pytest.mark.parametrize("name", PRESETS)
def test_describe_includes_all_sections(name):
    config = get_preset(name)
    text = describe(predict(config, Hardware(1)))
    assert f"{n_parameters(config.model):,} in all" in text
    assert f"{config.train.max_steps * config.train.batch_tokens:,} tokens" in text
    for line in ("batch", "steps", "parameters", "vocabulary", "FLOPs", "memory", "disk"):
        assert f"\n{line} " in f"\n{text}"
