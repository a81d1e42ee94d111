"""Models made elsewhere, as runs of ours: they sample, are evaluated, exported, and trained further."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoint
from ..checkpoint import TrainState
from ..config import ModelConfig, RunConfig, to_dict
from ..data.order import DataPosition
from ..errors import UserError
from ..files import write_text
from ..model import Transformer
from ..paths import RunPaths
from ..run_folder import claimed, move_aside, write_config
from ..validate import faults
from .foreign import Foreign
from .hub import download
from .reference import CHECKPOINT, read_reference
from .transformers_folder import CONFIG, read_folder

REPOSITORY = re.compile(r"(?:hub:)?([\w.-]+/[\w.-]+)")


def import_model(
    source: str,
    name: str | None = None,
    revision: str | None = None,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> RunPaths:
    """Make a run of a model, at step 0 and bound to no data yet.

    Args:
        source: a folder of transformers, one of our exports, a folder that holds the reference run's
            pytorch_model.pth or that file, or a repository of the Hub: namespace/name.
        name: of the run; None: after the source.
        revision: branch, tag or commit of the repository.
        overwrite: move a run of that name aside.

    Raises:
        UserError: nothing there, nothing that can be imported, or a run in the way.
    """
    where = _find(source, revision, say)
    name = name or _plain(source)
    run = RunPaths.of(name)
    if any(run.root.glob("checkpoints/step_*")) and not overwrite:
        raise UserError(f"there is a run {name} already; give another --name, or --overwrite to move it aside")
    foreign = _read(where)
    config = RunConfig(name=name, model=foreign.config)
    if wrong := [fault for fault in faults(config, 1) if fault.startswith(("name ", "model."))]:
        raise UserError(f"the model in {where} cannot be used here:\n" + "\n".join(f"  - {fault}" for fault in wrong))
    weights = _checked(where, foreign)
    with claimed(run):
        if aside := move_aside(run):
            say(f"the older run was moved to {aside}")
        if foreign.tokenizer_file:
            vocabulary = run.root / checkpoint.TOKENIZER
            write_text(vocabulary, foreign.tokenizer_file.read_bytes().decode("utf-8"))
            config = replace(config, data=replace(config.data, tokenizer=str(vocabulary)))
        write_config(run, config)
        state = TrainState(0, 0, DataPosition(0, 0, 0, checkpoint.UNBOUND))
        checkpoint.save(run.checkpoints, state, to_dict(config), weights, {}, [], 0, foreign.tokenizer_file)
    for note in foreign.notes:
        say(f"note: {note}")
    return run


def _find(source: str, revision: str | None, say: Callable[[str], None]) -> Path:
    path = Path(source).expanduser()
    if path.exists():
        if revision:
            raise UserError(f"{path} is on this disk: --revision is for repositories of the Hub")
        return path
    if found := REPOSITORY.fullmatch(source):
        return download(found[1], revision, say)
    raise UserError(f"nothing at {source!r}: give a folder, a {CHECKPOINT}, or a repository of the Hub, namespace/name")


def _read(where: Path) -> Foreign:
    if where.is_file():
        return read_reference(where)
    if (where / CONFIG).is_file() and not (where / checkpoint.MANIFEST).is_file():
        return read_folder(where)
    if (where / CHECKPOINT).is_file():
        return read_reference(where / CHECKPOINT)
    seen = ", ".join(sorted(path.name for path in where.iterdir())[:8])
    raise UserError(
        f"{where} holds {seen or 'nothing'}; expected a folder of transformers ({CONFIG}, model.safetensors) or one "
        f"with a {CHECKPOINT}"
    )


def _checked(where: Path, foreign: Foreign) -> dict[str, Tensor]:
    """The weights in float32, with the vocabulary's padding, of exactly the shapes that the model has."""
    weights = {name: _padded(name, tensor.float(), foreign.config) for name, tensor in foreign.weights.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in Transformer(foreign.config).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [
        f"{name}: {found.get(name)}, expected {shape}" for name, shape in expected.items() if found.get(name) != shape
    ]
    wrong += [f"{name} is not finite" for name, tensor in weights.items() if not tensor.isfinite().all()]
    if wrong:
        raise UserError(f"the weights in {where} do not fit:\n" + "\n".join(f"  - {each}" for each in wrong[:8]))
    return weights


def _padded(name: str, weight: Tensor, config: ModelConfig) -> Tensor:
    if name not in ("embedding.weight", "head.weight"):
        return weight.contiguous()
    rows = weight.new_zeros(config.padded_vocab_size - config.vocab_size, weight.shape[1])
    return torch.cat((weight, rows))


def _plain(source: str) -> str:
    """A run's name after a source."""
    path = Path(source.removeprefix("hub:")).expanduser()
    path = path.absolute() if path.exists() else path
    return (path.parent if path.name == CHECKPOINT else path).name or "imported"


__all__ = ["import_model"]
