"""FLOPs a token against torch's own counter, moments against a real optimizer, and peaks by what drivers print."""

from dataclasses import replace

import pytest
import torch
from support.kinds import MODEL_KINDS, by_model_kind, by_optimizer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from myllm.config import ModelConfig, OptimConfig, RunConfig
from myllm.errors import UserError
from myllm.model.transformer import Transformer
from myllm.optim.optimizer import ScheduledOptimizer
from myllm.planning.disk import SPARE_BYTES, checkpoint_bytes
from myllm.planning.flops import block_matrices, flops_per_token, n_parameters, optimizer_state_bytes
from myllm.planning.forecast import parse_hardware
from myllm.planning.gpu_specs import GPU_SPECS, gpu_by_name, gpu_from_device_name, peak_flops
from myllm.presets import PRESETS, get_preset

ATEN = torch.ops.aten
FUSED_ON_A_CPU = {  # with the counter's own formulas, which it has for those of GPUs alone
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def counted(config: ModelConfig, rows: int, backend: SDPBackend = SDPBackend.MATH) -> int:
    """Forward and backward, by torch's counter, with tensors that have shapes but no numbers.

    The loss's own function and the backward pass of attention are among what it sees. Under autocast, since without
    it the loss adds a product in place (addmm_), which the counter overlooks.
    """
    counting = FlopCounterMode(display=False, custom_mapping=FUSED_ON_A_CPU)
    with FakeTensorMode():
        model, tokens = Transformer(config), torch.zeros(rows, config.max_seq_len, dtype=torch.int64)
        with counting, sdpa_kernel(backend), torch.autocast("cpu", torch.bfloat16):
            model(tokens, tokens).backward()
    return counting.get_total_flops()


def vectors(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters() if p.ndim == 1)


SMALL = ModelConfig(vocab_size=512, max_seq_len=128, d_model=128, n_layers=3, n_heads=4, d_ff=512)


@by_model_kind
def test_flops_match_torch_counter(kind) -> None:
    """With plain attention, to the last one but for vectors: the formula takes biases and norms for multiplied.

    Both count attention in full, though a causal kernel may skip half of it.
    """
    config = replace(SMALL, **kind)
    tokens = 2 * config.max_seq_len
    assert counted(config, 2) == tokens * (flops_per_token(config) - 6 * vectors(config))


@pytest.mark.parametrize("kind", ["plain", "gpt2", "relu2, untied"])
def test_fused_attention_recomputes_scores(kind) -> None:
    """Its backward pass computes the scores again: 2 d_attention T a token and layer that the formula leaves out.

    With grouped heads torch's counter takes all heads for the queries' number; that is not compared.
    """
    config = replace(SMALL, **MODEL_KINDS[kind])
    tokens, d = 2 * config.max_seq_len, config.n_heads * config.head_size
    again = 2 * config.n_layers * d * config.max_seq_len
    expected = tokens * (flops_per_token(config) - 6 * vectors(config) + again)
    assert counted(config, 2, SDPBackend.FLASH_ATTENTION) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_preset_flops(name: str) -> None:
    """One sequence at full size; what it pads the vocabulary with is counted too."""
    config = get_preset(name).model
    padding = 6 * (config.padded_vocab_size - config.vocab_size) * config.d_model
    expected = flops_per_token(config) - 6 * vectors(config) + padding
    assert counted(config, 1) == config.max_seq_len * expected


def test_reference_run_flops() -> None:
    """6 x 320,145,408 + 12 x 16 layers x 1,024 x 2,048."""
    assert flops_per_token(get_preset("lf-llm-269m").model) == 2_323_525_632


def test_tied_head_and_lookup_flops() -> None:
    model = get_preset("default-150m").model
    untied = replace(model, tie_embeddings=False)
    assert flops_per_token(untied) == flops_per_token(model)
    assert n_parameters(untied) - n_parameters(model) == model.vocab_size * model.d_model
    assert flops_per_token(replace(model, position="learned")) == flops_per_token(model)


# -- GPUs -------------------------------------------------------------------------------------------------------------

DRIVERS = {
    "NVIDIA A100-SXM4-80GB": ("A100-80", 312),
    "NVIDIA A100-SXM4-40GB": ("A100-40", 312),
    "NVIDIA A100-PCIE-40GB": ("A100-40", 312),
    "NVIDIA A100 80GB PCIe": ("A100-80", 312),
    "NVIDIA A800-SXM4-80GB": ("A800", 312),
    "NVIDIA H100 80GB HBM3": ("H100", 989),
    "NVIDIA H100 PCIe": ("H100-PCIe", 756),
    "NVIDIA H100 NVL": ("H100-NVL", 835),
    "NVIDIA H800": ("H800", 989),
    "NVIDIA H20": ("H20", 148),
    "NVIDIA H200": ("H200", 989),
    "NVIDIA H200 NVL": ("H200-NVL", 835),
    "NVIDIA GH200 480GB": ("GH200", 989),
    "NVIDIA GH200 144G HBM3e": ("GH200-144", 989),
    "NVIDIA B200": ("B200", 2_250),
    "NVIDIA GB200": ("GB200", 2_500),
    "NVIDIA L4": ("L4", 121),
    "NVIDIA L40": ("L40", 181),
    "NVIDIA L40S": ("L40S", 362),
    "NVIDIA A10": ("A10", 125),
    "NVIDIA A10G": ("A10G", 70),
    "NVIDIA A40": ("A40", 149.7),
    "NVIDIA RTX A6000": ("RTX-A6000", 154.8),
    "NVIDIA RTX 6000 Ada Generation": ("RTX6000-Ada", 364.2),
    "NVIDIA GeForce RTX 5090": ("RTX5090", 209.5),
    "NVIDIA GeForce RTX 5080": ("RTX5080", 112.6),
    "NVIDIA GeForce RTX 4090": ("RTX4090", 165.2),
    "NVIDIA GeForce RTX 4080": ("RTX4080", 97.5),
    "NVIDIA GeForce RTX 4080 SUPER": ("RTX4080S", 104.4),
    "NVIDIA GeForce RTX 4070": ("RTX4070", 58.3),
    "NVIDIA GeForce RTX 4070 Ti": ("RTX4070Ti", 80.2),
    "NVIDIA GeForce RTX 4070 Ti SUPER": ("RTX4070TiS", 88.2),
    "NVIDIA GeForce RTX 3090": ("RTX3090", 71),
    "NVIDIA GeForce RTX 3090 Ti": ("RTX3090Ti", 80),
    "NVIDIA GeForce RTX 3080": ("RTX3080", 59.5),
    "NVIDIA GeForce RTX 3070": ("RTX3070", 40.6),
    "NVIDIA GeForce RTX 3060": ("RTX3060", 25.5),
    "NVIDIA GeForce RTX 3060 Ti": ("RTX3060Ti", 32.4),
    "Tesla T4": ("T4", 65),
    "Tesla V100-SXM2-16GB": ("V100-16", 125),
    "Tesla V100-SXM2-32GB": ("V100-32", 125),
    "AMD Instinct MI300X": ("MI300X", 1_307),
    "AMD Instinct MI325X": ("MI325X", 1_307),
}
UNKNOWN = (
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 3080 Laptop GPU",
    "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    "NVIDIA A100X",
    "NVIDIA GeForce GTX 1080 Ti",
    "NVIDIA GeForce RTX 2080 Ti",
    "NVIDIA RTX 6000",
    "Quadro RTX 6000",
    "AMD EPYC",
    "Intel(R) Xeon(R) Platinum 8480+",
    "",
)


@pytest.mark.parametrize("driver", DRIVERS)
def test_gpu_from_device_name(driver: str) -> None:
    name, tflops = DRIVERS[driver]
    assert gpu_from_device_name(driver).name == name
    assert peak_flops(driver) == (None if tflops is None else pytest.approx(tflops * 1e12))


@pytest.mark.parametrize("driver", UNKNOWN)
def test_unknown_devices_have_no_peak_flops(driver: str) -> None:
    assert gpu_from_device_name(driver) is None
    assert peak_flops(driver) is None


@pytest.mark.parametrize(
    ("name", "units", "clock_ghz"),
    [
        ("RTX3060", 28, 1.777), ("RTX3060Ti", 38, 1.665), ("RTX3070", 46, 1.725), ("RTX3070Ti", 48, 1.77),
        ("RTX3080", 68, 1.71), ("RTX3080Ti", 80, 1.665), ("RTX3090", 82, 1.695), ("RTX3090Ti", 84, 1.86),
        ("RTX4060", 24, 2.46), ("RTX4060Ti-16", 34, 2.535), ("RTX4070", 46, 2.475), ("RTX4070S", 56, 2.475),
        ("RTX4070Ti", 60, 2.61), ("RTX4070TiS", 66, 2.61), ("RTX4080", 76, 2.505), ("RTX4080S", 80, 2.55),
        ("RTX4090", 128, 2.52), ("RTX5070", 48, 2.512), ("RTX5070Ti", 70, 2.452), ("RTX5080", 84, 2.617),
        ("RTX5090", 170, 2.407),
    ],
)  # fmt: skip
def test_geforce_peaks_match_chip_specs(name: str, units: int, clock_ghz: float) -> None:
    """512 FLOP a clock and SM, summed in float32."""
    assert gpu_by_name(name).tflops == pytest.approx(units * 512 * clock_ghz / 1_000, rel=0.01)


def test_gpu_name_aliases() -> None:
    for name in ("A100-80", "a100-80gb", "A100 80", "a10080"):
        assert gpu_by_name(name).name == "A100-80"
    for name in ("RTX3060", "rtx 3060", "RTX-3060", "geforce-rtx-3060"):
        assert gpu_by_name(name).name == "RTX3060"
    assert len({gpu.name for gpu in GPU_SPECS}) == len(GPU_SPECS)
    for gpu in GPU_SPECS:
        assert gpu_by_name(gpu.name) is gpu
        assert parse_hardware(f"8x{gpu.name}").gpu is gpu
        assert 5 < gpu.memory_gib < 300


def test_unknown_gpus_raise() -> None:
    with pytest.raises(UserError, match=r"--gpus '4xRTX3061'.*did you mean.*known GPUs: .*A100-80.*RTX3060"):
        parse_hardware("4xRTX3061")
    for text in ("0xH100", "8x", "xx", ""):
        with pytest.raises(UserError, match="expected a number and a GPU, such as 8xA100-80"):
            parse_hardware(text)


# -- the optimizer's state --------------------------------------------------------------------------------------------


def parameters(name: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return dict(Transformer(get_preset(name).model).named_parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_block_matrices(name):
    matrices = [p.numel() for key, p in parameters(name).items() if key.startswith("blocks.") and p.ndim == 2]
    assert block_matrices(get_preset(name).model) == sum(matrices)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments(optimizer):
    """AdamW: two per parameter. Muon: one in 16 x (4 x 1,024 x 1,024 + 3 x 4,096 x 1,024) = 268,435,456 of them."""
    config = get_preset("lf-llm-269m-modern")
    config = replace(config, optim=replace(config.optim, optimizer=optimizer))
    stored = sum(p.numel() for p in parameters(config.name).values())
    moments = 2 * stored - (268_435_456 if optimizer == "muon" else 0)
    assert optimizer_state_bytes(config) == 4 * moments
    assert checkpoint_bytes(config) == 4 * (stored + moments) + SPARE_BYTES


@by_optimizer
@by_model_kind
def test_bytes_of_a_real_optimizer(optimizer, kind):
    shape = ModelConfig(vocab_size=100, max_seq_len=32, d_model=64, n_layers=3, n_heads=4, d_ff=96)
    config = RunConfig(model=replace(shape, **kind), optim=OptimConfig(optimizer=optimizer))
    model = Transformer(config.model)
    state = ScheduledOptimizer(model.named_parameters(), model.hidden_matrices(), config.optim, 10).zero_state()
    moments = [tensor for kinds in state.values() for name, tensor in kinds.items() if name != "step"]
    assert optimizer_state_bytes(config) == sum(tensor.nbytes for tensor in moments)
