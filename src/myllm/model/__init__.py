"""The Transformer and its parts: attention, feed-forward, norms, loss, key-value cache. Knows no ranks and no files."""
