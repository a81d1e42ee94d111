"""GPUs that people train on: peak FLOP/s and memory."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GpuSpec:
    """One model of GPU."""

    name: str
    """As `myllm plan --gpus` takes it."""
    pattern: str
    """Matches the name that the driver reports; the first match in the table counts."""
    tflops: float | None
    """Peak of dense matrix products in `half` with float32 accumulation, 10^12 FLOP/s. None: unknown."""
    memory_gib: float
    """As nvidia-smi shows it."""
    half: str = "bfloat16"
    """What train.precision auto means on it; float16 if it has no bfloat16."""

    @property
    def peak_flops(self) -> float | None:
        return self.tflops and self.tflops * 1e12


# Peaks are the manufacturers' figures without sparsity (half of what a data sheet marks "with sparsity"), at the
# standard power limit. NVIDIA data center: the data sheets of A100 (rev. 2021), A10, A30, A40, A10G, L4, L40, L40S,
# H100 (SXM, PCIe, NVL; 1,979, 1,513 and 1,671 with sparsity), H200, H20, GH200, HGX and DGX B200, GB200, HGX B300;
# T4 and V100 ("mixed precision", "tensor performance"; the V100's is SXM2's, 112 on PCIe).
# Workstation: data sheets of RTX A4000 to A6000 and of the Ada Generation, whose "tensor performance" is FP16 (Ampere)
# or FP8 (Ada, twice FP16) with sparsity; RTX PRO 6000: RTX Blackwell PRO white paper.
# GeForce: "Peak BF16 Tensor TFLOPS with FP32 accumulate" in the white papers of GA102, Ada and Blackwell: 512 FLOP per
# clock and SM (half of the rate with FP16 accumulation) x SMs x boost clock; GPUs that they omit follow this rule.
# AMD: data sheets of MI210, MI250X (a device is one of its two dies), MI300A, MI300X, MI325X, MI350X, MI355X.
# Checked against the source: A100, A40, B200, B300, GB200 and the rule for GeForce. The others are from memory: a data
# sheet that says otherwise is right.
# If one name stands for several memory sizes (RTX 3060, 3080, 4060 Ti), this is the more common part. Only `myllm plan`
# uses the memory, and a slightly different peak is better than none.
GPU_SPECS = (
    GpuSpec("GB300", r"GB300", 2_500, 277),
    GpuSpec("B300", r"B300", 2_250, 269),
    GpuSpec("GB200", r"GB200", 2_500, 185),
    GpuSpec("B200", r"B200", 2_250, 179),
    GpuSpec("B100", r"B100", 1_750, 179),
    GpuSpec("GH200-144", r"GH200 144G HBM3e", 989, 141),
    GpuSpec("GH200", r"GH200", 989, 95),
    GpuSpec("H200-NVL", r"H200 NVL", 835, 140),
    GpuSpec("H200", r"H200", 989, 140),
    GpuSpec("H100-NVL", r"H100 NVL", 835, 94),
    GpuSpec("H100-PCIe", r"H100 PCIe", 756, 80),
    GpuSpec("H100", r"H100 80GB HBM3", 989, 80),
    GpuSpec("H800", r"H800 80GB|H800(?! PCIe)", 989, 80),
    GpuSpec("H20", r"H20", 148, 95),
    GpuSpec("A100-80", r"A100-SXM4-80GB|A100 80GB PCIe|A100-SXM-80GB", 312, 80),
    GpuSpec("A100-40", r"A100-SXM4-40GB|A100-PCIE-40GB|A100-SXM-40GB", 312, 40),
    GpuSpec("A800", r"A800-SXM4-80GB|A800 80GB PCIe", 312, 80),
    GpuSpec("A40", r"A40", 149.7, 45),
    GpuSpec("A30", r"A30", 165, 24),
    GpuSpec("A10G", r"A10G", 70, 22.5),
    GpuSpec("A10", r"A10", 125, 22.5),
    GpuSpec("L40S", r"L40S", 362, 45),
    GpuSpec("L40", r"L40", 181, 45),
    GpuSpec("L4", r"L4", 121, 22.5),
    GpuSpec("V100-32", r"V100\S*-32GB|V100S\S*", 125, 32, "float16"),
    GpuSpec("V100-16", r"V100\S*-16GB", 125, 16, "float16"),
    GpuSpec("T4", r"T4", 65, 15, "float16"),
    GpuSpec("RTX-PRO-6000", r"RTX PRO 6000 Blackwell (?:Workstation|Server) Edition", 503.8, 95.6),
    GpuSpec("RTX6000-Ada", r"RTX 6000 Ada Generation", 364.2, 48),
    GpuSpec("RTX5000-Ada", r"RTX 5000 Ada Generation", 261.1, 32),
    GpuSpec("RTX4000-Ada", r"RTX 4000 Ada Generation", 81.9, 20),
    GpuSpec("RTX-A6000", r"RTX A6000", 154.8, 48),
    GpuSpec("RTX-A5000", r"RTX A5000", 111.1, 24),
    GpuSpec("RTX-A4000", r"RTX A4000", 76.7, 16),
    GpuSpec("RTX5090", r"RTX 5090", 209.5, 31.8),
    GpuSpec("RTX5080", r"RTX 5080", 112.6, 15.9),
    GpuSpec("RTX5070Ti", r"RTX 5070 Ti", 87.9, 15.9),
    GpuSpec("RTX5070", r"RTX 5070", 61.7, 12),
    GpuSpec("RTX4090", r"RTX 4090", 165.2, 24),
    GpuSpec("RTX4080S", r"RTX 4080 SUPER", 104.4, 16),
    GpuSpec("RTX4080", r"RTX 4080", 97.5, 16),
    GpuSpec("RTX4070TiS", r"RTX 4070 Ti SUPER", 88.2, 16),
    GpuSpec("RTX4070Ti", r"RTX 4070 Ti", 80.2, 12),
    GpuSpec("RTX4070S", r"RTX 4070 SUPER", 71, 12),
    GpuSpec("RTX4070", r"RTX 4070", 58.3, 12),
    GpuSpec("RTX4060Ti-16", r"RTX 4060 Ti", 44.1, 16),
    GpuSpec("RTX4060", r"RTX 4060", 30.2, 8),
    GpuSpec("RTX3090Ti", r"RTX 3090 Ti", 80, 24),
    GpuSpec("RTX3090", r"RTX 3090", 71, 24),
    GpuSpec("RTX3080Ti", r"RTX 3080 Ti", 68.2, 12),
    GpuSpec("RTX3080", r"RTX 3080", 59.5, 10),
    GpuSpec("RTX3070Ti", r"RTX 3070 Ti", 43.5, 8),
    GpuSpec("RTX3070", r"RTX 3070", 40.6, 8),
    GpuSpec("RTX3060Ti", r"RTX 3060 Ti", 32.4, 8),
    GpuSpec("RTX3060", r"RTX 3060", 25.5, 12),
    GpuSpec("MI355X", r"MI355X", 2_516, 288),
    GpuSpec("MI350X", r"MI350X", 2_306, 288),
    GpuSpec("MI325X", r"MI325X", 1_307, 256),
    GpuSpec("MI300X", r"MI300X", 1_307, 192),
    GpuSpec("MI300A", r"MI300A", 981, 128),
    GpuSpec("MI250X", r"MI250X", 191.5, 64),
    GpuSpec("MI210", r"MI210", 181, 64),
)
OTHER_PART = r"(?! (?:Ti|SUPER|D|Laptop|Max-Q|with Max-Q|MIG|Mobile|SFF)\b)"
"""A suffix that makes the name that of another GPU: GeForce's variants, and a slice of a GPU."""


def gpu_from_device_name(device_name: str) -> GpuSpec | None:
    """The GPU by its driver's name, such as "NVIDIA A100-SXM4-80GB". None: unknown, a slice (MIG) or a mobile part."""
    if re.search(r"\b(MIG|Laptop|Max-Q)\b", device_name):
        return None
    for gpu in GPU_SPECS:
        if re.search(rf"(?<![\w-])(?:{gpu.pattern})(?![\w-]){OTHER_PART}", device_name, re.IGNORECASE):
            return gpu
    return None


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s in half precision by the driver's name. None: unknown."""
    gpu = gpu_from_device_name(device_name)
    return gpu.peak_flops if gpu else None


def gpu_by_name(name: str) -> GpuSpec | None:
    """The GPU by a name that people type: A100-80, h100, rtx3060, RTX-3060."""

    def plain(text: str) -> str:
        return re.sub(r"nvidia|geforce|amd|instinct|gb$|[^a-z0-9]", "", text.lower())

    return next((gpu for gpu in GPU_SPECS if plain(gpu.name) == plain(name)), None)
