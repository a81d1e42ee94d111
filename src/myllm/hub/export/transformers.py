"""Export a checkpoint as a folder that `transformers`, and tools built on it, open without MyLLM."""

import glob
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from myllm.checkpoint.retention import dated_path
from myllm.data.sources.catalog import actual_source
from myllm.errors import UserError
from myllm.files import TEMP_SUFFIX, fsync_dir, read_json, write_json, write_text
from myllm.hub.architectures import CLASSES, select_architecture, transformers_config
from myllm.hub.model_card import CardData, render_model_card
from myllm.hub.weights import DTYPES, cast_weights, export_weights
from myllm.model.transformer import Transformer
from myllm.paths import user_path

from .fold import fold
from .source import ExportSource, atomic_dir, load_export_source
from .tokenizer import tokenizer_files
from .verify import Parity, require_transformers, sample_inputs, verify

FORMAT = "myllm-export-1"
EXPORT_FILE = "myllm.json"
"""Marks a folder as an export of ours, with its model and step."""
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
"""Files of weights. Their number depends on their size."""
TOKENIZER_COPY = "myllm_tokenizer.json"
"""A custom vocabulary, byte for byte as used in training: data sets are bound to its hash."""
SHARD_SIZE = "5GB"
REPLACED = ".replaced"


@dataclass(frozen=True)
class ExportResult:
    """A verified export."""

    folder: Path
    architecture: str
    parity: Parity
    rounding: float
    """Largest change of a logit on real text that is due to the dtype of the weights; 0 for float32."""


def export_transformers(
    source: Path | ExportSource,
    to: Path,
    dtype: str = "float32",
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    max_shard_size: int | str = SHARD_SIZE,
) -> ExportResult:
    """Write the folder, verify it with transformers, and only then give it its name.

    Args:
        source: a checkpoint's folder, or a loaded source.
        to: the folder to create. An empty folder or an earlier export is replaced.
        dtype: float32, bfloat16 or float16.
        overwrite: move any other folder of that name aside.
        say: receives progress messages.
        max_shard_size: bytes of a file of weights, or a size such as "5GB".

    Raises:
        UserError: a model without an architecture in transformers, an existing folder, transformers is not installed,
            or it gives other logits than the model.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    to = user_path(to).absolute()
    check_target(to, overwrite)
    require_transformers()  # fails before minutes of work
    source = load_export_source(source) if isinstance(source, Path) else source
    model_type = select_architecture(source.config.model)
    architecture = CLASSES[model_type]
    with atomic_dir(to) as work:
        say(f"writing {architecture} in {dtype}")
        folded = fold(source)
        weights = export_weights(model_type, folded.config.model, cast_weights(folded.weights, dtype))
        _write(work, source, weights, dtype, max_shard_size)
        say("comparing with transformers")
        model = folded.model(dtype)
        parity = verify(work, model, source.tokenizer)
        rounding = _rounding(source, model) if dtype != "float32" else 0.0
        fsync_dir(work)
        _publish(work, to, say)
    return ExportResult(to, architecture, parity, rounding)


def check_target(to: Path, overwrite: bool) -> None:
    """
    Raises:
        UserError: `to` exists and is not an export of ours.
    """
    if to.is_dir():
        if not any(to.iterdir()) or is_export(to) or overwrite:
            return
        raise UserError(
            f"{to} exists and is not an export of MyLLM; give another folder, or --overwrite to move it aside"
        )
    if to.exists():
        raise UserError(f"{to} is a file, expected a folder; give another path")


def is_export(folder: Path) -> bool:
    try:
        return read_json(folder / EXPORT_FILE).get("format") == FORMAT
    except (OSError, UserError):
        return False


def _publish(work: Path, to: Path, say: Callable[[str], None]) -> None:
    """Rename `work` to `to`. An existing folder is moved before it is removed, so `to` is complete at any time."""
    if not to.exists():
        work.rename(to)
    elif not any(to.iterdir()) or is_export(to):
        _keep_user_files(work, to, say)
        old = work.with_name(f"{work.name}{REPLACED}")
        to.rename(old)
        work.rename(to)
        # Includes folders that killed processes left.
        for folder in to.parent.glob(f".{glob.escape(to.name)}.*{TEMP_SUFFIX}{REPLACED}"):
            shutil.rmtree(folder, ignore_errors=True)
    else:
        to.rename(dated_path(to))
        work.rename(to)


def _keep_user_files(work: Path, to: Path, say: Callable[[str], None]) -> None:
    """Move files that are not part of an earlier export out of it, before it is removed."""
    known = {path.name for path in work.iterdir()} | {TOKENIZER_COPY}
    others = [path for path in to.iterdir() if path.name not in known and not WEIGHTS.fullmatch(path.name)]
    if not others:
        return
    kept = dated_path(to, "kept")
    kept.mkdir()
    for path in others:
        path.rename(kept / path.name)
    say(f"moved {len(others)} files that were not part of the export from {to} to {kept}")


def _write(
    folder: Path, source: ExportSource, weights: dict[str, Tensor], dtype: str, max_shard_size: int | str
) -> None:
    config, tokenizer = source.config.model, source.tokenizer
    end = tokenizer.end_of_text
    save_torch_state_dict(weights, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
    exported = transformers_config(config, end, dtype)
    write_json(folder / "config.json", exported)
    for file in folder.glob("*.safetensors"):  # created without permissions for others
        file.chmod((folder / "config.json").stat().st_mode)
    write_json(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end})
    for name, content in tokenizer_files(tokenizer, config.max_seq_len).items():
        write_text(folder / name, content)
    if not tokenizer.is_default:
        write_text(folder / TOKENIZER_COPY, tokenizer.file.read_bytes().decode("utf-8"))
    data = card_data(source, exported)
    saved = {"format": FORMAT, "name": data.name, "step": data.step, "tokens_seen": data.tokens_seen}
    write_json(folder / EXPORT_FILE, saved | {"model": asdict(config), "tokenizer": tokenizer.describe()})
    write_text(folder / "README.md", render_model_card(data))


def card_data(source: ExportSource, exported: dict[str, Any]) -> CardData:
    """Data of the model card.

    Args:
        exported: the content of config.json.
    """
    config = source.config
    actual = actual_source(config.data.source, config.data.dataset, source.recorded_source)
    return CardData(
        name=config.name,
        config=replace(config, data=replace(config.data, source=actual)),
        step=source.step,
        tokens_seen=source.tokens_seen,
        exported=exported | {"tokenizer": source.tokenizer.describe()},
        imported=source.imported,
    )


@torch.no_grad()
def _rounding(source: ExportSource, model: Transformer) -> float:
    tokens = sample_inputs(model, source.tokenizer)[1]
    return float((source.model()(tokens) - model(tokens)).abs().max())
