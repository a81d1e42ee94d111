"""Tokens a second of decode, ours against transformers.generate with the same weights.

    python benchmarks/generate.py [--models debug small-50m] [--batches 1 16] [--prompt 64] [--new 64] [--repeats 5]

Weights are random, in float32, and exported. Before it times anything it checks that all ways
give the same greedy tokens. Sampled is a temperature of 0.8 among the 50 likeliest. transformers runs with its default
cache and with its static one. Ways are timed in turn, and a ratio is that of one turn, so that other work on the
machine weighs on both; figures are medians, with the least and the greatest. Decode is what remains of the whole after
the prefill (one new token). Prints a Markdown table.
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
from myllm.hub.export.weights import to_transformers
from myllm.inference.generate import Sequence, generate_batch
from myllm.inference.sampling_params import SamplingParams
from myllm.model.transformer import Transformer
from myllm.presets import get_preset

Method = Callable[[int, SamplingParams], list[list[int]]]
"""New tokens and how they are chosen, to each row's tokens."""


def peer_of(model: Transformer) -> torch.nn.Module:
    """The exporter's model, with transformers' default (SDPA) attention."""
    kind = select_architecture(model.config)
    config = AutoConfig.for_model(**transformers_config(model.config, 0, "float32"))
    peer = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    weights = to_transformers(kind, model.config, model.state_dict())
    peer.load_state_dict(weights, strict=not model.config.tie_embeddings)
    peer.tie_weights()
    return peer.eval()


def ours(model: Transformer, prompts: torch.Tensor, new: int, sampling: SamplingParams) -> list[list[int]]:
    batch = [Sequence(prompt, seed) for seed, prompt in enumerate(prompts.tolist())]
    for _ in generate_batch(model, batch, new, sampling):
        pass
    return [row.generated for row in batch]


def theirs(
    peer: torch.nn.Module, prompts: torch.Tensor, new: int, sampling: SamplingParams, cache: str | None
) -> list[list[int]]:
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    generated = peer.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new, pad_token_id=0,
        eos_token_id=None, use_cache=True, cache_implementation=cache,
        **(drawn if sampling.temperature else {"do_sample": False}),
    )  # fmt: skip
    return generated[:, prompts.shape[1] :].tolist()


def decode_rate(method: Method, sampling: SamplingParams, new: int, batch: int) -> float:
    """Tokens a second behind the first."""
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
        f"{options.prompt} tokens, {options.new} new ones, median of {options.repeats} (least to greatest)\n"
    )
    print("| model | batch | choice | way | decode tokens/s | myllm to this |\n|---|---|---|---|---|---|")
    for name in options.models:
        model = Transformer(get_preset(name).model).eval()
        peer = peer_of(model)
        for batch in options.batches:
            compare(name, model, peer, batch, options)


def compare(name: str, model: Transformer, peer: torch.nn.Module, batch: int, options: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (batch, options.prompt), generator=generator)
    methods: dict[str, Method] = {
        "transformers.generate": lambda new, sampling: theirs(peer, prompts, new, sampling, None),
        "transformers.generate, static cache": lambda new, sampling: theirs(peer, prompts, new, sampling, "static"),
        "myllm": lambda new, sampling: ours(model, prompts, new, sampling),
    }
    for choice, sampling in (("greedy", SamplingParams(temperature=0)), ("sampled", SamplingParams(0.8, 50))):
        first = [method(8, sampling) for method in methods.values()]  # and warms up
        assert choice == "sampled" or first[0] == first[1] == first[2], f"{name}: the greedy tokens differ"
        rates: dict[str, list[float]] = {method: [] for method in methods}
        for _ in range(options.repeats):
            for method in methods:
                rates[method].append(decode_rate(methods[method], sampling, options.new, batch))
        for method, values in rates.items():
            ratios = [mine / other for mine, other in zip(rates["myllm"], values, strict=True)]
            print(f"| {name} | {batch} | {choice} | {method} | {spread(values, 0)} | {spread(ratios, 2)} |", flush=True)


def spread(values: list[float], digits: int) -> str:
    """Median, least and greatest."""
    middle, least, most = (f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"


if __name__ == "__main__":
    main()
