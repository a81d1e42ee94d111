"""From text to batches: sources, tokenizer, preparation, shards on disk, order, loader. Knows no model."""
