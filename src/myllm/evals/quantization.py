"""What int8 weights cost in quality, and what they save: the same text, the same questions, both ways."""

import copy
from collections.abc import Callable

from torch import Tensor

from myllm.inference.int8 import quantize_int8, weight_bytes
from myllm.model.transformer import Transformer

from . import perplexity, speed


def compare(model: Transformer, assess_sums: Callable[[Transformer], Tensor]) -> dict[str, float]:
    """A float model against its int8 form, which is made of a copy.

    Args:
        assess_sums: what `perplexity.assess_sums` gives of a model and the text at hand.

    Raises:
        UserError: torchao is not installed.
    """
    quantized = copy.deepcopy(model)
    quantize_int8(quantized)
    found: dict[str, dict[str, float]] = {}
    for name, each in (("float", model), ("int8", quantized)):
        text = perplexity.finish(assess_sums(each))
        found[name] = {
            "perplexity": text["perplexity"],
            "token_accuracy": text["token_accuracy"],
            "weights_mb": weight_bytes(each) / speed.MB,
            "decode_tokens_per_s": speed.measure(each, batches=(1,))["decode_tokens_per_s_1"],
        }
    cost = found["int8"]["perplexity"] - found["float"]["perplexity"]
    return {
        **{f"{figure}_{name}": found[name][figure] for figure in found["float"] for name in found},
        "perplexity_cost": cost,
        "perplexity_cost_percent": 100 * cost / found["float"]["perplexity"],
        "n_tokens": text["n_tokens"],
    }
