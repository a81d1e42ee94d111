"""A checkpoint as a folder that `transformers`, and what builds on it, opens with no code of ours."""

import glob
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from myllm.checkpoint.format import Checkpoint, load_checkpoint
from myllm.checkpoint.integrity import HASH_MODEL
from myllm.checkpoint.retention import unused_path
from myllm.config import RunConfig, saved_config
from myllm.data.sources.catalog import actual_source
from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.load import load_tokenizer
from myllm.errors import UserError
from myllm.files import TEMP_SUFFIX, fsync_dir, read_json, write_json, write_text
from myllm.hub.architectures import CLASSES, select_architecture, transformers_config
from myllm.hub.model_card import CardData, render_model_card
from myllm.model.transformer import Transformer
from myllm.paths import RunPaths, user_path
from myllm.runs.history import get_text, read_json_or_empty

from .target import atomic_dir
from .tokenizer import tokenizer_files
from .verify import Parity, require_transformers, sample_inputs, verify
from .weights import DTYPES, cast_weights, to_transformers

FORMAT = "myllm-export-1"
EXPORT_FILE = "myllm.json"
"""Says that a folder is an export of ours, and of what."""
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
"""The files of weights; how many there are depends on their size."""
TOKENIZER_COPY = "myllm_tokenizer.json"
"""The vocabulary of one's own as training had it, byte for byte: data sets are bound to its hash."""
SHARD_SIZE = "5GB"
REPLACED = ".replaced"


@dataclass(frozen=True)
class ExportResult:
    """A finished export."""

    folder: Path
    architecture: str
    parity: Parity
    rounding: float
    """Largest change of a logit on real text by the weights' type; 0 for float32."""


@dataclass(frozen=True)
class ExportSource:
    """A checkpoint, ready to be written in other formats."""

    config: RunConfig
    step: int
    tokens_seen: int
    tokenizer: Tokenizer
    weights: dict[str, Tensor]
    """In float32, by our names."""
    imported: str | None = None
    """Where the weights that training began with came from."""
    recorded_source: str | None = None
    """Of its data, by the data set's own word."""

    def model(self, dtype: str = "float32") -> Transformer:
        """On the CPU, in float32, with weights rounded to another type."""
        model = Transformer(self.config.model).eval()
        model.load_state_dict(cast_weights(self.weights, dtype))
        return model


def load_export_source(where: Path | Checkpoint) -> ExportSource:
    """A checkpoint, by its folder or open already, as a source of exports.

    Raises:
        UserError: no intact checkpoint, or one whose vocabulary does not fit.
    """
    saved = load_checkpoint(where, HASH_MODEL) if isinstance(where, Path) else where
    folder = saved.folder
    config = saved_config(saved.config, folder / "config.json")
    run = RunPaths(folder.parent.parent)
    source = ExportSource(
        config,
        saved.state.step,
        saved.state.tokens_seen,
        load_tokenizer(saved.tokenizer_file),
        saved.model,
        imported=get_text(read_json_or_empty(run.imported), "source"),
        recorded_source=get_text(read_json_or_empty(run.environment), "source"),
    )
    if config.model.vocab_size != source.tokenizer.vocab_size:
        raise UserError(
            f"the model in {folder} has {config.model.vocab_size:,} tokens, its vocabulary {source.tokenizer.name} "
            f"{source.tokenizer.vocab_size:,}: they do not belong together"
        )
    return source


def export_transformers(
    source: Path | ExportSource,
    to: Path,
    dtype: str = "float32",
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    max_shard_size: int | str = SHARD_SIZE,
) -> ExportResult:
    """Write the folder, check it with transformers, and only then give it its name.

    Args:
        source: a checkpoint's folder (`run_folder.latest_checkpoint` finds a run's), or one that is open.
        to: must not be there yet, be empty, or be an earlier export, which is replaced.
        dtype: float32, bfloat16 or float16.
        overwrite: move another folder of that name aside.
        say: told what is being done.
        max_shard_size: bytes of a weights file, or a size such as "5GB".

    Raises:
        UserError: a model that transformers has no architecture for, a folder in the way, transformers missing, or
            other logits from the folder than from the model.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    to = user_path(to).absolute()
    check_target(to, overwrite)
    require_transformers()  # before minutes of work
    source = load_export_source(source) if isinstance(source, Path) else source
    kind = select_architecture(source.config.model)
    with atomic_dir(to) as work:
        say(f"writing {CLASSES[kind]} in {dtype}")
        _write(work, source, dtype, max_shard_size)
        say("comparing with transformers")
        model = source.model(dtype)
        parity = verify(work, model, source.tokenizer)
        rounding = _rounding(source, model) if dtype != "float32" else 0.0
        fsync_dir(work)
        _take_the_name(work, to, say)
    return ExportResult(to, CLASSES[kind], parity, rounding)


def check_target(to: Path, overwrite: bool) -> None:
    """
    Raises:
        UserError: something is there that is no export of ours.
    """
    if to.is_dir():
        if not any(to.iterdir()) or is_export(to) or overwrite:
            return
        raise UserError(
            f"{to} is there already and is no export of this program; give another folder, or --overwrite to move it "
            "aside"
        )
    if to.exists():
        raise UserError(f"{to} is a file, expected a folder to write; give another name")


def is_export(folder: Path) -> bool:
    """Whether this program made the folder."""
    try:
        return read_json(folder / EXPORT_FILE).get("format") == FORMAT
    except (OSError, UserError):
        return False


def _take_the_name(work: Path, to: Path, say: Callable[[str], None]) -> None:
    """Never a part of either under the name, wherever it ends: what was there is moved before it is removed."""
    if not to.exists():
        work.rename(to)
    elif not any(to.iterdir()) or is_export(to):
        _keep_others_files(work, to, say)
        old = work.with_name(f"{work.name}{REPLACED}")
        to.rename(old)
        work.rename(to)
        for left in to.parent.glob(f".{glob.escape(to.name)}.*{TEMP_SUFFIX}{REPLACED}"):  # of killed processes, too
            shutil.rmtree(left, ignore_errors=True)
    else:
        to.rename(to.with_name(f"{to.name}.before-{time.strftime('%Y%m%d-%H%M%S')}"))
        work.rename(to)


def _keep_others_files(work: Path, to: Path, say: Callable[[str], None]) -> None:
    """Move what somebody put into an earlier export out of it: that is replaced, and then deleted."""
    known = {path.name for path in work.iterdir()} | {TOKENIZER_COPY}
    others = [path for path in to.iterdir() if path.name not in known and not WEIGHTS.fullmatch(path.name)]
    if not others:
        return
    kept = unused_path(to.with_name(f"{to.name}.kept-{time.strftime('%Y%m%d-%H%M%S')}"))
    kept.mkdir()
    for path in others:
        path.rename(kept / path.name)
    say(f"{len(others)} of the files in {to} were no part of the export; they are in {kept} now")


def _write(folder: Path, source: ExportSource, dtype: str, max_shard_size: int | str) -> None:
    config, tokenizer = source.config.model, source.tokenizer
    kind, end = select_architecture(config), tokenizer.end_of_text
    weights = to_transformers(kind, config, cast_weights(source.weights, dtype))
    save_torch_state_dict(weights, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
    exported = transformers_config(config, end, dtype)
    write_json(folder / "config.json", exported)
    for file in folder.glob("*.safetensors"):  # written for its owner's eyes alone
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
    """What the model card of an exported folder says.

    Args:
        exported: the folder's config.json.
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
