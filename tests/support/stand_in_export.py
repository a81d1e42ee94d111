"""A stand-in for the export, for tests of what happens to its folder: quick, and as large as the test likes."""

import json
from pathlib import Path


def make_folder(checkpoint: Path, folder: Path) -> None:
    """Weights that are the checkpoint's own file, and a README that the card replaces."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((checkpoint / "weights/__0_0.distcp").read_bytes())
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
