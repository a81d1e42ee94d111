"""Text to token ids and back: GPT-2's vocabulary, or any byte-level tokenizer.json."""
