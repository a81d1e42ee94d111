"""Names and layouts of weights in other formats: one table, used by exports and imports."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from myllm.config import ModelConfig
from myllm.errors import UserError, bullets
from myllm.model.transformer import Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Our modules and theirs. Several of theirs are concatenated by rows. {} is the number of the layer.
Modules = dict[str, str | tuple[str, ...]]
LLAMA: Modules = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "blocks.{}.attention_norm": "model.layers.{}.input_layernorm",
    "blocks.{}.attention.qkv_proj": (
        "model.layers.{}.self_attn.q_proj",
        "model.layers.{}.self_attn.k_proj",
        "model.layers.{}.self_attn.v_proj",
    ),
    "blocks.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
    "blocks.{}.attention.out_proj": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.feed_forward_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.feed_forward.up_proj": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "blocks.{}.feed_forward.down_proj": "model.layers.{}.mlp.down_proj",
}
GPT2: Modules = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "blocks.{}.attention_norm": "transformer.h.{}.ln_1",
    "blocks.{}.attention.qkv_proj": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attention.out_proj": "transformer.h.{}.attn.c_proj",
    "blocks.{}.feed_forward_norm": "transformer.h.{}.ln_2",
    "blocks.{}.feed_forward.up_proj": "transformer.h.{}.mlp.c_fc",
    "blocks.{}.feed_forward.down_proj": "transformer.h.{}.mlp.c_proj",
}
LF_LLM: Modules = {  # its up_proj has the rows of up first, then those of the gate
    "embedding": "embd",
    "norm": "norm",
    "head": "out_proj",
    "blocks.{}.attention_norm": "transformer_blocks.{}.norm1",
    "blocks.{}.attention.qkv_proj": "transformer_blocks.{}.attn.qkv_proj",
    "blocks.{}.attention.out_proj": "transformer_blocks.{}.attn.out_proj",
    "blocks.{}.feed_forward_norm": "transformer_blocks.{}.norm2",
    "blocks.{}.feed_forward.up_proj": "transformer_blocks.{}.ffn.net.0",
    "blocks.{}.feed_forward.down_proj": "transformer_blocks.{}.ffn.net.3",
}
Format = Literal["llama", "qwen3", "gpt2", "lf-llm"]
MODULES: dict[Format, Modules] = {"llama": LLAMA, "qwen3": LLAMA, "gpt2": GPT2, "lf-llm": LF_LLM}


@dataclass(frozen=True)
class WeightMapping:
    """One of our weights and the tensors that it is in another format."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    """Rows of each of their tensors. Ours may have more at the end: the padding of the vocabulary."""
    transposed: bool
    """If true, theirs have inputs as rows, as in GPT-2's Conv1D."""
    copies: bool = False
    """If true, each of theirs is all of ours. A Llama with ReLU whose gate equals its up projection is relu2."""

    @property
    def optional(self) -> bool:
        """A missing bias is equal to zeros."""
        return self.ours.endswith(".bias")


def weight_mappings(format: Format, config: ModelConfig) -> Iterator[WeightMapping]:
    """Every weight of a model in this format."""
    if format == "gpt2":  # always has biases
        config = replace(config, bias=True)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    for ours, shape in shapes.items():
        module, _, part = ours.rpartition(".")
        first, *rest = module.split(".")
        layer = rest.pop(0) if first == "blocks" else ""
        theirs = MODULES[format][".".join([first, "{}", *rest] if layer else [first])]
        modules = [name.format(layer) for name in ((theirs,) if isinstance(theirs, str) else theirs)]
        if len(modules) == 3:
            rows = tuple(heads * config.head_size for heads in (config.n_heads, config.kv_heads, config.kv_heads))
        elif len(modules) == 2:
            rows = (config.d_ff, config.d_ff)
        else:
            rows = (config.vocab_size if module in ("embedding", "head") else shape[0],)
        is_conv1d = format == "gpt2" and len(shape) == 2 and bool(layer)
        copies = len(modules) == 2 and config.activation == "relu2"
        yield WeightMapping(ours, tuple(f"{name}.{part}" for name in modules), rows, is_conv1d, copies)


def export_weights(format: Format, config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names and in the layout of another format, without the padding of the vocabulary."""
    exported: dict[str, Tensor] = {}
    mappings = list(weight_mappings(format, config))
    for mapping in mappings:
        weight = weights.get(mapping.ours)
        if weight is None:
            assert mapping.optional, mapping.ours
            weight = torch.zeros(sum(mapping.rows), dtype=weights["embedding.weight"].dtype)
        if mapping.copies:
            weight = torch.cat([weight] * len(mapping.theirs))
        for name, part in zip(mapping.theirs, weight[: sum(mapping.rows)].split(mapping.rows), strict=True):
            part = part.t() if mapping.transposed else part
            exported[name] = part.clone(memory_format=torch.contiguous_format)  # does not keep the whole in memory
    unknown = weights.keys() - {mapping.ours for mapping in mappings}
    assert not unknown, f"weights without a counterpart: {sorted(unknown)}"
    return exported


def import_weights(
    format: Format, config: ModelConfig, tensors: dict[str, Tensor], source: object
) -> dict[str, Tensor]:
    """The reverse of `export_weights`. Rows beyond the vocabulary are dropped; biases that are missing are zeros.

    Args:
        source: where the tensors are from, for messages.

    Raises:
        UserError: missing or unknown tensors.
    """
    tensors, weights, errors = dict(tensors), {}, []
    for mapping in weight_mappings(format, config):
        if mapping.optional:
            for name, rows in zip(mapping.theirs, mapping.rows, strict=True):
                tensors.setdefault(name, torch.zeros(rows))
        if missing := [name for name in mapping.theirs if name not in tensors]:
            errors += [f"{name} is missing" for name in missing]
            continue
        parts = [tensors.pop(name) for name in mapping.theirs]
        if mapping.ours in ("embedding.weight", "head.weight"):
            parts = [part[: config.vocab_size] for part in parts]
        if mapping.copies:
            first, *others = parts
            if any(not torch.equal(first, part) for part in others):
                errors.append(
                    f"{' and '.join(mapping.theirs)} differ, and MyLLM has no gated ReLU: expected equal ones"
                )
            parts = [first]
        try:
            weights[mapping.ours] = torch.cat([part.t() if mapping.transposed else part for part in parts])
        except RuntimeError:
            shapes = [tuple(part.shape) for part in parts]
            errors.append(f"{', '.join(mapping.theirs)} have shapes {shapes}, which cannot be concatenated")
    errors += [f"{name} is unknown" for name in sorted(tensors)]
    if errors:
        raise UserError(f"the weights in {source} do not match its config:\n{bullets(errors[:8])}")
    return weights


def cast_weights(weights: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    return {name: weight.to(DTYPES[dtype]) for name, weight in weights.items()}
