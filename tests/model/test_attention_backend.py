"""Which attention kernel torch takes, and who is asked. Cards are made up: what is under test is the choice."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from myllm.config import ModelConfig, TrainConfig
from myllm.inference.generate import Sequence, generate_batch
from myllm.inference.sampling_params import SamplingParams
from myllm.model import attention_backend as sdpa
from myllm.model.transformer import Transformer
from myllm.presets import PRESETS

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CONFIG = ModelConfig(vocab_size=100, max_seq_len=64, d_model=64, n_layers=1, n_heads=4, d_ff=64)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A card of that major compute capability."""
    return lambda major: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_use_flash_on_cpu(name: str, dtype: torch.dtype) -> None:
    model = PRESETS[name]().model
    assert sdpa.selected_backend(replace(model, max_seq_len=128), CPU, dtype) == sdpa.SelectedBackend("flash")


@pytest.mark.parametrize("n_kv_heads", [None, 2])
def test_selected_backend_matches_profile(n_kv_heads: int | None) -> None:
    """Against the operations that a profile sees, with torch's choice and with one that is forced."""
    config = replace(CONFIG, n_kv_heads=n_kv_heads)
    for backend, expected in ((None, "flash"), (SDPBackend.MATH, "math")):
        with sdpa_kernel(backend or list(sdpa.BACKEND_NAMES)), profile(activities=[ProfilerActivity.CPU]) as recorded:
            choice = sdpa.selected_backend(config, CPU, torch.float32)
            q, k, v = (torch.randn(1, heads, 64, 16) for heads in (4, config.kv_heads, config.kv_heads))
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=n_kv_heads is not None)
        ran = {event.key for event in recorded.key_averages()}
        assert choice.name == expected
        assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in ran) == (expected == "flash")
        assert ("aten::_scaled_dot_product_attention_math" in ran) == (expected == "math")


@pytest.mark.parametrize(
    ("major", "first"), [(8, "flash"), (9, "cuDNN"), (10, "cuDNN"), (12, "flash")], ids=["A100", "H100", "B200", "5090"]
)
def test_backend_priority_by_compute_capability(major: int, first: str, card: Callable[[int], None]) -> None:
    """cuDNN before torch's own flash where it is faster; the math path last; as before afterwards, a CPU untouched."""
    card(major)
    before = torch._C._get_sdp_priority_order()
    with sdpa.training_backends(CUDA):
        order = [SDPBackend(number) for number in torch._C._get_sdp_priority_order()]
    assert next(sdpa.BACKEND_NAMES[candidate] for candidate in order if candidate in sdpa.BACKEND_NAMES) == first
    assert order.index(SDPBackend.MATH) == 3
    assert torch._C._get_sdp_priority_order() == before
    with sdpa.training_backends(CPU):
        assert torch._C._get_sdp_priority_order() == before


@pytest.mark.parametrize("major", [8, 9])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"attention": "flash"}, ["flash", "memory-efficient", "math"]),
        ({"attention": "cudnn"}, ["cuDNN", "flash", "memory-efficient", "math"]),
        ({"attention": "efficient"}, ["memory-efficient", "math"]),
        ({"attention": "math"}, ["math"]),
        ({"deterministic": True}, ["flash", "math"]),
        ({"deterministic": True, "attention": "math"}, ["math"]),
    ],
)
def test_backend_priority_follows_config(
    major: int, settings: dict[str, Any], expected: list[str], card: Callable[[int], None]
) -> None:
    card(major)
    with sdpa.training_backends(CUDA, TrainConfig(**settings)):
        allowed = set(attention._cur_sdpa_kernel_backends())
        order = [SDPBackend(number) for number in torch._C._get_sdp_priority_order()]
    assert [sdpa.BACKEND_NAMES[candidate] for candidate in order if candidate in allowed] == expected


def test_evaluations_never_use_cudnn(card: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch prefers on the card; nor does generation. The training step selects its own kernels."""
    card(9)
    devices: list[str] = []

    def on_cuda(device: torch.device) -> Any:
        devices.append(device.type)
        return sdpa.inference_backends(CUDA)

    monkeypatch.setattr("myllm.model.transformer.inference_backends", on_cuda)
    model, allowed = Transformer(CONFIG), []
    model.blocks[0].register_forward_hook(lambda *_: allowed.append(set(attention._cur_sdpa_kernel_backends())))
    tokens = torch.zeros(1, 8, dtype=torch.long)
    model.eval()
    model.evaluate(tokens, tokens)
    model.score_continuations(tokens, torch.tensor([0]), tokens, tokens)
    row = Sequence([1, 2], seed=0)
    list(generate_batch(model, [row], 2, SamplingParams()))
    assert len(allowed) == len(devices) >= 5
    assert all(
        backends == {SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH}
        for backends in allowed
    )
    model.train()
    model(tokens, tokens)
    assert SDPBackend.CUDNN_ATTENTION in allowed[-1]
    assert len(devices) == len(allowed) - 1


def test_selects_first_supported_backend(card: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's public questions."""
    card(9)
    monkeypatch.setattr(sdpa, "_inputs", lambda config, _, dtype: INPUTS(config, CPU, dtype))
    can = {"cudnn": True, "flash": True, "efficient": True}
    for name in can:
        monkeypatch.setattr(sdpa, f"can_use_{name}_attention", lambda *_, name=name, **__: can[name])

    def name(**settings: Any) -> str:
        return sdpa.selected_backend(CONFIG, CUDA, torch.bfloat16, TrainConfig(**settings)).name

    assert (name(), name(attention="flash"), name(attention="math")) == ("cuDNN", "flash", "math")
    can["cudnn"] = False
    assert (name(), name(attention="cudnn")) == ("flash", "flash")
    can["flash"] = False
    assert (name(), name(deterministic=True)) == ("memory-efficient", "math")


def test_rejected_backends_report_reasons(card: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    card(8)
    monkeypatch.setattr(sdpa, "_inputs", lambda config, _, dtype: INPUTS(config, CPU, dtype))

    def refusing(name: str) -> Callable[..., bool]:
        def ask(_: object, debug: bool = False) -> bool:
            if debug:
                warnings.warn(f"{name} does not (Triggered internally at sdp_utils.cpp)", stacklevel=1)
            return False

        return ask

    for name in ("flash", "cudnn", "efficient"):
        monkeypatch.setattr(sdpa, f"can_use_{name}_attention", refusing(name))

    def refusals(**settings: Any) -> tuple[str, ...]:
        return sdpa.selected_backend(CONFIG, CUDA, torch.float32, TrainConfig(**settings)).rejections

    assert refusals() == ("flash does not", "cudnn does not", "efficient does not")
    assert refusals(deterministic=True) == ("flash does not",)
    assert refusals(attention="math") == ()


def test_requested_backend_on_cpu() -> None:
    for kernel, expected in (("math", "math"), ("cudnn", "flash")):
        backend = sdpa.selected_backend(CONFIG, CPU, torch.float32, TrainConfig(attention=kernel))
        assert backend == sdpa.SelectedBackend(expected)


class Handle:
    """Of a newer flash that changes nothing."""

    removed = 0

    def remove(self) -> None:
        Handle.removed += 1


@pytest.fixture
def impl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Any], None]]:
    """Registers a made-up implementation under a name that torch knows."""
    Handle.removed = 0
    registered: dict[str, Any] = dict(attention._registry._FLASH_ATTENTION_IMPLS)
    monkeypatch.setattr(attention._registry, "_FLASH_ATTENTION_IMPLS", registered)
    monkeypatch.setattr(sdpa, "_inputs", lambda config, _, dtype: INPUTS(config, CPU, dtype))
    monkeypatch.setattr(torch, "Generator", lambda _: GENERATOR(CPU))
    monkeypatch.setattr(torch, "randn", lambda *a, **k: RANDN(*a, **k | {"device": CPU}))
    yield lambda name, register: attention.register_flash_attention_impl(name, register_fn=register)
    assert attention.current_flash_attention_impl() is None


INPUTS, GENERATOR, RANDN = sdpa._inputs, torch.Generator, torch.randn


def missing() -> None:
    raise ModuleNotFoundError("No module named 'flash_attn_interface'")


def broken() -> None:
    raise RuntimeError("does not expose FA3 kernels")


def test_newer_flash_is_active_during_run(impl: Callable, card: Callable[[int], None]) -> None:
    card(9)
    impl("FA3", Handle)
    with sdpa.use_newer_flash(CONFIG, CUDA) as remark:
        assert attention.current_flash_attention_impl() == "FA3"
        assert remark is None
        with sdpa.training_backends(CUDA):  # it is faster than cuDNN
            assert SDPBackend(torch._C._get_sdp_priority_order()[0]) == SDPBackend.FLASH_ATTENTION
    assert Handle.removed == 1


def test_missing_newer_flash_is_silent(impl: Callable, card: Callable[[int], None]) -> None:
    card(9)
    impl("FA3", missing)
    impl("FA4", Handle)
    with sdpa.use_newer_flash(CONFIG, CUDA) as remark:
        assert (attention.current_flash_attention_impl(), remark) == ("FA4", None)
    impl("FA4", missing)
    with sdpa.use_newer_flash(CONFIG, CUDA) as remark:
        assert (attention.current_flash_attention_impl(), remark) == (None, None)


def test_broken_newer_flash_is_reported_and_skipped(
    impl: Callable, card: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    card(9)
    impl("FA3", broken)
    impl("FA4", Handle)
    real, calls = sdpa._output_and_gradients, []

    def wrong_at_first(*args: Any) -> tuple[torch.Tensor, ...]:
        calls.append(args)
        out, *gradients = real(*args)
        return out, *(gradient * (1.1 if len(calls) == 1 else 1) for gradient in gradients)

    monkeypatch.setattr(sdpa, "_output_and_gradients", wrong_at_first)
    with sdpa.use_newer_flash(CONFIG, CUDA) as remark:
        assert attention.current_flash_attention_impl() is None
    assert Handle.removed == 1
    assert "FA3 is installed but cannot be activated: does not expose FA3 kernels" in remark
    assert "FA4 is installed but not used: its results differ from math by 10.0%" in remark


@pytest.mark.parametrize("major", [8, 12])
def test_newer_flash_unused_on_other_gpus(major: int, impl: Callable, card: Callable[[int], None]) -> None:
    card(major)
    impl("FA3", Handle)
    impl("FA4", Handle)
    with sdpa.use_newer_flash(CONFIG, CUDA) as remark:
        assert (attention.current_flash_attention_impl(), remark) == (None, None)


def test_run_errors_propagate(impl: Callable, card: Callable[[int], None]) -> None:
    card(9)
    impl("FA3", Handle)
    with pytest.raises(KeyError, match="the run's"), sdpa.use_newer_flash(CONFIG, CUDA):
        raise KeyError("the run's")
    assert Handle.removed == 1
