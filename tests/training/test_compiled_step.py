"""What torch.compile makes of a training step: one graph, made once. Graphs are run as traced, by no compiler."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import with_train
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from myllm.config import ModelConfig, RunConfig
from myllm.distributed import parallelize as parallel
from myllm.distributed.collectives import DistContext
from myllm.distributed.parallelize import parallelize, sync_grads_on_last, zero_grad
from myllm.distributed.precision import autocast
from myllm.evals.perplexity import perplexity_sums
from myllm.inference.generate import stream_tokens
from myllm.inference.sampling_params import SamplingParams
from myllm.model import transformer
from myllm.model.cross_entropy import linear_cross_entropy
from myllm.model.transformer import Transformer
from myllm.presets import PRESETS, get_preset
from myllm.training.anomaly.diagnose import diagnose

LAYERS = 9
"""More than torch.compile would make graphs of one function for (recompile_limit, 8)."""
ALONE = DistContext(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
PAIR = replace(ALONE, world_size=2)
"""What DDP is chosen for. The group of the test has one rank, which is no different to what is counted."""


class Graphs:
    """Every graph that was made since the test began, and how often one broke in two."""

    def __init__(self) -> None:
        self.traced: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.traced.append(graph)
        return aot_eager(graph, inputs)

    @property
    def count(self) -> tuple[int, int]:
        return len(self.traced), sum(counters["graph_break"].values())


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Counts; in place of a compiler."""
    torch.compiler.reset()
    counters.clear()
    counting = Graphs()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    yield counting
    torch.compiler.reset()


def small(model: ModelConfig, n_layers: int = 2) -> ModelConfig:
    """The same kind of model, in small."""
    grouped = 2 if model.kv_heads != model.n_heads else None
    return replace(
        model, max_seq_len=32, n_layers=n_layers, d_model=32, n_heads=4, n_kv_heads=grouped, head_dim=None, d_ff=48,
        vocab_size=300,
    )  # fmt: skip


def small_run(name: str, n_layers: int = 2, **train: Any) -> RunConfig:
    config = replace(get_preset(name), model=small(get_preset(name).model, n_layers))
    return with_train(config, compile="on", precision="bfloat16", micro_batch_size=4, **train)


def batch(rows: int = 4, length: int = 32) -> torch.Tensor:
    return torch.randint(300, (rows, length))


def train_steps(runner: torch.nn.Module, config: RunConfig, steps: int = 2) -> None:
    """Two micro-steps each, the second of which would travel between ranks; gradients appear, add up and vanish."""
    runner.train()
    for _ in range(steps):
        for last in (False, True):
            with sync_grads_on_last(runner, last):
                with autocast(config, ALONE.device):
                    loss = runner(batch(), batch())
                loss.backward()
        zero_grad(runner)


def evaluate(model: Transformer, config: RunConfig) -> None:
    """A whole batch of held-out text, the last short one, endings behind their contexts, a sample."""
    model.eval()
    with autocast(config, ALONE.device):
        batches = [(batch(rows), batch(rows)) for rows in (4, 3)]
        perplexity_sums(model.evaluate, batches, torch.ones(300, dtype=torch.int64), ALONE.device)
        model.score_continuations(batch(2, 10), torch.tensor([0, 0, 1]), batch(3, 5), batch(3, 5))
        list(stream_tokens(model, [1, 2, 3], 4, SamplingParams()))


def assert_graphs(count: int, config: RunConfig, graphs: Graphs) -> None:
    """Training makes this many graphs, without breaks; evaluations and later steps make none."""
    model = Transformer(config.model)
    runner = parallelize(model, config, ALONE)
    for _ in range(2):
        train_steps(runner, config)
        assert graphs.count == (count, 0)
        evaluate(model, config)
        assert graphs.count == (count, 0), "an evaluation was compiled"


@pytest.mark.parametrize("name", sorted({small(make().model): name for name, make in PRESETS.items()}.values()))
def test_whole_model_compiles_to_single_graph(name: str, graphs: Graphs) -> None:
    """Where it is asked for. Through micro-steps, steps, evaluations of other shapes, and training again."""
    assert_graphs(1, small_run(name, compile_unit="model"), graphs)


@pytest.mark.parametrize(("unit", "count"), [("model", 1), ("block", 2)])
def test_bfloat16_residual_adds_no_graphs(unit: str, count: int, graphs: Graphs) -> None:
    config = small_run("default-150m", compile_unit=unit)
    assert_graphs(count, replace(config, model=replace(config.model, residual_dtype="bfloat16")), graphs)


@pytest.mark.parametrize(("unit", "count"), [("model", 1), ("block", 2)])
def test_token_losses_match_batch_without_extra_graphs(unit: str, count: int, graphs: Graphs) -> None:
    config = small_run("debug", compile_unit=unit)
    model = Transformer(config.model)
    model.keep_token_losses = True
    runner = parallelize(model, config, ALONE)
    for _ in range(3):
        loss = runner(batch(), batch())
        loss.backward()
        assert model.token_losses is not None
        torch.testing.assert_close(model.token_losses.mean(), loss.detach())
    assert graphs.count == (count, 0)


def test_blocks_share_graph(graphs: Graphs) -> None:
    """And the loss has the other, however many layers there are."""
    assert_graphs(2, small_run("lf-llm-269m", LAYERS), graphs)


def test_checkpointed_blocks_share_graph(graphs: Graphs) -> None:
    """And the loss has the other; evaluations go through the same blocks and are not compiled."""
    assert_graphs(2, small_run("gpt2-124m", LAYERS, activation_checkpointing=True), graphs)


def test_diagnosis_does_not_compile(graphs: Graphs) -> None:
    """Its hooks see every module, in blocks that are compiled otherwise and are so again afterwards."""
    config = small_run("debug", activation_checkpointing=True)
    model = Transformer(config.model)
    runner = parallelize(model, config, ALONE)
    train_steps(runner, config, steps=1)
    found = diagnose(model, [(batch(1), batch(1))], 1, lambda: autocast(config, ALONE.device))
    assert graphs.count == (2, 0)
    assert {"blocks.0.attention", "blocks.1.feed_forward.down_proj"} <= {layer.module for layer in found.layers}
    model.zero_grad(set_to_none=True)
    train_steps(runner, config, steps=1)
    assert graphs.count == (2, 0)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("recompute", [False, True])
def test_fsdp_blocks_share_graph(recompute: bool, graphs: Graphs) -> None:
    config = small_run("lf-llm-269m", LAYERS, activation_checkpointing=recompute)
    model = Transformer(config.model)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train_steps(parallelize(model, config, ALONE), config, steps=3)
    assert graphs.count == (2, 0)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("recompute", [False, True])
def test_ddp_does_not_split_blocks(recompute: bool, graphs: Graphs) -> None:
    """One graph for all blocks and one for the loss, before the first step. Torch would cut each at 1 MB and again at a
    bucket."""
    config = small_run("lf-llm-269m", n_layers=3, activation_checkpointing=recompute)
    config = replace(config, model=replace(config.model, d_model=256, n_kv_heads=None))
    model = Transformer(config.model)
    runner = parallelize(model, config, PAIR)
    for _ in range(2):
        assert graphs.count == (2, 0)
        assert counters["stats"]["unique_graphs"] == 2
        train_steps(runner, config)
        evaluate(model, config)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("keep_token_losses", [False, True])
def test_ddp_splits_whole_model_at_buckets(
    keep_token_losses: bool, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo traces once, before the first step; DDP then cuts the graph at its buckets, without which nothing would
    travel beside the backward pass."""
    monkeypatch.setattr(parallel, "BUCKET_MB", 1)
    config = small_run("default-150m", n_layers=3, compile_unit="model")
    config = replace(config, model=replace(config.model, d_model=256, n_kv_heads=None))
    model = Transformer(config.model)
    model.keep_token_losses = keep_token_losses
    runner = parallelize(model, config, PAIR)
    parts, breaks = graphs.count
    assert parts > 1
    assert (breaks, counters["stats"]["unique_graphs"]) == (0, 1)
    for _ in range(2):
        train_steps(runner, config)
        evaluate(model, config)
        assert graphs.count == (parts, 0)
        assert counters["stats"]["unique_graphs"] == 1


def test_graph_break_raises(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not a slower run that nobody notices."""

    def breaking(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        torch._dynamo.graph_break()
        return linear_cross_entropy(*arguments)

    monkeypatch.setattr(transformer, "linear_cross_entropy", breaking)
    config = small_run("debug", compile_unit="model")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        train_steps(parallelize(Transformer(config.model), config, ALONE), config)
    assert graphs.traced == []
