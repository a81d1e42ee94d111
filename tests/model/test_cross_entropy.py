"""The chunked loss against float64 cross-entropy, and what it never allocates."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compiler import needs_compiler
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from myllm.model import cross_entropy as module
from myllm.model.cross_entropy import IGNORE_INDEX, linear_cross_entropy, token_log_probs, token_ranks


def example(n: int, d: int, vocab_size: int, padding: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Hidden states, a head whose padding rows are not even zero, and targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).requires_grad_()
    weight = torch.randn(vocab_size + padding, d, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(vocab_size, (n,), generator=generator)


def in_float64(hidden, weight, targets, vocab_size):
    """Loss and both gradients by torch's own cross-entropy over all logits at once."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(h @ w[:vocab_size].t(), targets)
    return (loss.detach(), *torch.autograd.grad(loss, (h, w)))


def value_and_gradients(hidden, weight, targets, vocab_size):
    loss, _ = linear_cross_entropy(hidden, weight, targets, vocab_size)
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 12),
    vocab_size=st.integers(1, 50),
    padding=st.integers(0, 9),
    chunk=st.sampled_from([1, 2, 7, 16, 256]),
    seed=st.integers(0, 99),
    compiling=st.booleans(),
)
def test_value_and_gradients_match_float64(n, d, vocab_size, padding, chunk, seed, compiling):
    """In place, and in the form that is given to a compiler."""
    hidden, weight, targets = example(n, d, vocab_size, padding, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CPU_CHUNK", chunk)
        patch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        ours = value_and_gradients(hidden, weight, targets, vocab_size)
        _, losses = linear_cross_entropy(hidden, weight, targets, vocab_size)
    for mine, expected in zip(ours, in_float64(hidden, weight, targets, vocab_size), strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-6)
    logits = hidden.detach().double() @ weight.detach().double()[:vocab_size].t()
    torch.testing.assert_close(
        losses.double(), F.cross_entropy(logits, targets, reduction="none"), rtol=1e-5, atol=1e-6
    )
    assert not ours[2][vocab_size:].any()  # exactly zero, so that padding never moves


class FaultyProducts(TorchDispatchMode):
    """Those of MPS: `out` stays as it was, without a word, and a long sum has a term too many."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.out:
            return kwargs["out"]
        result = function(*args, **(kwargs or {}))
        return result + 1 if function is torch.ops.aten.mm.default and args[0].shape[1] > 16 else result


def test_mps_products_avoid_its_faults(monkeypatch):
    """No gradient and no score may come from a slice, or from a sum over the whole vocabulary."""
    hidden, weight, targets = example(10, 6, 37, 2)
    expected, scores = in_float64(hidden, weight, targets, 37), token_log_probs(hidden, weight, targets, 37)
    assert [module._is_mps(torch.device(name)) for name in ("mps", "cuda", "cpu")] == [True, False, False]
    assert module.MPS_TERMS < 32_767
    for name, value in {"CPU_CHUNK": 4, "MPS_TERMS": 16, "_is_mps": lambda device: True}.items():
        monkeypatch.setattr(module, name, value)
    with FaultyProducts():
        ours, faulty_scores = (way(hidden, weight, targets, 37) for way in (value_and_gradients, token_log_probs))
    for mine, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(faulty_scores, scores)


def test_gradient_scales_with_loss():
    hidden, weight, targets = example(5, 4, 9, 3)
    plain = value_and_gradients(hidden, weight, targets, 9)
    scaled = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, 9)[0] / 8, (hidden, weight))
    for part, whole in zip(scaled, plain[1:], strict=True):
        torch.testing.assert_close(part, whole / 8)


def test_very_unlikely_target():
    """Its probability is no float32 any more, its loss is."""
    hidden, weight, targets = example(6, 4, 9, 3)
    with torch.no_grad():
        hidden *= 200
    ours, exact = (way(hidden, weight, targets, 9) for way in (value_and_gradients, in_float64))
    assert exact[0] > 200
    for mine, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-6)


def test_padding_has_zero_probability():
    """A padding row that would win every token changes neither loss nor scores."""
    hidden, weight, targets = example(30, 4, 9, 3)
    with torch.no_grad():
        hidden[:, 0] = 1
        loud = weight.clone()
        loud[9:, 0] = 1e4
    of_loud, of_plain = (linear_cross_entropy(hidden, head, targets, 9)[1] for head in (loud, weight))
    assert torch.equal(of_loud, of_plain)
    for ours, plain in zip(token_ranks(hidden, loud, targets, 9), token_ranks(hidden, weight, targets, 9), strict=True):
        assert torch.equal(ours, plain)
    everything = torch.stack([token_log_probs(hidden, loud, torch.full((30,), token), 9) for token in range(9)])
    torch.testing.assert_close(everything.exp().sum(dim=0), torch.ones(30))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 30), ignored=st.floats(0, 1), chunk=st.sampled_from([1, 4, 256]), seed=st.integers(0, 99))
def test_token_ranks_match_float64(n, ignored, chunk, seed):
    hidden, weight, targets = example(n, 6, 11, 5, seed)
    targets[torch.rand(n, generator=torch.Generator().manual_seed(seed)) < ignored] = IGNORE_INDEX
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CPU_CHUNK", chunk)
        scores, ranks, confidence = token_ranks(hidden, weight, targets, 11)
        assert torch.equal(token_log_probs(hidden, weight, targets, 11), scores)
    logits = hidden.detach().double() @ weight.detach().double()[:11].t()
    kept, of_targets = targets != IGNORE_INDEX, logits.gather(1, targets.clamp(min=0).unsqueeze(1))
    expected = (of_targets.squeeze(1) - logits.logsumexp(-1)) * kept
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)
    assert scores.dtype == torch.float32
    assert torch.equal(ranks, (logits > of_targets).sum(-1) * kept)
    torch.testing.assert_close(confidence.double(), logits.softmax(-1).amax(-1) * kept, rtol=1e-5, atol=1e-6)
    assert not scores.requires_grad


def test_all_targets_ignored():
    hidden, weight, _ = example(7, 4, 9, 0)
    for result in token_ranks(hidden, weight, torch.full((7,), IGNORE_INDEX), 9):
        assert not result.any()


def test_bfloat16_autocast():
    hidden, weight, targets = example(300, 64, 500, 12)
    hidden, weight = (x.detach().mul(0.3).requires_grad_() for x in (hidden, weight))
    exact = value_and_gradients(hidden, weight, targets, 500)
    with torch.autocast("cpu", torch.bfloat16):
        rough = value_and_gradients(hidden, weight, targets, 500)
        scores = token_log_probs(hidden, weight, targets, 500)
    assert [x.dtype for x in rough] == [torch.float32] * 3
    assert scores.dtype == torch.float32
    torch.testing.assert_close(rough[0], exact[0], rtol=4e-3, atol=0)
    torch.testing.assert_close(-scores.mean(), exact[0], rtol=4e-3, atol=0)
    for ours, expected in zip(rough[1:], exact[1:], strict=True):
        assert (ours - expected).norm() < 0.02 * expected.norm()
    assert not torch.equal(rough[1], exact[1])  # autocast did something


def test_bfloat16_hidden_states_get_bfloat16_gradients():
    hidden, weight, targets = example(20, 8, 30, 2)
    low = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        _, grad_hidden, grad_weight = value_and_gradients(low, weight, targets, 30)
    assert (grad_hidden.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's result had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, tuple | list) else (result,):
            if isinstance(output, torch.Tensor):
                self.elements = max(self.elements, output.numel())
        return result


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_full_logits_are_never_materialized(autocast, compiling, monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK", 16)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    n, d, v = 512, 8, 100
    hidden, weight, targets = example(n, d, v - 4, 4)
    with LargestTensor() as plain:
        in_float64(hidden, weight, targets, v - 4)
    assert plain.elements >= n * (v - 4)  # the measure sees what a plain loss allocates
    with LargestTensor() as largest, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value_and_gradients(hidden, weight, targets, v - 4)
        token_log_probs(hidden, weight, targets, v - 4)
    assert largest.elements <= max(16 * v, n * d, v * d)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_matches_eager(autocast):
    hidden, weight, targets = example(300, 16, 100, 28)  # two whole chunks and a part of one
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = value_and_gradients(hidden, weight, targets, 100)
        (loss, losses), (code, *_) = run_and_get_code(compiled, hidden, weight, targets, 100)
        uncompiled = linear_cross_entropy(hidden, weight, targets, 100)[1]
    gradients = torch.autograd.grad(loss, (hidden, weight))
    for ours, expected in zip((loss.detach(), *gradients), plain, strict=True):
        assert ours.dtype == expected.dtype
        assert (ours - expected).norm() < (5e-3 if autocast else 1e-6) * expected.norm()
    assert not gradients[1][100:].any()
    torch.testing.assert_close(losses, uncompiled, rtol=2e-2 if autocast else 1e-5, atol=1e-5)
    assert not losses.requires_grad
    if autocast:  # a chunk's logits and their gradient are in memory in bfloat16 alone
        assert "(128, 128), (128, 1), torch.bfloat16" in code
        assert "(128, 128), (128, 1), torch.float32" not in code
