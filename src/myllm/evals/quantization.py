"""What int8 weights cost in quality and save in memory: float and int8 on the same text."""

import copy
from collections.abc import Callable

from torch import Tensor

from myllm.inference.int8 import quantize_int8, weight_bytes
from myllm.model.transformer import Transformer

from . import perplexity, speed


def compare(model: Transformer, perplexity_sums: Callable[[Transformer], Tensor]) -> dict[str, float]:
    """Metrics of a float model and of an int8 copy of it.

    Args:
        perplexity_sums: returns `perplexity.perplexity_sums` of a model on the text.

    Raises:
        UserError: torchao is not installed.
    """
    quantized = copy.deepcopy(model)
    quantize_int8(quantized)
    measured: dict[str, dict[str, float]] = {}
    n_tokens: float = 0
    for name, variant in (("float", model), ("int8", quantized)):
        text = perplexity.finish(perplexity_sums(variant))
        n_tokens = text["n_tokens"]
        measured[name] = {
            "perplexity": text["perplexity"],
            "token_accuracy": text["token_accuracy"],
            "weights_mb": weight_bytes(variant) / speed.MB,
            "decode_tokens_per_s": speed.measure(variant, batches=(1,))["decode_tokens_per_s_1"],
        }
    cost = measured["int8"]["perplexity"] - measured["float"]["perplexity"]
    return {
        **{f"{metric}_{name}": measured[name][metric] for metric in measured["float"] for name in measured},
        "perplexity_cost": cost,
        "perplexity_cost_percent": 100 * cost / measured["float"]["perplexity"],
        "n_tokens": n_tokens,
    }
