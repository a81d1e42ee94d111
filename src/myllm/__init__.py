"""MyLLM: pretrain a modern language model, from text to weights that open everywhere."""

__version__ = "0.1.0"
