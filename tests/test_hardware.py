"""What the machine is."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from myllm import hardware
from myllm.hardware import device_name, measure_matmul_flops, seconds_of


def test_this_machine_has_a_name_and_a_speed() -> None:
    cpu = torch.device("cpu")
    assert device_name(cpu)
    assert 1e8 < measure_matmul_flops(cpu, size=128, seconds=0.05) < 1e14


def test_a_card_is_timed_by_products_that_fill_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8,192 cubed, in the type that was asked for, and with one wait for any number of them."""
    shapes, waits, real = [], [], torch.mm

    def mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        shapes.append((a.shape, a.dtype))
        return real(a, b, out=out)

    def timed(work: Callable[[], None], device: torch.device) -> float:
        assert device.type == "cuda"
        before = len(shapes)
        work()
        waits.append(device)
        return 0.002 * (len(shapes) - before)

    randn = torch.randn
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "randn", lambda *shape, device, **kinds: randn(*shape, **kinds))
    monkeypatch.setattr(hardware, "seconds_of", timed)
    with FakeTensorMode():
        rate = measure_matmul_flops(torch.device("cuda"), torch.bfloat16, seconds=0.1)
    assert rate == pytest.approx(2 * 8_192**3 / 0.002)
    assert set(shapes) == {((8_192, 8_192), torch.bfloat16)}
    assert len(waits) < len(shapes) / 8


def test_a_card_times_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def event(enable_timing: bool) -> Any:
        assert enable_timing
        return SimpleNamespace(
            record=lambda: said.append("record"),
            synchronize=lambda: said.append("wait"),
            elapsed_time=lambda other: 250.0,
        )

    monkeypatch.setattr(torch.cuda, "Event", event)
    assert seconds_of(lambda: said.append("work"), torch.device("cuda")) == 0.25
    assert said == ["record", "work", "record", "wait"]
