"""Import, export and publish models: transformers, GGUF, ONNX, and the Hugging Face Hub.

export/: transformers folders, GGUF, ONNX. import_model: models made elsewhere as runs; import_transformers and
import_lf_llm read them, download gets them from the Hub, external_model checks them. architectures and weights: config
and weights of other formats, in both directions. publish, background_publish, client, model_card: the Hugging Face Hub.
"""
