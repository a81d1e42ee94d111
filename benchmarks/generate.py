"""Tokens a second of prefill and greedy decode, ours against transformers.generate with the same weights.

    python benchmarks/generate.py [--models debug small-50m] [--batches 1 16] [--prompt 64] [--new 64] [--repeats 3]

Weights are random, in float32, mapped to Qwen3 (QK-norm) or Llama. Before it times anything it checks that both give
the same tokens. Ways are timed in turn; the figure is the median, and the decode's is what remains of the whole after
the prefill (one new token). Prints a Markdown table.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from myllm.config import ModelConfig
from myllm.generation import Continuation, continue_batch
from myllm.hardware import device_name
from myllm.model import Transformer
from myllm.presets import preset
from myllm.sampling import Sampling

# The mapping of weights is that of the parity test, which proves it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


def peer_of(model: Transformer) -> torch.nn.Module:
    """transformers' model with our weights and its default (SDPA) attention."""
    from model.test_parity import llama_weights, shared_settings

    config: ModelConfig = model.config
    settings = {**shared_settings(config), "attn_implementation": "sdpa"}
    peer = (
        Qwen3ForCausalLM(Qwen3Config(**settings, attention_bias=False))
        if config.qk_norm
        else LlamaForCausalLM(LlamaConfig(**settings, attention_bias=config.bias, mlp_bias=config.bias))
    )
    peer.load_state_dict(llama_weights(model), strict=True)
    return peer.eval()


def ours(model: Transformer, prompts: torch.Tensor, new: int) -> list[list[int]]:
    batch = [Continuation(prompt, 0) for prompt in prompts.tolist()]
    for _ in continue_batch(model, batch, new, Sampling(temperature=0)):
        pass
    return [row.written for row in batch]


def theirs(peer: torch.nn.Module, prompts: torch.Tensor, new: int) -> list[list[int]]:
    made = peer.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return made[:, prompts.shape[1] :].tolist()


def seconds(way: Callable[[int], object], new: int) -> float:
    started = time.perf_counter()
    way(new)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["debug", "small-50m"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(
        f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}; float32, greedy, prompts of "
        f"{options.prompt} tokens, {options.new} new ones, median of {options.repeats}\n"
    )
    print("| model | batch | way | prefill tokens/s | decode tokens/s | ratio |\n|---|---|---|---|---|---|")
    for name in options.models:
        model = Transformer(preset(name).model).eval()
        peer = peer_of(model)
        for batch in options.batches:
            compare(name, model, peer, batch, options)


def compare(name: str, model: Transformer, peer: torch.nn.Module, batch: int, options: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (batch, options.prompt), generator=generator)
    ways: dict[str, Callable[[int], list[list[int]]]] = {
        "transformers.generate": lambda new: theirs(peer, prompts, new),
        "myllm": lambda new: ours(model, prompts, new),
    }
    first, second = (way(8) for way in ways.values())  # and warms up
    assert first == second, f"{name}: the greedy tokens differ"
    times: dict[tuple[str, int], list[float]] = {(way, new): [] for way in ways for new in (1, options.new)}
    for _ in range(options.repeats):
        for way, new in times:
            times[way, new].append(seconds(ways[way], new))
    rates: dict[str, float] = {}
    for way in ways:
        prefill, whole = (statistics.median(times[way, new]) for new in (1, options.new))
        rates[way] = batch * (options.new - 1) / (whole - prefill)
        ratio = rates[way] / rates["transformers.generate"]
        print(
            f"| {name} | {batch} | {way} | {batch * options.prompt / prefill:,.0f} | {rates[way]:,.0f} | {ratio:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
