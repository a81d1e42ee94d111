"""Text to shards: download, tokenize in parallel processes, hold out validation, write, hash."""
