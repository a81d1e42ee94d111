"""Text to token ids and back.

base           Tokenizer, what every tokenizer offers
load           load_tokenizer: the tokenizer that a config names
gpt2           GPT-2's vocabulary, through tiktoken
huggingface    any tokenizer.json, through Hugging Face's tokenizers
train          training a byte-level BPE tokenizer
"""
