"""Weights for everyone else: folders of `transformers`, ONNX and GGUF files. Each is checked before it has its name."""

from myllm.hub.export.transformers import Exported, Source, export_folder, open_source

__all__ = ["Exported", "Source", "export_folder", "open_source"]
