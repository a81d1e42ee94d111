"""What the machine is."""

import pytest
import torch

from myllm.hardware import device_name, measure_matmul_flops, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 3060", 25.5e12),
        ("NVIDIA GeForce RTX 3060 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L40", None),
        ("AMD EPYC", None),
    ],
)
def test_peaks_by_the_drivers_names(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_this_machine_has_a_name_and_a_speed() -> None:
    cpu = torch.device("cpu")
    assert device_name(cpu)
    assert 1e8 < measure_matmul_flops(cpu, size=128, seconds=0.05) < 1e14
