"""A fast stand-in for the export, for tests of what happens to the exported folder."""

import json
from pathlib import Path


def export_stand_in(checkpoint: Path, folder: Path) -> None:
    """Write the checkpoint's own weights file as the exported weights."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((checkpoint / "weights/__0_0.distcp").read_bytes())
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
