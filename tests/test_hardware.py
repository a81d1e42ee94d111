"""What the machine is."""

import torch

from myllm.hardware import device_name, measure_matmul_flops


def test_this_machine_has_a_name_and_a_speed() -> None:
    cpu = torch.device("cpu")
    assert device_name(cpu)
    assert 1e8 < measure_matmul_flops(cpu, size=128, seconds=0.05) < 1e14
