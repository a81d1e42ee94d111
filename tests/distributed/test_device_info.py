"""Device names and speed, and messages about GPUs that torch cannot use, with fake drivers and GPUs."""

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet
from torch._subclasses.fake_tensor import FakeTensorMode

from myllm.cli import launch
from myllm.cli.plan import describe_dry_run
from myllm.distributed import device_info
from myllm.distributed.collectives import choose_device, process_group, training_device
from myllm.distributed.device_info import (
    TORCH_BUILDS,
    cuda_device_count,
    cuda_problem,
    device_name,
    measure_matmul_flops,
    nvidia_driver,
)
from myllm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_cpu_name_and_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a product takes 2 ms."""
    cpu, products, real = torch.device("cpu"), [], torch.mm

    def mm(*matrices: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        products.append(out.shape)
        return real(*matrices, out=out)

    assert device_name(cpu)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(device_info.time, "perf_counter", lambda: 0.002 * len(products))
    assert measure_matmul_flops(cpu, size=128, seconds=0.05) == pytest.approx(2 * 128**3 / 0.002)
    assert set(products) == {(128, 128)}


def test_gpu_timing_uses_large_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 8,192 cubed products in the given type, synchronized once per series."""
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
    monkeypatch.setattr(device_info, "time_on_device", timed)
    with FakeTensorMode():
        rate = measure_matmul_flops(torch.device("cuda"), torch.bfloat16, seconds=0.1)
    assert rate == pytest.approx(2 * 8_192**3 / 0.002)
    assert set(shapes) == {((8_192, 8_192), torch.bfloat16)}
    assert len(waits) < len(shapes) / 8


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Fakes an NVIDIA driver and the CUDA version of torch, with eight GPUs that torch cannot use."""

    def install(version: str | None, cuda: str | None, built: str | None) -> None:
        banner = f"| NVIDIA-SMI {version}     Driver Version: {version}     CUDA Version: {cuda}     |"
        smi = tmp_path / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\necho '{banner}'\n" if version else "#!/bin/sh\necho no driver; exit 9\n")
        smi.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    return install


@pytest.mark.parametrize(
    ("version", "cuda", "built", "message", "command"),
    [
        ("550.54.15", "12.4", "13.0", "is built for CUDA 13.0 and needs driver 580 or newer", "torch==2.13.0 .*/cu126"),
        ("570.86", "12.8", "13.0", "and needs driver 580 or newer", "torch==2.11.0 .*/cu128"),
        ("470.82", "11.4", "12.6", "needs driver 525 or newer", "install a driver 580 or newer"),
        ("470.82", "ERR!", "12.6", "needs driver 525 or newer", "torch==2.13.0 .*/cu130"),
        ("580.65", "13.0", None, "is a build without CUDA", "torch==2.13.0 .*/cu130"),
        ("580.65", "13.0", "13.0", "which fits torch's CUDA 13.0, but torch reports: ", ""),
        ("525.60", "12.0", "12.8", "which fits torch's CUDA 12.8", ""),  # a newer minor version needs no newer driver
    ],
)
def test_unusable_gpu_raises_with_remedy(
    version: str, cuda: str, built: str | None, message: str, command: str, driver: Callable[..., None]
) -> None:
    driver(version, cuda, built)
    why = cuda_problem()
    assert f"driver {version}" in why
    assert message in why
    assert re.search(command, why), why
    assert (f"{shlex.quote(sys.executable)} -m pip install" in why) == ("torch==" in why)
    assert cuda_device_count() == 0
    assert choose_device("auto") == torch.device("cpu")  # for a sample it will do
    for start in (training_device, lambda device: process_group(device).__enter__()):
        with pytest.raises(UserError, match=r"--train\.device cpu") as refused:
            start("auto")
        assert why in str(refused.value)
    with pytest.raises(UserError) as refused:
        choose_device("cuda")
    assert why in str(refused.value)
    assert training_device("cpu") == torch.device("cpu")


def test_machine_without_gpus_uses_cpu(driver: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    driver(None, None, "13.0")
    assert nvidia_driver() == (None, None)
    assert cuda_problem() is None
    assert training_device("auto") == torch.device("cpu")
    driver("550.54.15", "12.4", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden by the user
    assert training_device("auto") == torch.device("cpu")


def test_dry_run_without_usable_gpu(driver: Callable[..., None]) -> None:
    driver("550.54.15", "12.4", "13.0")
    output = describe_dry_run(launch.parse_args(["debug", "--train.device", "auto", "--dry-run"]))
    assert "TFLOP/s" in output
    assert "no GPU       NVIDIA's driver 550.54.15 is installed, for CUDA up to 12.4, but torch" in output


@pytest.mark.parametrize(
    ("capability", "kernels", "fits"),
    [
        ((7, 0), ["sm_75", "sm_80", "sm_90", "compute_120"], False),
        ((7, 5), ["sm_75", "sm_80"], True),
        ((8, 9), ["sm_80", "sm_86"], True),  # of the same generation
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((10, 0), ["sm_80", "sm_90"], False),
        ((12, 1), ["sm_90", "compute_90"], True),  # compiled when it is loaded
        ((8, 0), [], True),  # does not say
        ((9, 4), ["gfx942"], True),
    ],
)
def test_gpu_without_kernels_raises(
    capability: tuple[int, int], kernels: list[str], fits: bool, driver: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    driver("560.35", "12.6", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: kernels)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some card")
    if fits:
        assert training_device("auto", 3) == torch.device("cuda", 3)
        return
    with pytest.raises(UserError, match=f"Some card has compute capability {capability[0]}.{capability[1]}") as refused:
        training_device("auto")
    assert ", ".join(kernels) in str(refused.value)
    assert "torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126" in str(refused.value)


def test_recommended_torch_builds_supported() -> None:
    """By pyproject.toml, in the order from the newest CUDA."""
    bounds = SpecifierSet(re.search(r'"torch([^"]+)"', (ROOT / "pyproject.toml").read_text())[1])
    assert all(version in bounds for _, version, _, _ in TORCH_BUILDS)
    assert [cuda for cuda, *_ in TORCH_BUILDS] == sorted((cuda for cuda, *_ in TORCH_BUILDS), reverse=True)
