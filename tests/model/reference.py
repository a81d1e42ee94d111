"""The Transformer once more in float64 NumPy, token by token and head by head: nothing shared with the model's code.

Covers RMSNorm, also behind the embedding, rotary positions, grouped queries, QK-norm, SwiGLU, squared ReLU, biases,
residual scales and a tied or free head.
"""

import math

import numpy as np

Weights = dict[str, np.ndarray]


def logits(weights: Weights, tokens: list[int], shape: dict) -> np.ndarray:
    """Logits of one sequence, (T, V). `shape` has n_layers, n_heads, kv_heads, head_dim, theta, eps and activation."""
    stream = [weights["embedding.weight"][token] for token in tokens]  # T vectors of (D,)
    if "embedding_norm.weight" in weights:
        stream = [rms_norm(x, weights["embedding_norm.weight"], shape["eps"]) for x in stream]
    scales, eps = weights.get("residual_scales", np.ones(shape["n_layers"])), shape["eps"]
    for layer in range(shape["n_layers"]):
        block = f"blocks.{layer}."
        stream = [x * scales[layer] for x in stream]  # as the config says; the model divides what the block adds
        eps *= scales[layer] ** 2
        normed = [rms_norm(x, weights[f"{block}attention_norm.weight"], eps) for x in stream]
        stream = [x + y for x, y in zip(stream, attention(weights, f"{block}attention.", normed, shape), strict=True)]
        normed = [rms_norm(x, weights[f"{block}feed_forward_norm.weight"], eps) for x in stream]
        stream = [
            x + feed_forward(weights, f"{block}feed_forward.", y, shape) for x, y in zip(stream, normed, strict=True)
        ]
    head = weights.get("head.weight", weights["embedding.weight"])
    return np.stack([head @ rms_norm(x, weights["norm.weight"], eps) for x in stream])


def attention(weights: Weights, name: str, xs: list[np.ndarray], shape: dict) -> list[np.ndarray]:
    heads, kv_heads, size = shape["n_heads"], shape["kv_heads"], shape["head_dim"]
    queries, keys, values = [], [], []  # by token, then by head
    for position, x in enumerate(xs):
        rows = linear(weights, f"{name}qkv_proj", x)
        pieces = [rows[i * size : (i + 1) * size] for i in range(heads + 2 * kv_heads)]
        q, k = pieces[:heads], pieces[heads : heads + kv_heads]
        if f"{name}q_norm.weight" in weights:
            q = [rms_norm(piece, weights[f"{name}q_norm.weight"], shape["eps"]) for piece in q]
            k = [rms_norm(piece, weights[f"{name}k_norm.weight"], shape["eps"]) for piece in k]
        queries.append([rotate(piece, position, shape["theta"]) for piece in q])
        keys.append([rotate(piece, position, shape["theta"]) for piece in k])
        values.append(pieces[heads + kv_heads :])
    out = []
    for t in range(len(xs)):
        mixed = []
        for head in range(heads):
            shared = head // (heads // kv_heads)  # neighbouring query heads share one key and value head
            scores = [queries[t][head] @ keys[s][shared] / math.sqrt(size) for s in range(t + 1)]
            shares = softmax(np.array(scores))
            mixed.append(sum(share * values[s][shared] for s, share in enumerate(shares)))
        out.append(linear(weights, f"{name}out_proj", np.concatenate(mixed)))
    return out


def feed_forward(weights: Weights, name: str, x: np.ndarray, shape: dict) -> np.ndarray:
    h = linear(weights, f"{name}up_proj", x)
    if shape["activation"] == "swiglu":
        gate, up = h[: len(h) // 2], h[len(h) // 2 :]
        h = gate / (1 + np.exp(-gate)) * up
    else:
        h = np.where(h > 0, h, 0) ** 2
    return linear(weights, f"{name}down_proj", h)


def linear(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", 0)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / math.sqrt(sum(x * x) / len(x) + eps) * weight


def rotate(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """Dimensions i and i + K/2 as a complex number, turned by position * theta^(-2i/K)."""
    half = len(x) // 2
    turned = [complex(x[i], x[i + half]) * np.exp(1j * position * theta ** (-2 * i / len(x))) for i in range(half)]
    return np.array([z.real for z in turned] + [z.imag for z in turned])


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()
