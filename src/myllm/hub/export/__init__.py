"""Checkpoints in formats that other tools read. Each export is verified before it gets its name.

transformers, gguf, onnx: the formats. fold: parts that they lack. source: what they read and where they write.
tokenizer: the vocabulary for transformers. verify: compares an export with the model.
"""
