"""int8 weights: against per-row quantization in float64 NumPy, tied and untied, llama's shape and GPT-2's."""

import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from support.saved_checkpoints import save_weights

from myllm import paths
from myllm.cli import main as cli
from myllm.config import ModelConfig
from myllm.errors import UserError
from myllm.inference import int8
from myllm.inference import load as loading
from myllm.inference.generate import Sequence, generate_batch, stream_tokens
from myllm.inference.int8 import Int8Embedding, quantize_int8, weight_bytes, weight_dtype
from myllm.inference.load import load_model
from myllm.inference.sampling_params import SamplingParams
from myllm.model.transformer import Transformer

SMALL = ModelConfig(vocab_size=90, vocab_multiple=32, max_seq_len=24, d_model=32, n_layers=2, n_heads=4, d_ff=48)
KINDS = {
    "tied": {},
    "untied": {"tie_embeddings": False, "qk_norm": True, "n_kv_heads": 2},
    "gpt2": {"position": "learned", "bias": True, "norm": "layernorm", "activation": "gelu"},
}
GREEDY = SamplingParams(temperature=0)


def pair(kind: str) -> tuple[Transformer, Transformer]:
    """The same weights in float32 and in int8."""
    models = []
    for _ in range(2):
        model = Transformer(replace(SMALL, **KINDS[kind])).eval()
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
                if parameter.shape[0] == 96 and ("embedding" in name or "head" in name):
                    parameter[90:] = 0  # as training leaves the vocabulary's padding
        models.append(model)
    quantize_int8(models[1])
    return models[0], models[1]


def quantized(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Symmetric int8, a step a row: (V, D) float64; the steps, (V, 1); and where a weight is in the middle of two.

    A row's greatest weight always is, at 127.5 steps: which way it is rounded is the last bit's matter.
    """
    weight = weight.astype(np.float64)
    steps = np.maximum(np.abs(weight).max(axis=1, keepdims=True) / 127.5, np.finfo(np.float32).eps)
    scaled = weight / steps
    middle = np.abs(scaled - np.floor(scaled) - 0.5) < 1e-4
    return np.clip(np.rint(scaled), -128, 127) * steps, steps, middle


def matrices(model: Transformer) -> dict[str, torch.Tensor]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and not name.startswith("positions")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_weight_error_at_most_half_step(kind: str) -> None:
    floats, ints = pair(kind)
    assert matrices(floats).keys() == matrices(ints).keys()
    for name, weight in matrices(floats).items():
        actual = matrices(ints)[name].dequantize().double().numpy()
        weight = weight.detach().numpy()
        expected_weight, steps, middle = quantized(weight)
        assert (np.abs(actual - weight) <= steps * (0.5 + 1e-4)).all(), name
        assert np.abs(np.where(middle, 0, actual - expected_weight)).max() < 1e-6, name
        if "embedding" in name or "head" in name:
            assert not actual[90:].any()
    others = {name: value for name, value in floats.state_dict().items() if name not in matrices(floats)}
    assert all(torch.equal(ints.state_dict()[name], value) for name, value in others.items())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_linear_output_error_bound(kind: str) -> None:
    """|x (w - w')| <= step / 2 x sum |x|, for what each linear really gets."""
    floats, ints = pair(kind)
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, module in floats.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    floats(torch.arange(40).view(2, 20))
    for hook in hooks:
        hook.remove()
    assert len(inputs) == 4 * SMALL.n_layers  # the head is not called as a module
    for name, x in inputs.items():
        module = floats.get_submodule(name)
        _, steps, _ = quantized(module.weight.numpy())
        bound = x.double().abs().sum(dim=-1, keepdim=True) * torch.from_numpy(steps.T) / 2
        apart = (ints.get_submodule(name)(x) - module(x)).double().abs()
        assert (apart <= bound + 1e-5).all(), name
        assert apart.max() > 1e-4, name  # it is quantized


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_match_numpy_quantization(kind: str) -> None:
    floats, ints = pair(kind)
    tokens = torch.arange(40).view(2, 20)
    before = floats(tokens)
    reference = Transformer(floats.config).eval()
    reference.load_state_dict(floats.state_dict())
    for name, weight in matrices(reference).items():
        expected_weight, _, middle = quantized(matrices(floats)[name].numpy())
        weight.copy_(torch.from_numpy(np.where(middle, matrices(ints)[name].dequantize().numpy(), expected_weight)))
    reference.double()
    expected, actual = reference(tokens), ints(tokens)
    assert actual.shape == (2, 20, 90)
    error = (expected - before).abs().max()  # what quantization itself does
    assert (actual - expected).abs().max() < 1e-3 * error
    assert (actual - before).abs().max() < 1.001 * error
    assert error < 0.3 * before.std()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scores_match_logits(kind: str) -> None:
    """The losses and scores go another way than the logits do."""
    _, ints = pair(kind)
    tokens = torch.arange(40).view(2, 20)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    expected = ints(inputs).log_softmax(dim=-1).gather(2, targets.unsqueeze(2)).squeeze(2)
    assert torch.allclose(ints.evaluate(inputs, targets)[0], expected, atol=1e-4)
    assert torch.allclose(ints(inputs, targets), -expected.mean(), atol=1e-4)
    rows = torch.tensor([0, 1])
    assert torch.allclose(
        ints.score_continuations(inputs[:, :9], rows, inputs[:, 9:], targets[:, 9:]), expected[:, 9:], atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_greedy_generation_matches_uncached(kind: str) -> None:
    """With the cache as without it, in a batch as alone, and beyond the context."""
    _, ints = pair(kind)
    tokens = [3, 14, 15]
    for _ in range(20):
        tokens.append(int(ints(torch.tensor([tokens]))[0, -1].argmax()))
    assert list(stream_tokens(ints, tokens[:3], 20, GREEDY)) == tokens[3:]
    batch = [Sequence([7], 0), Sequence([3, 14, 15], 0)]
    assert sum(1 for _ in generate_batch(ints, batch, 50, GREEDY)) == 100
    assert batch[1].generated[:20] == tokens[3:]


def test_tied_head_stays_tied() -> None:
    floats, ints = pair("tied")
    assert ints.head is None
    assert isinstance(ints.embedding, Int8Embedding)
    assert torch.equal(ints.head_weight, ints.embedding.weight.dequantize())
    with torch.no_grad():
        looked_up = ints.embedding(torch.tensor([[5, 89, 5]]))
    assert torch.equal(looked_up, ints.head_weight[[5, 89, 5]].unsqueeze(0))
    assert sum(map(torch.Tensor.numel, ints.parameters())) == sum(map(torch.Tensor.numel, floats.parameters()))


def test_weight_memory() -> None:
    floats, ints = pair("untied")
    wide, narrow = weight_bytes(floats), weight_bytes(ints)
    assert wide == 4 * sum(map(torch.Tensor.numel, floats.parameters()))
    n_matrix = sum(map(torch.Tensor.numel, matrices(floats).values()))
    rows = sum(len(matrix) for matrix in matrices(floats).values())
    # A byte a weight, and a scale and a zero a row.
    assert n_matrix + 4 * rows <= narrow - (wide - 4 * n_matrix) <= n_matrix + 8 * rows
    assert (weight_dtype(floats), weight_dtype(ints)) == ("float32", "int8")


def test_missing_torchao_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(int8, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"python -m pip install torchao==\d"):
        loading.load_model(tmp_path / "nothing there", int8=True)  # said before anything is looked for
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["int8"] == [int8.TORCHAO_REQUIREMENT]
    assert int8.TORCHAO_REQUIREMENT in extras["dev"]


def test_importing_torchao_prints_nothing() -> None:
    code = """
from myllm.config import ModelConfig
from myllm.inference.int8 import quantize_int8
from myllm.inference.load import load_model
from myllm.model.transformer import Transformer
quantize_int8(Transformer(ModelConfig(64, 64, 8, 16, 1, 2, d_ff=16)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("command", ["sample", "chat", "serve"])
def test_int8_and_precision_reach_load_model(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(where: str, device: str, int8: bool, precision: str | None) -> None:
        calls.append((where, device, int8, precision))
        raise UserError("enough")

    monkeypatch.setattr(paths, "check_model_path", lambda model: None)
    monkeypatch.setattr(loading, "load_model", load)
    for words in ([], ["--int8"], ["--precision", "bfloat16"]):
        with pytest.raises(SystemExit):
            cli.main([command, "tiny", "--device", "cpu", *words, *(["--port", "0"] if command == "serve" else [])])
    assert calls == [
        ("tiny", "cpu", False, None), ("tiny", "cpu", True, None), ("tiny", "cpu", False, "bfloat16")
    ]  # fmt: skip


def test_load_checkpoint_in_int8(tmp_path: Path) -> None:
    floats, ints = pair("tied")
    save_weights(tmp_path / "checkpoints", floats)
    loaded = load_model(tmp_path, "cpu", int8=True).model
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(torch.tensor([[1, 2, 3]])), ints(torch.tensor([[1, 2, 3]])))
