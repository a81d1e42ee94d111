"""From text to batches: sources, tokenizer, shards on disk, order, loader. Knows no model."""
