"""What one rank holds in memory while it trains, at most, from the config alone: derived, not fitted.

Bytes are counted along one micro-step, and the largest moment is the peak: in the loss, in its backward pass, in the
backward pass of the last block (when every other block's activations are still kept) or of the first (when every
gradient is there), and at the embedding's gradient, which comes last. The tests compare with what torch allocates.
Attention is counted as a fused kernel, also where train.attention math asks for all T x T scores.

Letters: N tokens of a micro-batch, D d_model, F d_ff, V padded vocabulary, C tokens of a chunk of the loss; `w` bytes
of a number in the type that matrix products are in.
"""

from dataclasses import dataclass

from myllm.config import ModelConfig, RunConfig

from .flops import parameters_by_part, stored_parameters

FLOAT = 4
HEADROOM = 0.05
"""Share of what there is that a run should leave free: memory fragments, and evaluations and saves come on top."""
LOSS_CHUNK = {"cpu": 128, "cuda": 4_096}
"""model/loss.py's chunks, in tokens, which is not imported since it needs torch; a test compares."""
RUNTIME_BYTES = {"cpu": 330 * 2**20, "cuda": 80 * 2**20}
"""What is there besides tensors. CPU: the interpreter and torch with its libraries, as resident memory
(benchmarks/memory.py). CUDA: workspaces of cuBLAS, as torch's allocator sees them (32 MiB a handle on Hopper, forward
and backward have one each; CUDA's own context is not among them, see forecast.py)."""
ALLOCATOR_OVERHEAD = {"cpu": 0.05, "cuda": 0.05}
"""What allocators hold beyond what is asked of them: rounding up, and blocks that fit nothing. glibc's is between 1 and
10 % (benchmarks/results); CUDA's is a guess."""


@dataclass(frozen=True)
class ComputeMode:
    """How a run computes, as far as memory depends on it."""

    device: str
    """cpu or cuda."""
    half: bool
    """Whether matrix products are in bfloat16 or float16."""
    compiled: bool
    ranks: int = 1
    sharded: bool = False
    """FSDP; else DDP where there are several ranks."""
    one_graph: bool = False
    """Whether what is compiled is the model as a whole, and not each block by itself."""

    @classmethod
    def of(cls, config: RunConfig, device: str, ranks: int = 1, triton: bool = True) -> "ComputeMode":
        """As precision.py, parallel.py and the config have it.

        Args:
            device: torch's name of the kind; any other than cpu is taken for cuda, as far as kernels are concerned.
            triton: whether torch.compile works on the card (hardware.has_triton), on which train.compile auto depends.
        """
        train = config.train
        half = train.precision in ("bfloat16", "float16") or (train.precision == "auto" and device == "cuda")
        compiled = train.compile == "on" or (train.compile == "auto" and device == "cuda" and triton)
        kind = "cpu" if device == "cpu" else "cuda"
        sharded = train.parallel == "fsdp" and ranks > 1
        whole = compiled and train.compile_unit == "model" and not sharded and not train.activation_checkpointing
        return cls(kind, half, compiled, ranks, sharded, whole)

    @property
    def width(self) -> int:
        return 2 if self.half else FLOAT


def memory_by_part(config: RunConfig, how: ComputeMode) -> dict[str, int]:
    """Bytes of one rank at its peak, by what takes them; they add up to the peak.

    For a CPU that is the process's resident memory; for a card what torch's allocator reserves.
    """
    model, n = config.model, config.train.micro_batch_size * config.model.max_seq_len
    share = how.ranks if how.sharded else 1
    parameters = stored_parameters(model)
    rotary = 2 * model.max_seq_len * model.head_size * FLOAT if model.position == "rope" else 0
    parts = {"weights": FLOAT * parameters // share + rotary, "AdamW's moments": 2 * FLOAT * parameters // share}
    accumulates = config.train.batch_tokens > n * how.ranks
    moments = [
        {name: size for name, size in moment.items() if size}
        for moment in _moments(config, how, n, accumulates, parameters // share)
    ]
    parts |= max(moments, key=lambda moment: sum(moment.values()))
    if how.sharded:
        parts["whole matrices for a moment"] = _gathered_bytes(model, how)
    parts["batches"] = 4 * n * 16  # int64 tokens and targets, some of them on their way
    parts["allocator"] = int(ALLOCATOR_OVERHEAD[how.device] * sum(parts.values()))
    parts["runtime"] = RUNTIME_BYTES[how.device]
    return parts


def predicted_bytes(config: RunConfig, how: ComputeMode) -> int:
    """The peak: the sum of `memory_by_part`."""
    return sum(memory_by_part(config, how).values())


def _moments(config: RunConfig, how: ComputeMode, n: int, accumulates: bool, stored: int) -> list[dict[str, int]]:
    """Gradients, activations and temporaries at each moment that can be the peak.

    Args:
        n: tokens of a micro-batch.
        accumulates: whether gradients of an earlier micro-step are there all along.
        stored: parameters of this rank.
    """
    model, recomputes = config.model, config.train.activation_checkpointing
    table = FLOAT * model.padded_vocab_size * model.d_model  # the gradient of the head, or of the embedding
    whole = how.ranks > 1 and not how.sharded  # DDP's buckets are there all along, and gradients are views of them
    before = FLOAT * stored if accumulates or whole else 0
    last = max(before, FLOAT * stored - table)  # when only the embedding's own is missing
    if how.one_graph and how.ranks == 1:  # which hands over all new gradients at its end
        last = before + FLOAT * stored - table
    elif how.compiled and before:  # a graph hands over those of its block, beside the earlier ones
        last += _matrices_of_a_block(model) * FLOAT // (how.ranks if how.sharded else 1)
    block = block_saved_bytes(model, how, n)
    one = _stream_width(model, how) * n * model.d_model if recomputes else block
    outside = outer_saved_bytes(model, how, n)
    kept = model.n_layers * one + outside
    again = block - one  # made anew before a block's backward pass
    stream = _stream_width(model, how) * n * model.d_model  # the gradient of the residual stream
    block_work = stream + again + _block_work_bytes(model, how, n)
    tied = table if model.tie_embeddings else 0  # the head's part waits for the embedding's
    half_weights = _half_weights(model) if how.half and recomputes else 0  # autocast's cache, until the loss is there
    return [
        {"gradients": before, "activations": kept, "loss": loss_bytes(model, how, n) + half_weights},
        {"gradients": before, "activations": kept, "loss": loss_backward_bytes(model, how, n)},
        {"gradients": before + tied, "activations": kept - outside, "backward pass": block_work},
        {"gradients": last + tied, "activations": one, "backward pass": block_work},
        {"gradients": last + tied, "activations": 0, "backward pass": stream + table},
    ]


# -- what autograd keeps ----------------------------------------------------------------------------------------------


def block_saved_bytes(model: ModelConfig, how: ComputeMode, n: int) -> int:
    """Bytes that the backward pass of one block needs, its input included; parameters are not among them."""
    d, w, cpu = n * model.d_model, how.width, how.device == "cpu"
    kept = 2 * (_norm_input_width(model, how) * d + _kept_by_norm(model, how, n))  # what goes into each norm
    kept += _kept_by_attention(model, how, n) + _kept_by_feed_forward(model, how, n)
    kept += 2 * w * d  # the norms' outputs, which the projections multiply
    if model.dropout_attention_residual:
        kept += d * (w if cpu and not how.compiled else 1)  # what it is multiplied by; on CUDA a mask
    return kept + (_half_weights(model) // model.n_layers if how.half else 0)


def outer_saved_bytes(model: ModelConfig, how: ComputeMode, n: int) -> int:
    """Bytes kept before the first block and behind the last one, the loss's own not included."""
    d = n * model.d_model
    as_input = how.device == "cpu" and not how.compiled
    noise = d * (_stream_width(model, how) if as_input else 1) if model.dropout_embedding else 0
    return noise + _norm_input_width(model, how) * d + _kept_by_norm(model, how, n)


def _stream_width(model: ModelConfig, how: ComputeMode) -> int:
    """Bytes of a number of the residual stream."""
    return 2 if model.residual_dtype == "bfloat16" and how.half else FLOAT


def _norm_input_width(model: ModelConfig, how: ComputeMode) -> int:
    """Bytes of a number as a norm keeps it: the stream's where a compiler or LayerNorm's kernel for CPUs reads that,
    and else a float32 copy, made by our RMSNorm, or on CUDA by autocast for LayerNorm."""
    mixed = how.compiled or (model.norm == "layernorm" and how.device == "cpu")
    return _stream_width(model, how) if mixed else FLOAT


def _norm_output_width(model: ModelConfig, how: ComputeMode) -> int:
    """Bytes of a number of a norm's output: the stream's, but that autocast has LayerNorm's in float32 on CUDA."""
    widened = model.norm == "layernorm" and how.device != "cpu"
    return FLOAT if widened else _stream_width(model, how)


def _half_weights(model: ModelConfig) -> int:
    """bfloat16 copies of the blocks' matrices, which autocast makes once a micro-step."""
    d, size = model.d_model, model.head_size
    attention = d * (2 * model.n_heads + 2 * model.kv_heads) * size
    feed_forward = d * model.d_ff * (3 if model.activation == "swiglu" else 2)
    return 2 * model.n_layers * (attention + feed_forward)


def _kept_by_norm(model: ModelConfig, how: ComputeMode, n: int) -> int:
    """Besides what goes in: a float32 statistic or two a token; without a kernel (model/norm.py) the product too."""
    if model.norm == "layernorm":
        return 2 * FLOAT * n
    if how.device == "cpu" and not how.compiled:
        return 2 * FLOAT * n + FLOAT * n * model.d_model
    return FLOAT * n


def _kept_by_attention(model: ModelConfig, how: ComputeMode, n: int) -> int:
    w, size = how.width, n * model.head_size
    queries, both = model.n_heads * size, (model.n_heads + model.kv_heads) * size
    kept = w * (both + model.kv_heads * size)  # the projections' output: values are a part of it
    if model.position == "rope" or model.qk_norm:
        kept += w * both  # rotated or normalized queries and keys
    if model.qk_norm:
        kept += (1 if how.compiled or how.device != "cpu" else 2) * FLOAT * both // model.head_size
        if not how.compiled:
            copies = int(how.half) + int(how.device == "cpu")  # in float32, and normalized before the weight
            kept += copies * FLOAT * both
    # What comes out, each row's log of sums, and in bfloat16 what comes out once more, if it goes through float32.
    again = how.half and _norm_output_width(model, how) == FLOAT
    return kept + w * queries * (2 if again else 1) + FLOAT * n * model.n_heads


def _kept_by_feed_forward(model: ModelConfig, how: ComputeMode, n: int) -> int:
    w, f = how.width, n * model.d_ff
    up = 2 * f if model.activation == "swiglu" else f
    kept = w * (up + f)  # the projection's output, and what goes into the next
    if model.activation == "swiglu" and not how.compiled:
        kept += w * f  # silu of the gate, which a compiler makes again
    if model.activation == "relu2" and how.half and how.device == "cuda" and not how.compiled:
        kept += (FLOAT - w) * f  # autocast squares in float32 there
    if model.dropout_ffn:
        kept += f * (w if how.device == "cpu" and not how.compiled else 1)
    return kept


# -- what comes and goes ----------------------------------------------------------------------------------------------


def _block_work_bytes(model: ModelConfig, how: ComputeMode, n: int) -> int:
    """Beyond what is kept, at the widest point of a block's backward pass: inside the feed-forward part."""
    f, w = n * model.d_ff, how.width
    copies = {"swiglu": 2, "gelu": 1, "relu2": 2}[model.activation]
    stream = 2 * n * model.d_model if how.half else 0
    return copies * f * w + stream


def loss_bytes(model: ModelConfig, how: ComputeMode, n: int) -> int:
    """model/loss.py's forward pass: its input, one chunk's logits, and both gradients, which are made there.

    `n` is the tokens of a micro-batch.
    """
    d, v = model.d_model, model.padded_vocab_size
    chunk, w = min(LOSS_CHUNK[how.device], n), how.width
    arrives = _norm_output_width(model, how) * n * d  # the last norm's output, which the caller holds
    gradients = w * n * d + FLOAT * v * d
    if how.compiled:  # logits and their gradient in the type of the products; the sum over chunks is a new matrix
        casts = 2 * (n * d + v * d) if how.half else arrives  # both inputs, of which one may have come so
        waiting = w * v * d * -(-n // chunk)  # of each chunk the head's gradient, until one kernel adds them up
        return casts + waiting + 2 * w * chunk * v + 2 * gradients
    if not how.half:
        return arrives + gradients + FLOAT * (chunk * v + chunk * d)
    # As they come, in float32, their gradient, and its product; or the next chunk's beside the float32 and the gradient
    # of the one before, which are let go when they are made anew.
    logits = max((2 + FLOAT + 2) * chunk * v + 2 * v * d, (2 + 2 * FLOAT + 2) * chunk * v if n > chunk else 0)
    cast = 2 * n * d if arrives > 2 * n * d else 0
    return arrives + cast + 2 * v * d + gradients + logits


def loss_backward_bytes(model: ModelConfig, how: ComputeMode, n: int) -> int:
    """Both gradients, and the same times the gradient of the loss."""
    d, v = n * model.d_model, model.padded_vocab_size * model.d_model
    cast = FLOAT * d if how.half and _norm_output_width(model, how) == FLOAT else 0
    return 2 * FLOAT * v + 2 * how.width * d + cast


def _gathered_bytes(model: ModelConfig, how: ComputeMode) -> int:
    """FSDP: two blocks' matrices (one at work, one on its way) and one's gradient, and the embedding's and head's."""
    block = _matrices_of_a_block(model)
    outside = stored_parameters(model) - block * model.n_layers
    return 2 * how.width * block + (how.width + FLOAT) * block + FLOAT * outside


def _matrices_of_a_block(model: ModelConfig) -> int:
    parts = parameters_by_part(model)
    return (parts["attention"] + parts["feed-forward"]) // model.n_layers
