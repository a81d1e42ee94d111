"""Decode speed: ours against transformers.generate with the same weights.

    python benchmarks/generate.py [--models debug small-50m] [--batches 1 16] [--prompt 64] [--new 64] [--repeats 5]

Models are exported with random float32 weights. Checks first that all methods give the same greedy tokens. "sampled" is
temperature 0.8 and top-k 50. transformers runs with its default cache and with a static cache. Methods are timed in
turn, and a ratio is of one turn, so that other work on the machine affects both. Decode time is the total without the
prefill (one new token). Prints a Markdown table of medians with minimum and maximum.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from myllm.distributed.device_info import device_name
from myllm.hub.architectures import select_architecture, transformers_config
from myllm.hub.weights import export_weights
from myllm.inference.generate import Sequence, generate_batch
from myllm.inference.sampling_params import SamplingParams
from myllm.model.transformer import Transformer
from myllm.presets import get_preset

Method = Callable[[int, SamplingParams], list[list[int]]]
"""From the number of new tokens and the sampling parameters to the tokens of each sequence."""


def peer_of(model: Transformer) -> torch.nn.Module:
    """The exported model in transformers, with its default (SDPA) attention."""
    kind = select_architecture(model.config)
    config = AutoConfig.for_model(**transformers_config(model.config, 0, "float32"))
    peer = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    weights = export_weights(kind, model.config, model.state_dict())
    peer.load_state_dict(weights, strict=not model.config.tie_embeddings)
    peer.tie_weights()
    return peer.eval()


def generate_myllm(model: Transformer, prompts: torch.Tensor, new: int, sampling: SamplingParams) -> list[list[int]]:
    batch = [Sequence(prompt, seed) for seed, prompt in enumerate(prompts.tolist())]
    for _ in generate_batch(model, batch, new, sampling):
        pass
    return [row.generated for row in batch]


def generate_transformers(
    peer: torch.nn.Module, prompts: torch.Tensor, new: int, sampling: SamplingParams, cache: str | None
) -> list[list[int]]:
    sampling_settings = {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
    }
    generated = peer.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new, pad_token_id=0,
        eos_token_id=None, use_cache=True, cache_implementation=cache,
        **(sampling_settings if sampling.temperature else {"do_sample": False}),
    )  # fmt: skip
    return generated[:, prompts.shape[1] :].tolist()


def decode_rate(method: Method, sampling: SamplingParams, new: int, batch: int) -> float:
    """Tokens per second after the first."""
    started = time.perf_counter()
    method(1, sampling)
    between = time.perf_counter()
    method(new, sampling)
    return batch * (new - 1) / (time.perf_counter() - between - (between - started))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["debug", "small-50m"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print(
        f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}; float32, prompts of "
        f"{options.prompt} tokens, {options.new} new tokens, median of {options.repeats} (minimum to maximum)\n"
    )
    print("| model | batch | mode | method | decode tokens/s | ratio of myllm |\n|---|---|---|---|---|---|")
    for name in options.models:
        model = Transformer(get_preset(name).model).eval()
        peer = peer_of(model)
        for batch in options.batches:
            compare(name, model, peer, batch, options)


def compare(name: str, model: Transformer, peer: torch.nn.Module, batch: int, options: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (batch, options.prompt), generator=generator)
    methods: dict[str, Method] = {
        "transformers.generate": lambda new, sampling: generate_transformers(peer, prompts, new, sampling, None),
        "transformers.generate, static cache": lambda new, sampling: generate_transformers(
            peer, prompts, new, sampling, "static"
        ),
        "myllm": lambda new, sampling: generate_myllm(model, prompts, new, sampling),
    }
    for mode, sampling in (("greedy", SamplingParams(temperature=0)), ("sampled", SamplingParams(0.8, 50))):
        outputs = [method(8, sampling) for method in methods.values()]  # also the warm-up
        assert mode == "sampled" or outputs[0] == outputs[1] == outputs[2], f"{name}: the greedy tokens differ"
        rates: dict[str, list[float]] = {method: [] for method in methods}
        for _ in range(options.repeats):
            for method in methods:
                rates[method].append(decode_rate(methods[method], sampling, options.new, batch))
        for method, values in rates.items():
            ratios = [own / other for own, other in zip(rates["myllm"], values, strict=True)]
            print(f"| {name} | {batch} | {mode} | {method} | {spread(values, 0)} | {spread(ratios, 2)} |", flush=True)


def spread(values: list[float], digits: int) -> str:
    """Median, minimum and maximum."""
    median, low, high = (f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})"


if __name__ == "__main__":
    main()
