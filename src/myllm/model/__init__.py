"""The model, in plain PyTorch. Knows no ranks and no files.

transformer: the whole model, its blocks, and its losses and scores. attention, feed_forward, norm, rope: its parts.
init_weights: initial weights. cross_entropy: the loss without the full logits. kv_cache: for generation.
attention_backend: which kernel attention runs on.
"""
