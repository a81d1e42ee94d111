"""Models in and out: transformers folders, GGUF, ONNX, the Hugging Face Hub."""
