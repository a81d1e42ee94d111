"""Peak memory of one rank in training, from the config alone: derived from the code, not fitted.

The peak is the largest of six moments of a step (`_moments`). The tests compare with what torch allocates, so a change
to model/ that keeps another tensor must change this file too. Attention counts as a fused kernel, even where
train.attention math materializes T x T scores.

Letters: N tokens of a micro-batch, D d_model, F d_ff, V padded vocabulary, C tokens of a chunk of the loss; `w` bytes
per number in the dtype of matrix products.
"""

from dataclasses import dataclass

from myllm.config import ModelConfig, RunConfig

from .flops import (
    FLOAT,
    block_matrices,
    muon_update_bytes,
    optimizer_state_bytes,
    parameters_by_part,
    stored_parameters,
)

HEADROOM = 0.05
"""Fraction of the memory to leave free, for fragmentation, evaluations and saves."""
LOSS_CHUNK = {"cpu": 128, "cuda": 4_096}
"""Tokens per chunk in model/cross_entropy.py, which is not imported because it needs torch; a test compares."""
RUNTIME_BYTES = {"cpu": 330 * 2**20, "cuda": 80 * 2**20}
"""Memory besides tensors. CPU: the interpreter and torch with its libraries, as resident memory (benchmarks/memory.py).
CUDA: cuBLAS workspaces in torch's allocator (32 MiB per handle on Hopper, one for the forward and one for the backward
pass). The CUDA context is not in here, see forecast.py."""
ALLOCATOR_OVERHEAD = {"cpu": 0.05, "cuda": 0.05}
"""Fraction that allocators hold in addition: rounding up, and blocks that fit nothing. glibc's is between 1 and 10 %
(benchmarks/results); CUDA's is a guess."""


@dataclass(frozen=True)
class ComputeMode:
    """How a run computes, as far as memory depends on it."""

    device: str
    """cpu or cuda."""
    half: bool
    """Matrix products are in bfloat16 or float16."""
    compiled: bool
    ranks: int = 1
    sharded: bool = False
    """FSDP; otherwise DDP if there are several ranks."""
    one_graph: bool = False
    """The whole model is compiled as one graph, instead of each block by itself."""

    @classmethod
    def of(cls, config: RunConfig, device: str, ranks: int = 1, triton: bool = True) -> "ComputeMode":
        """The mode that distributed/ chooses for a config.

        Args:
            device: torch's type of device; anything but cpu counts as cuda.
            triton: torch.compile works on the GPU (`device_info.has_triton`), on which train.compile auto depends.
        """
        train = config.train
        half = train.precision in ("bfloat16", "float16") or (train.precision == "auto" and device == "cuda")
        compiled = train.compile == "on" or (train.compile == "auto" and device == "cuda" and triton)
        sharded = train.parallel == "fsdp" and ranks > 1
        one_graph = compiled and train.compile_unit == "model" and not sharded and not train.activation_checkpointing
        return cls("cpu" if device == "cpu" else "cuda", half, compiled, ranks, sharded, one_graph)

    @property
    def width(self) -> int:
        """Bytes per number in the dtype of matrix products."""
        return 2 if self.half else FLOAT


def memory_by_part(config: RunConfig, mode: ComputeMode) -> dict[str, int]:
    """Bytes of one rank at its peak by part; the parts add up to the peak.

    On a CPU, the resident memory of the process; on a GPU, what torch's allocator reserves.
    """
    model, size = config.model, config.train.micro_batch_size
    assert size != "auto", "a number must be chosen first"
    n = size * model.max_seq_len
    shards = mode.ranks if mode.sharded else 1
    parameters = stored_parameters(model)
    rotary = 2 * model.max_seq_len * model.head_size * FLOAT if model.position == "rope" else 0
    parts = {
        "weights": FLOAT * parameters // shards + rotary,
        "optimizer state": optimizer_state_bytes(config) // shards,
    }
    peak = max(_moments(config, mode, n, parameters // shards), key=lambda moment: sum(moment.values()))
    parts |= {name: part for name, part in peak.items() if part}
    if mode.sharded:
        parts["gathered matrices"] = _gathered_bytes(model, mode)
    parts["batches"] = 4 * n * 16  # int64 tokens and targets, some of them in transfer
    parts["allocator"] = int(ALLOCATOR_OVERHEAD[mode.device] * sum(parts.values()))
    parts["runtime"] = RUNTIME_BYTES[mode.device]
    return parts


def predicted_bytes(config: RunConfig, mode: ComputeMode) -> int:
    """The peak: the sum of `memory_by_part`."""
    return sum(memory_by_part(config, mode).values())


def _moments(config: RunConfig, mode: ComputeMode, n: int, stored: int) -> list[dict[str, int]]:
    """What exists besides weights and optimizer state at each moment that can be the peak, in the order of a step.

    Gradients come into being from the head down to the embedding; a block's activations go with its backward pass:

        moment               gradients                                    activations     temporary
        loss                 of earlier micro-steps                       of all layers   logits of a chunk
        its backward pass    the same                                     of all layers   its two gradients
        last block's         the same, and the head's if it is tied       of all blocks   a block's work
        first block's        all but the embedding's, and the head's ...  of one block    a block's work
        embedding's          the same                                     none            the embedding's gradient
        update               all                                          none            Muon's

    `n` is the tokens of a micro-batch, `stored` the parameters of this rank.
    """
    model, recomputes = config.model, config.train.activation_checkpointing
    stream = _stream_width(model, mode) * n * model.d_model  # the residual stream, or its gradient
    table = FLOAT * model.padded_vocab_size * model.d_model  # the gradient of the embedding, or of the head
    tied = table if model.tie_embeddings else 0  # the head's part of it, which waits for the embedding's

    earlier, all_but_table = _gradients(config, mode, n, stored)
    block = block_saved_bytes(model, mode, n)
    kept_block = stream if recomputes else block  # with checkpointing, only a block's input outlives its forward pass
    kept_blocks = model.n_layers * kept_block
    kept = kept_blocks + outer_saved_bytes(model, mode, n)
    half_weights = _half_weights(model) if mode.half and recomputes else 0  # autocast's cache, until the loss exists
    loss = loss_bytes(model, mode, n) + half_weights
    block_work = stream + (block - kept_block) + _block_work_bytes(model, mode, n)
    update = muon_update_bytes(config, mode.ranks, 2 if mode.half else FLOAT)
    return [
        {"gradients": earlier, "activations": kept, "loss": loss},
        {"gradients": earlier, "activations": kept, "loss": loss_backward_bytes(model, mode, n)},
        {"gradients": earlier + tied, "activations": kept_blocks, "backward pass": block_work},
        {"gradients": all_but_table + tied, "activations": kept_block, "backward pass": block_work},
        {"gradients": all_but_table + tied, "activations": 0, "backward pass": stream + table},
        {"gradients": FLOAT * stored, "activations": 0, "update": update},
    ]


def _gradients(config: RunConfig, mode: ComputeMode, n: int, stored: int) -> tuple[int, int]:
    """Bytes of gradients during the loss, and when only the embedding's is missing. See `_moments` for arguments."""
    model = config.model
    accumulates = config.train.batch_tokens > n * mode.ranks  # those of an earlier micro-step exist all along
    ddp = mode.ranks > 1 and not mode.sharded  # its buckets exist all along, and gradients are views of them
    earlier = FLOAT * stored if accumulates or ddp else 0
    new = FLOAT * stored - FLOAT * model.padded_vocab_size * model.d_model
    if mode.one_graph and mode.ranks == 1:  # the graph returns all new gradients at its end, beside the earlier ones
        return earlier, earlier + new
    all_but_table = max(earlier, new)  # a new gradient is added to an earlier one at once
    if mode.compiled and earlier:  # a graph returns the gradients of its block beside the earlier ones
        all_but_table += _matrices_of_a_block(model) * FLOAT // (mode.ranks if mode.sharded else 1)
    return earlier, all_but_table


# -- saved by autograd -------------------------------------------------------------------------------------------------


def block_saved_bytes(model: ModelConfig, mode: ComputeMode, n: int) -> int:
    """Bytes that autograd saves in one block, its input included, parameters excluded."""
    d, w, cpu = n * model.d_model, mode.width, mode.device == "cpu"
    kept = 2 * (_norm_input_width(model, mode) * d + _kept_by_norm(model, mode, n))  # inputs of the norms
    kept += _kept_by_attention(model, mode, n) + _kept_by_feed_forward(model, mode, n)
    kept += 2 * w * d  # outputs of the norms
    if model.dropout_attention_residual:
        kept += d * (w if cpu and not mode.compiled else 1)  # the noise; on CUDA a mask
    if model.residual_scales:
        kept += 2 * w * d  # what attention and feed-forward add, before the division
    return kept + (_half_weights(model) // model.n_layers if mode.half else 0)


def outer_saved_bytes(model: ModelConfig, mode: ComputeMode, n: int) -> int:
    """Bytes that autograd saves before the first block and after the last one, without those of the loss."""
    d = n * model.d_model
    as_input = mode.device == "cpu" and not mode.compiled
    noise = d * (_stream_width(model, mode) if as_input else 1) if model.dropout_embedding else 0
    norms = _norm_input_width(model, mode) * d + _kept_by_norm(model, mode, n)
    if model.embedding_norm:
        norms += FLOAT * d + _kept_by_norm(model, mode, n)
    products = FLOAT * (model.n_layers - 1) if model.residual_scales else 0
    return noise + norms + products


def _stream_width(model: ModelConfig, mode: ComputeMode) -> int:
    """Bytes per number of the residual stream."""
    return 2 if model.residual_dtype == "bfloat16" and mode.half else FLOAT


def _norm_input_width(model: ModelConfig, mode: ComputeMode) -> int:
    """Bytes per number that a norm saves: the stream's own if a compiler or LayerNorm's CPU kernel reads it directly,
    otherwise a float32 copy, made by our RMSNorm, or by autocast for LayerNorm on CUDA."""
    mixed = mode.compiled or (model.norm == "layernorm" and mode.device == "cpu")
    return _stream_width(model, mode) if mixed else FLOAT


def _norm_output_width(model: ModelConfig, mode: ComputeMode) -> int:
    """Bytes per number of a norm's output: the stream's, except that autocast runs LayerNorm in float32 on CUDA."""
    widened = model.norm == "layernorm" and mode.device != "cpu"
    return FLOAT if widened else _stream_width(model, mode)


def _half_weights(model: ModelConfig) -> int:
    """Half-precision copies of the blocks' matrices, which autocast makes once per micro-step."""
    return 2 * block_matrices(model)


def _kept_by_norm(model: ModelConfig, mode: ComputeMode, n: int) -> int:
    """Besides its input: one or two float32 statistics per token; without a kernel (model/norm.py), the product too."""
    if model.norm == "layernorm":
        return 2 * FLOAT * n
    if mode.device == "cpu" and not mode.compiled:
        return 2 * FLOAT * n + FLOAT * n * model.d_model
    return FLOAT * n


def _kept_by_attention(model: ModelConfig, mode: ComputeMode, n: int) -> int:
    w, size = mode.width, n * model.head_size
    queries, both = model.n_heads * size, (model.n_heads + model.kv_heads) * size
    kept = w * (both + model.kv_heads * size)  # output of the projections: values are a part of it
    if model.position == "rope" or model.qk_norm:
        kept += w * both  # rotated or normalized queries and keys
    if model.qk_norm:
        kept += (1 if mode.compiled or mode.device != "cpu" else 2) * FLOAT * both // model.head_size
        if not mode.compiled:
            copies = int(mode.half) + int(mode.device == "cpu")  # in float32, and normalized before the weight
            kept += copies * FLOAT * both
    return kept + w * queries + FLOAT * n * model.n_heads  # the output, and the log-sum-exp of each row


def _kept_by_feed_forward(model: ModelConfig, mode: ComputeMode, n: int) -> int:
    w, f = mode.width, n * model.d_ff
    up = 2 * f if model.activation == "swiglu" else f
    kept = w * (up + f)  # output of the first projection, input of the second
    if model.activation == "swiglu" and not mode.compiled:
        kept += w * f  # silu of the gate, which a compiler recomputes
    if model.activation == "relu2" and mode.half and mode.device == "cuda" and not mode.compiled:
        kept += (FLOAT - w) * f  # autocast squares in float32 there
    if model.dropout_ffn:
        kept += f * (w if mode.device == "cpu" and not mode.compiled else 1)
    return kept


# -- temporary ---------------------------------------------------------------------------------------------------------


def _block_work_bytes(model: ModelConfig, mode: ComputeMode, n: int) -> int:
    """In addition, at the widest point of a block's backward pass: inside the feed-forward part."""
    f, w = n * model.d_ff, mode.width
    copies = {"swiglu": 2, "gelu": 1, "relu2": 2}[model.activation]
    stream = 2 * n * model.d_model if mode.half else 0
    return copies * f * w + stream


def loss_bytes(model: ModelConfig, mode: ComputeMode, n: int) -> int:
    """Forward pass of model/cross_entropy.py: its input, one chunk's logits, and both gradients, computed there.

    Args:
        n: tokens of a micro-batch.
    """
    d, v = model.d_model, model.padded_vocab_size
    chunk, w = min(LOSS_CHUNK[mode.device], n), mode.width
    hidden = _norm_output_width(model, mode) * n * d  # output of the last norm, held by the caller
    gradients = w * n * d + FLOAT * v * d
    if mode.compiled:  # logits and their gradient in half precision; the sum over chunks is a new matrix
        casts = 2 * (n * d + v * d) if mode.half else hidden
        waiting = w * v * d * -(-n // chunk)  # the head's gradient of each chunk, until one kernel adds them up
        return casts + waiting + 2 * w * chunk * v + 2 * gradients
    if not mode.half:
        return hidden + gradients + FLOAT * (chunk * v + chunk * d)
    # Logits in half precision and in float32, their gradient, and its product; or the next chunk's logits beside the
    # float32 logits and gradient of the previous chunk, which are freed when they are replaced.
    logits = max((2 + FLOAT + 2) * chunk * v + 2 * v * d, (2 + 2 * FLOAT + 2) * chunk * v if n > chunk else 0)
    cast = 2 * n * d if hidden > 2 * n * d else 0
    return hidden + cast + 2 * v * d + gradients + logits


def loss_backward_bytes(model: ModelConfig, mode: ComputeMode, n: int) -> int:
    """Both gradients, and their products with the gradient of the loss."""
    d, v = n * model.d_model, model.padded_vocab_size * model.d_model
    cast = FLOAT * d if mode.half and _norm_output_width(model, mode) == FLOAT else 0
    return 2 * FLOAT * v + 2 * mode.width * d + cast


def _gathered_bytes(model: ModelConfig, mode: ComputeMode) -> int:
    """FSDP: matrices of two blocks (one in use, one prefetched), gradient of one, and the embedding and head."""
    block = _matrices_of_a_block(model)
    outside = stored_parameters(model) - block * model.n_layers
    return 2 * mode.width * block + (mode.width + FLOAT) * block + FLOAT * outside


def _matrices_of_a_block(model: ModelConfig) -> int:
    parts = parameters_by_part(model)
    return (parts["attention"] + parts["feed-forward"]) // model.n_layers
