"""The memory that is predicted is the memory that torch takes."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import with_train
from support.kinds import MODEL_KINDS
from support.live_memory import ALONE, Step, highest, saved_bytes
from torch.autograd.graph import saved_tensors_hooks

from myllm.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from myllm.distributed.collectives import DistContext
from myllm.distributed.precision import autocast
from myllm.model.cross_entropy import CPU_CHUNK, GPU_CHUNK
from myllm.planning import memory_estimate
from myllm.planning.forecast import Hardware, describe, predict
from myllm.planning.memory_estimate import (
    ComputeMode,
    block_saved_bytes,
    memory_by_part,
    outer_saved_bytes,
    predicted_bytes,
)
from myllm.presets import PRESETS, get_preset

GPT2 = MODEL_KINDS["gpt2"]
DROPOUT = {"dropout_embedding": 0.1, "dropout_attention_residual": 0.1, "dropout_ffn": 0.1}
EMBEDDING_NORM = {"embedding_norm": True, "tie_embeddings": False}
KINDS = MODEL_KINDS | {
    "qk-norm": {"qk_norm": True},
    "qk-norm, learned": {"qk_norm": True, "position": "learned"},
    "dropout": DROPOUT,
    "gpt2, dropout": GPT2 | DROPOUT,
    "grouped, relu2, qk-norm": {"activation": "relu2", "n_kv_heads": 2, "qk_norm": True},
    "grouped": {"n_kv_heads": 1, "bias": True},
    "wide heads, untied": {"head_dim": 24, "tie_embeddings": False},
    "layernorm without bias": {"norm": "layernorm"},
    "residual scales": {"residual_scales": True, "dropout_attention_residual": 0.1},
    "embedding norm": EMBEDDING_NORM,
    "embedding norm, gpt2": GPT2 | EMBEDDING_NORM | {"residual_scales": True},
    "half stream, scales": {"residual_dtype": "bfloat16", "residual_scales": True} | EMBEDDING_NORM,
    "half stream": {"residual_dtype": "bfloat16", "qk_norm": True},
    "half stream, gpt2, dropout": GPT2 | DROPOUT | {"residual_dtype": "bfloat16"},
}
by_kind = pytest.mark.parametrize("kind", KINDS)
by_precision = pytest.mark.parametrize("precision", ["float32", "bfloat16"])
by_checkpointing = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])


def run_config(kind: str = "plain", micro_batch_size: int = 2, accumulation: int = 1, **train: object) -> RunConfig:
    model = ModelConfig(vocab_size=500, max_seq_len=64, d_model=64, n_layers=3, n_heads=4, d_ff=192)
    tokens = micro_batch_size * 64 * accumulation
    whole = TrainConfig(batch_tokens=tokens, micro_batch_size=micro_batch_size, device="cpu")
    return with_train(RunConfig(model=replace(model, **KINDS[kind]), train=whole), **train)


def tensors_alone(config: RunConfig, ranks: int = 1) -> int:
    parts = memory_by_part(config, ComputeMode.of(config, "cpu", ranks))
    return sum(size for name, size in parts.items() if name not in ("allocator", "runtime", "batches"))


@by_kind
@by_precision
@by_checkpointing
def test_saved_activation_bytes_match_autograd(kind: str, precision: str, recompute: bool) -> None:
    config = run_config(kind, precision=precision, activation_checkpointing=recompute)
    model, mode, n = config.model, ComputeMode.of(config, "cpu"), 2 * 64
    stream = 2 if kind.startswith("half") and precision == "bfloat16" else 4
    block = stream * n * model.d_model if recompute else block_saved_bytes(model, mode, n)
    loss = mode.width * n * model.d_model + 4 * model.padded_vocab_size * model.d_model
    missing = saved_bytes(Step(config)) - (model.n_layers * block + outer_saved_bytes(model, mode, n) + loss)
    assert missing == 0, f"memory_estimate.py misses {missing / model.n_layers / n:g} bytes of a block and token"


@pytest.mark.parametrize(
    ("kind", "precision", "recompute", "micro_batch_size", "accumulation"),
    [
        ("plain", "float32", False, 8, 1),
        ("plain", "float32", False, 1, 3),
        ("plain", "float32", True, 8, 2),
        ("plain", "bfloat16", False, 8, 2),
        ("qk-norm", "float32", False, 8, 2),
        ("qk-norm", "bfloat16", True, 8, 1),
        ("dropout", "float32", False, 8, 1),
        ("gpt2", "float32", False, 8, 1),
        ("gpt2, dropout", "float32", False, 8, 2),
        ("gpt2, dropout", "bfloat16", False, 4, 1),
        ("gpt2, dropout", "float32", True, 4, 1),
        ("grouped, relu2, qk-norm", "float32", False, 4, 2),
        ("wide heads, untied", "float32", False, 4, 2),
        ("wide heads, untied", "float32", True, 2, 1),
        ("residual scales", "float32", False, 8, 2),
        ("residual scales", "bfloat16", True, 4, 1),
        ("embedding norm", "float32", False, 4, 1),
        ("half stream", "bfloat16", False, 8, 2),
        ("half stream, gpt2, dropout", "bfloat16", True, 4, 1),
    ],
)
def test_step_peak_memory(kind: str, precision: str, recompute: bool, micro_batch_size: int, accumulation: int) -> None:
    """By torch's allocator, over a whole step with moments there: within 10 %."""
    config = run_config(kind, micro_batch_size, accumulation, precision=precision, activation_checkpointing=recompute)
    assert tensors_alone(config) == pytest.approx(_measured(config), rel=0.1)


@pytest.mark.parametrize("kind", ["plain", "grouped, relu2, qk-norm"])
def test_muon_update_peak_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where few tokens and a small vocabulary leave it the largest part. On a CPU, float32 is the iteration's type."""
    monkeypatch.setattr("myllm.optim.muon.iteration_dtype", lambda device: torch.float32)
    config = run_config(kind, micro_batch_size=1)
    model = replace(config.model, vocab_size=100, max_seq_len=16, d_model=128, d_ff=512)
    train = replace(config.train, batch_tokens=16)
    config = replace(config, model=model, train=train, optim=OptimConfig(optimizer="muon"))
    assert "update" in memory_by_part(config, ComputeMode.of(config, "cpu"))
    assert tensors_alone(config) == pytest.approx(_measured(config), rel=0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_scaled_preset_peak_memory(name: str) -> None:
    """Its kind of model and its proportions, a fifth as wide, with two accumulation steps."""
    config = get_preset(name)
    model = config.model
    width = max(64, model.d_model // 5 // 32 * 32)
    small = replace(
        model, vocab_size=4_000, max_seq_len=model.max_seq_len // 8, d_model=width, n_heads=2, n_layers=4,
        d_ff=width * model.d_ff // model.d_model // 8 * 8,
    )  # fmt: skip
    config = replace(config, model=small)
    config = with_train(config, micro_batch_size=2, batch_tokens=4 * small.max_seq_len, device="cpu")
    assert tensors_alone(config) == pytest.approx(_measured(config), rel=0.1)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("accumulation", [1, 3])
def test_step_peak_memory_with_ddp(accumulation: int) -> None:
    """Gradients of earlier micro-steps are in the buckets: they are there once, however many steps accumulate."""
    pair = DistContext(0, 0, 2, torch.device("cpu"))
    config = run_config("plain", 1, 2 * accumulation)
    assert tensors_alone(config, pair.world_size) == pytest.approx(_measured(config, pair), rel=0.1)


def _measured(config: RunConfig, process: DistContext = ALONE) -> int:
    step = Step(config, process)
    for _ in range(1 if process.world_size == 1 else 2):  # makes the moments, and in the first one DDP its last buckets
        step()
    return step.held + highest(step)


@pytest.mark.parametrize("kind", ["qk-norm", "gpt2, dropout", "grouped, relu2, qk-norm", "half stream"])
def test_compiled_model_saved_bytes(kind: str) -> None:
    """By the compiler's own choice of what to keep and what to make again, whose code is never generated here.

    Within 10 %: the residual stream is kept now in float32, now as the bfloat16 that was added to it.
    """
    config = run_config(kind, precision="bfloat16", compile="on")
    model, mode, step = config.model, ComputeMode.of(config, "cpu"), Step(with_train(config, compile="off"))
    hidden, kept = torch.compile(step.model.hidden, backend="aot_eager_decomp_partition"), []
    step.model.train()
    try:
        with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), autocast(config, torch.device("cpu")):
            hidden(step.tokens)
    finally:
        torch.compiler.reset()
    own = {t.untyped_storage().data_ptr() for t in [*step.model.parameters(), *step.model.buffers(), step.tokens]}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if torch.is_tensor(t)}
    measured = sum(size for pointer, size in storages.items() if pointer not in own)
    expected = model.n_layers * block_saved_bytes(model, mode, 2 * 64) + outer_saved_bytes(model, mode, 2 * 64)
    assert expected == pytest.approx(measured, rel=0.1)


# -- what follows from the derivation ---------------------------------------------------------------------------------


def test_states_take_16_bytes_per_parameter() -> None:
    config = get_preset("lf-llm-269m")
    with torch.device("meta"):
        from myllm.model.transformer import Transformer

        model = Transformer(config.model)
    stored, buffers = (sum(t.nbytes for t in tensors) for tensors in (model.parameters(), model.buffers()))
    parts = memory_by_part(config, ComputeMode.of(config, "cuda"))
    assert parts["weights"] == stored + buffers
    assert parts["optimizer state"] == 2 * stored
    assert memory_by_part(config, ComputeMode.of(config, "cuda", 8))["gradients"] >= stored  # DDP's buckets


def test_auto_compile_requires_triton() -> None:
    config = with_train(get_preset("lf-llm-269m"), compile="auto")
    assert ComputeMode.of(config, "cuda").compiled
    assert not ComputeMode.of(config, "cuda", triton=False).compiled
    assert ComputeMode.of(with_train(config, compile="on"), "cuda", triton=False).compiled
    off = ComputeMode.of(with_train(config, compile="off"), "cuda", 8)
    assert ComputeMode.of(config, "cuda", 8, triton=False) == off
    without = describe(predict(config, Hardware(8, None, "cuda", triton=False)))
    assert without == describe(predict(with_train(config, compile="off"), Hardware(8, None, "cuda")))
    assert without != describe(predict(config, Hardware(8, None, "cuda")))


def test_memory_saving_options() -> None:
    config = get_preset("lf-llm-269m")
    mode = ComputeMode.of(config, "cuda", 8)
    base = predicted_bytes(config, mode)
    for saving in ({"activation_checkpointing": True}, {"parallel": "fsdp"}, {"micro_batch_size": 8}):
        changed = with_train(config, **saving)
        assert predicted_bytes(changed, ComputeMode.of(changed, "cuda", 8)) < base
    for costing in ({"compile": "off"}, {"precision": "float32"}):
        changed = with_train(config, **costing)
        assert predicted_bytes(changed, ComputeMode.of(changed, "cuda", 8)) > base


@pytest.mark.parametrize("train", [{"compile": "on"}, {"activation_checkpointing": True}], ids=str)
def test_bfloat16_residual_stream_saves_memory(train: dict) -> None:
    for name in PRESETS:
        base = with_train(get_preset(name), precision="bfloat16", **train)
        half = replace(base, model=replace(base.model, residual_dtype="bfloat16"))
        for device in ("cpu", "cuda"):
            assert predicted_bytes(half, ComputeMode.of(half, device)) < predicted_bytes(
                base, ComputeMode.of(base, device)
            )
    float32 = with_train(half, precision="float32")
    assert predicted_bytes(float32, ComputeMode.of(float32, "cpu")) == predicted_bytes(
        with_train(base, precision="float32"), ComputeMode.of(float32, "cpu")
    )


def test_loss_chunk_sizes_match() -> None:
    assert memory_estimate.LOSS_CHUNK == {"cpu": CPU_CHUNK, "cuda": GPU_CHUNK}


def test_planning_does_not_import_torch() -> None:
    modules = "myllm.planning.forecast, myllm.planning.hardware_table, myllm.cli.plan"
    code = f"import sys; import {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout.strip() == "False"
