"""Which architecture of `transformers` a model is, its config.json, and what each weight is called there.

The same tables serve both ways: `exporting` writes by them, `importing` reads by them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from myllm.config import ModelConfig
from myllm.errors import UserError

ModelType = Literal["llama", "qwen3", "gpt2"]

CLASSES: dict[ModelType, str] = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "gpt2": "GPT2LMHeadModel"}

# Fields of ModelConfig that every one of them can express: sizes, and what only training or our own files need.
ANYWHERE = frozenset(
    {"vocab_size", "vocab_multiple", "max_seq_len", "d_model", "n_layers", "n_heads", "d_ff", "norm_eps"}
    | {"tie_embeddings", "dropout_embedding", "dropout_attention_residual", "dropout_ffn"}
    | {"residual_dtype", "init"}
)
# What the others must be; None: whatever they are. GPT-2 has biases, which are zeros where a model has none.
SWITCHES: dict[ModelType, dict[str, tuple[Any, ...] | None]] = {
    "llama": {
        "position": ("rope",), "rope_theta": None, "norm": ("rmsnorm",), "activation": ("swiglu",), "bias": None,
        "qk_norm": (False,), "n_kv_heads": None, "head_dim": None,
    },
    "qwen3": {
        "position": ("rope",), "rope_theta": None, "norm": ("rmsnorm",), "activation": ("swiglu",), "bias": (False,),
        "qk_norm": (True,), "n_kv_heads": None, "head_dim": None,
    },
    "gpt2": {
        "position": ("learned",), "rope_theta": None, "norm": ("layernorm",), "activation": ("gelu",), "bias": None,
        "qk_norm": (False,), "n_kv_heads": None, "head_dim": None,
    },
}  # fmt: skip


def select_architecture(config: ModelConfig) -> ModelType:
    """The architecture that computes what this model does.

    Raises:
        UserError: there is none; names every switch in the way of the nearest one.
    """
    found = {kind: list(_obstacles(config, kind)) for kind in CLASSES}
    fewest = min(map(len, found.values()))
    nearest = [kind for kind in found if len(found[kind]) == fewest]
    if fewest:
        raise UserError(
            "no architecture of transformers computes what this model does. In the way are\n"
            + "\n".join(f"  - for {CLASSES[kind]}: {'; '.join(found[kind])}" for kind in nearest)
            + "\n--to-onnx takes any model"
        )
    return nearest[0]


def _obstacles(config: ModelConfig, kind: ModelType) -> Iterator[str]:
    for name, allowed in SWITCHES[kind].items():
        value = getattr(config, name)
        if allowed is not None and value not in allowed:
            yield f"model.{name} is {value}, not {' or '.join(map(str, allowed))}"
    if kind == "gpt2" and config.kv_heads != config.n_heads:
        yield f"model.n_kv_heads is {config.kv_heads}, not model.n_heads, {config.n_heads}"
    if kind == "gpt2" and config.head_size * config.n_heads != config.d_model:
        yield f"model.head_dim is {config.head_size}, not model.d_model / model.n_heads"


def transformers_config(config: ModelConfig, end_of_text: int, dtype: str) -> dict[str, Any]:
    """The content of config.json."""
    kind = select_architecture(config)
    shared = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,  # what versions before 5 read
    }
    if kind == "gpt2":
        return shared | {
            "n_positions": config.max_seq_len,
            "n_ctx": config.max_seq_len,
            "n_embd": config.d_model,
            "n_layer": config.n_layers,
            "n_head": config.n_heads,
            "n_inner": config.d_ff,
            "layer_norm_epsilon": config.norm_eps,
            "activation_function": "gelu_new",
            "embd_pdrop": config.dropout_embedding,
            "resid_pdrop": config.dropout_attention_residual,
            "attn_pdrop": 0.0,
        }
    biases = {"attention_bias": config.bias} | ({"mlp_bias": config.bias} if kind == "llama" else {})
    return shared | {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # what versions before 5 read
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **biases,
    }


@dataclass(frozen=True)
class WeightMapping:
    """One of our weights and what it is there: one tensor or several, cut by rows."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    """Of each of theirs. Ours may have more at the end: the vocabulary's padding."""
    transposed: bool = False
    """Stored with inputs as rows, as GPT-2's Conv1D does."""
    optional: bool = False
    """A bias: zeros on the side that has it where the other has none."""


def weight_mappings(kind: ModelType, config: ModelConfig, bias: bool | None = None) -> Iterator[WeightMapping]:
    """Every weight of a model of this architecture.

    Args:
        bias: whether the architecture's linears have biases; None: as ours do.
    """
    if kind == "gpt2":
        yield from _gpt2_pieces(config)
        return
    bias = config.bias if bias is None else bias
    q, kv, size = config.n_heads * config.head_size, config.kv_heads * config.head_size, config.d_model
    yield WeightMapping("embedding.weight", ("model.embed_tokens.weight",), (config.vocab_size,))
    yield WeightMapping("norm.weight", ("model.norm.weight",), (size,))
    if not config.tie_embeddings:
        yield WeightMapping("head.weight", ("lm_head.weight",), (config.vocab_size,))
    for i in range(config.n_layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        yield WeightMapping(f"{ours}attention_norm.weight", (f"{theirs}input_layernorm.weight",), (size,))
        yield WeightMapping(f"{ours}feed_forward_norm.weight", (f"{theirs}post_attention_layernorm.weight",), (size,))
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            norm = f"attention.{name}.weight"
            yield WeightMapping(f"{ours}{norm}", (f"{theirs}self_attn.{name}.weight",), (config.head_size,))
        attention, mlp = f"{theirs}self_attn.", f"{theirs}mlp."
        linears = (
            ("attention.qkv_proj", tuple(f"{attention}{x}_proj" for x in "qkv"), (q, kv, kv)),
            ("attention.out_proj", (f"{attention}o_proj",), (size,)),
            ("feed_forward.up_proj", (f"{mlp}gate_proj", f"{mlp}up_proj"), (config.d_ff, config.d_ff)),
            ("feed_forward.down_proj", (f"{mlp}down_proj",), (size,)),
        )
        for name, names, rows in linears:
            for part in ("weight", "bias") if bias else ("weight",):
                yield WeightMapping(
                    f"{ours}{name}.{part}", tuple(f"{their}.{part}" for their in names), rows, optional=part == "bias"
                )


def _gpt2_pieces(config: ModelConfig) -> Iterator[WeightMapping]:
    size, top = config.d_model, "transformer."
    yield WeightMapping("embedding.weight", (f"{top}wte.weight",), (config.vocab_size,))
    yield WeightMapping("positions.weight", (f"{top}wpe.weight",), (config.max_seq_len,))
    if not config.tie_embeddings:
        yield WeightMapping("head.weight", ("lm_head.weight",), (config.vocab_size,))
    yield from _with_bias("norm", f"{top}ln_f", size, linear=False)
    for i in range(config.n_layers):
        ours, theirs = f"blocks.{i}.", f"{top}h.{i}."
        yield from _with_bias(f"{ours}attention_norm", f"{theirs}ln_1", size, linear=False)
        yield from _with_bias(f"{ours}feed_forward_norm", f"{theirs}ln_2", size, linear=False)
        yield from _with_bias(f"{ours}attention.qkv_proj", f"{theirs}attn.c_attn", 3 * size)
        yield from _with_bias(f"{ours}attention.out_proj", f"{theirs}attn.c_proj", size)
        yield from _with_bias(f"{ours}feed_forward.up_proj", f"{theirs}mlp.c_fc", config.d_ff)
        yield from _with_bias(f"{ours}feed_forward.down_proj", f"{theirs}mlp.c_proj", size)


def _with_bias(ours: str, theirs: str, rows: int, linear: bool = True) -> Iterator[WeightMapping]:
    yield WeightMapping(f"{ours}.weight", (f"{theirs}.weight",), (rows,), transposed=linear)
    yield WeightMapping(f"{ours}.bias", (f"{theirs}.bias",), (rows,), optional=True)
