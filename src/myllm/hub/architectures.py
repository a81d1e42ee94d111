"""The architectures of `transformers` that models of ours can be: selection, and config.json in both directions."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from myllm.config import ModelConfig
from myllm.errors import UserError, bullets

ModelType = Literal["llama", "qwen3", "gpt2"]
Activation = Literal["swiglu", "gelu", "relu2"]

CLASSES: dict[ModelType, str] = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "gpt2": "GPT2LMHeadModel"}

# Fields of ModelConfig that every architecture supports (sizes), or that it does not need (training, our files).
UNRESTRICTED_FIELDS = frozenset(
    {"vocab_size", "vocab_multiple", "max_seq_len", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff"}
    | {"rope_theta", "rope_scaling", "norm_eps", "tie_embeddings", "residual_dtype", "init"}
    | {"embedding_norm", "residual_scales"}  # folded into other weights (export/fold.py)
    | {"dropout_embedding", "dropout_attention_residual", "dropout_ffn"}
)
# The activations of an architecture, as config.json and as ModelConfig name them. Exports use the first name of one.
LLAMA_ACTIVATIONS: dict[str, Activation] = {"silu": "swiglu", "relu": "relu2"}
GPT2_ACTIVATIONS: dict[str, Activation] = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu2": "relu2"}
# Values that an architecture supports in the other fields. GPT-2 has biases, which are zeros for a model without.
ALLOWED_VALUES: dict[ModelType, dict[str, tuple[Any, ...]]] = {
    "llama": {
        "position": ("rope",), "norm": ("rmsnorm",), "activation": ("swiglu", "relu2"), "bias": (True, False),
        "qk_norm": (False,),
    },
    "qwen3": {
        "position": ("rope",), "norm": ("rmsnorm",), "activation": ("swiglu", "relu2"), "bias": (False,),
        "qk_norm": (True,),
    },
    "gpt2": {
        "position": ("learned",), "norm": ("layernorm",), "activation": ("gelu", "relu2"), "bias": (True, False),
        "qk_norm": (False,),
    },
}  # fmt: skip

# Fields of ModelConfig and their keys in config.json.
LLAMA_KEYS = {
    "vocab_size": "vocab_size", "max_seq_len": "max_position_embeddings", "d_model": "hidden_size",
    "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip
GPT2_KEYS = {
    "vocab_size": "vocab_size", "max_seq_len": "n_positions", "d_model": "n_embd", "n_layers": "n_layer",
    "n_heads": "n_head", "d_ff": "n_inner", "norm_eps": "layer_norm_epsilon", "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""The numbers of ModelConfig.rope_scaling, in its order."""
CONFIG_KEYS: dict[ModelType, dict[str, str]] = {"llama": LLAMA_KEYS, "qwen3": LLAMA_KEYS, "gpt2": GPT2_KEYS}

# Upper limits of integers in config.json, far above any model: larger ones would be allocated before they are checked.
MAX_SIZE = 2**24
INTEGER_LIMITS = {
    "vocab_size": MAX_SIZE, "hidden_size": MAX_SIZE, "n_embd": MAX_SIZE, "num_attention_heads": MAX_SIZE,
    "n_head": MAX_SIZE, "head_dim": MAX_SIZE, "num_key_value_heads": MAX_SIZE, "intermediate_size": MAX_SIZE,
    "n_inner": MAX_SIZE, "max_position_embeddings": 2**21, "n_positions": 2**21, "num_hidden_layers": 10_000,
    "n_layer": 10_000,
}  # fmt: skip
TYPES: tuple[tuple[type, tuple[str, ...], str], ...] = (
    (dict, ("rope_parameters", "rope_scaling"), "an object"),
    (list, ("layer_types",), "a list"),
    (str, ("hidden_act", "activation_function"), "a string"),
    (bool, ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), "true or false"),
    (bool, ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"), "true or false"),
)


def select_architecture(config: ModelConfig) -> ModelType:
    """The architecture that computes the same as this model.

    Raises:
        UserError: there is none; names the unsupported settings of the closest ones.
    """
    unsupported = {model_type: list(_unsupported(config, model_type)) for model_type in CLASSES}
    fewest = min(map(len, unsupported.values()))
    closest = [model_type for model_type, settings in unsupported.items() if len(settings) == fewest]
    if fewest:
        raise UserError(
            "no architecture of transformers supports this model:\n"
            + bullets(f"{CLASSES[model_type]}: {'; '.join(unsupported[model_type])}" for model_type in closest)
            + "\n--to-onnx exports any model"
        )
    return closest[0]


def _unsupported(config: ModelConfig, model_type: ModelType) -> Iterator[str]:
    for name, allowed in ALLOWED_VALUES[model_type].items():
        value = getattr(config, name)
        if value not in allowed:
            yield f"model.{name} is {value}, expected {' or '.join(map(str, allowed))}"
    if config.embedding_norm and config.tie_embeddings:  # the head must not be normalized with the embedding
        yield "model.embedding_norm is True, expected False with model.tie_embeddings"
    if model_type == "llama" and config.d_model % config.n_heads:  # also with a head_dim: LlamaConfig refuses it
        yield f"model.d_model is {config.d_model}, expected a multiple of model.n_heads ({config.n_heads})"
    if model_type == "gpt2" and config.kv_heads != config.n_heads:
        yield f"model.n_kv_heads is {config.kv_heads}, expected model.n_heads ({config.n_heads})"
    if model_type == "gpt2" and config.head_size * config.n_heads != config.d_model:
        yield f"model.head_dim is {config.head_size}, expected model.d_model / model.n_heads"


def transformers_config(config: ModelConfig, end_of_text: int, dtype: str) -> dict[str, Any]:
    """The content of config.json."""
    model_type = select_architecture(config)
    values = {key: getattr(config, name) for name, key in CONFIG_KEYS[model_type].items()} | {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,  # for versions before 5
    }
    if model_type == "gpt2":
        return values | {
            "n_ctx": config.max_seq_len,
            "activation_function": _their_activation(GPT2_ACTIVATIONS, config),
            "embd_pdrop": config.dropout_embedding,
            "resid_pdrop": config.dropout_attention_residual,
            "attn_pdrop": 0.0,
        }
    biases = {"attention_bias": config.bias} | ({"mlp_bias": config.bias} if model_type == "llama" else {})
    scaling: dict[str, Any] = {}
    if config.rope_scaling:
        *factors, context = config.rope_scaling
        scaling = {"rope_type": "llama3"} | dict(zip(LLAMA3_KEYS, (*factors, int(context)), strict=True))
    return values | {
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta} | scaling,
        "rope_theta": config.rope_theta,  # for versions before 5, as is rope_scaling
        "hidden_act": _their_activation(LLAMA_ACTIVATIONS, config),
        "attention_dropout": 0.0,
        **biases,
        **({"rope_scaling": scaling} if scaling else {}),
    }


def _their_activation(activations: dict[str, Activation], config: ModelConfig) -> str:
    return next(theirs for theirs, ours in activations.items() if ours == config.activation)


def parse_transformers_config(values: Mapping[str, Any], source: str) -> ModelConfig:
    """The model of a config.json.

    Args:
        source: the file's path, for messages.

    Raises:
        UserError: settings of the wrong type, or that MyLLM does not support; names all of them.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CLASSES:
        raise UserError(f"{source} has model_type {model_type!r}, expected one of {', '.join(CLASSES)}")
    values = {key: value for key, value in values.items() if value is not None}  # null means the default
    if errors := sorted(_type_errors(values)):
        raise UserError(f"{source} cannot be used:\n{bullets(errors)}")
    values |= {key: int(values[key]) for key in values.keys() & INTEGER_LIMITS.keys()}
    unsupported = list(_unsupported_gpt2(values) if model_type == "gpt2" else _unsupported_llama(values))
    if unsupported:
        raise UserError(f"MyLLM does not support these settings of {source}:\n{bullets(unsupported)}")
    try:
        return _parse_gpt2(values) if model_type == "gpt2" else _parse_llama(values)
    except KeyError as error:
        raise UserError(f"{source} has no {error}") from None


def _type_errors(values: dict[str, Any]) -> Iterator[str]:
    for key in values.keys() & INTEGER_LIMITS.keys():
        value, limit = values[key], INTEGER_LIMITS[key]
        if not _is_number(value) or not 1 <= value <= limit or value % 1:
            yield f"{key} is {value!r:.40}, expected an integer from 1 to {limit:,}"
    for expected_type, keys, expected in TYPES:
        for key in values.keys() & keys:
            if not isinstance(values[key], expected_type):
                yield f"{key} is {values[key]!r:.40}, expected {expected}"
    numbers = {key: values.get(key) for key in ("rms_norm_eps", "layer_norm_epsilon", "rope_theta")}
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name)
        if isinstance(rope, dict):
            numbers |= {f"{name}.{key}": rope.get(key) for key in ("rope_theta", *LLAMA3_KEYS)}
            if layer_types := [key for key, value in rope.items() if isinstance(value, dict)]:
                yield f"{name} is separate for {', '.join(layer_types)}, expected the same for all layers"
    for key, value in numbers.items():
        if value is not None and not (_is_number(value) and 0 < value < 1e30):
            yield f"{key} is {value!r:.40}, expected a number above 0"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unsupported_llama(values: dict[str, Any]) -> Iterator[str]:
    if (activation := values.get("hidden_act", "silu")) not in LLAMA_ACTIVATIONS:
        yield f"hidden_act is {activation}, expected {' or '.join(LLAMA_ACTIVATIONS)}"
    rope = _rope(values)
    if (rope_type := _rope_type(rope)) not in ("default", "llama3"):
        yield f"rope_type is {rope_type}, expected default or llama3"
    if (factor := rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) or 1) != 1:
        yield f"partial_rotary_factor is {factor}, expected 1"
    if values.get("use_sliding_window") or "sliding_attention" in (values.get("layer_types") or ()):
        yield "use_sliding_window is true, expected attention to the whole context"


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}  # in transformers' order
    return {key: value for key, value in rope.items() if value is not None}


def _rope_type(rope: dict[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _parse_llama(values: dict[str, Any]) -> ModelConfig:
    is_qwen, rope = values["model_type"] == "qwen3", _rope(values)
    values = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False} | values
    shared = {name: values[key] for name, key in LLAMA_KEYS.items()}
    n_heads = shared["n_heads"]
    return ModelConfig(
        **shared | {"norm_eps": float(shared["norm_eps"])},
        n_kv_heads=values.get("num_key_value_heads") or (32 if is_qwen else n_heads),
        head_dim=values.get("head_dim") or (128 if is_qwen else shared["d_model"] // n_heads),
        rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10_000),
        rope_scaling=tuple(float(rope[key]) for key in LLAMA3_KEYS) if _rope_type(rope) == "llama3" else (),
        activation=LLAMA_ACTIVATIONS[values.get("hidden_act", "silu")],
        bias=bool(values.get("attention_bias") or values.get("mlp_bias")),
        qk_norm=is_qwen,
    )


def _unsupported_gpt2(values: dict[str, Any]) -> Iterator[str]:
    if (activation := values.get("activation_function", "gelu_new")) not in GPT2_ACTIVATIONS:
        yield f"activation_function is {activation}, expected {' or '.join(GPT2_ACTIVATIONS)}"
    if not values.get("scale_attn_weights", True):
        yield "scale_attn_weights is false, expected true"
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if values.get(name):
            yield f"{name} is true, expected false"


def _parse_gpt2(values: dict[str, Any]) -> ModelConfig:
    defaults = {"n_inner": 4 * values["n_embd"], "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
    shared = {name: (defaults | values)[key] for name, key in GPT2_KEYS.items()}
    shared["norm_eps"] = float(shared["norm_eps"])
    activation = GPT2_ACTIVATIONS[values.get("activation_function", "gelu_new")]
    return ModelConfig(**shared, position="learned", norm="layernorm", activation=activation, bias=True)
