"""Models made elsewhere, as runs of ours: they sample, are evaluated, exported, and trained further."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from myllm import paths
from myllm.checkpoint.format import save_checkpoint
from myllm.checkpoint.layout import MANIFEST, TOKENIZER
from myllm.checkpoint.state import NO_DATASET, TrainState
from myllm.config import ModelConfig, RunConfig, to_dict
from myllm.data.sampler import DataPosition
from myllm.errors import UserError
from myllm.files import write_json, write_text
from myllm.model.transformer import Transformer
from myllm.paths import NO_MODEL, REPOSITORY, RunPaths, user_path
from myllm.planning.validation import config_errors
from myllm.runs.run_dir import archive_old_run, claim_run, write_config

from .download import download
from .external_model import ExternalModel
from .import_lf_llm import CHECKPOINT, read_lf_llm
from .import_transformers import CONFIG, read_transformers


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
            pytorch_model.pth or that file, or a repository of the Hub: namespace/name, or namespace/name@revision.
        name: of the run; None: after the source.
        revision: branch, tag or commit of the repository.
        overwrite: move a run of that name aside.

    Raises:
        UserError: nothing there, nothing that can be imported, or a run in the way.
    """
    where = resolve_source(source, revision, say)
    name = name or _default_name(source)
    run = RunPaths.of(name)
    if any(run.root.glob("checkpoints/step_*")) and not overwrite:
        raise UserError(f"there is a run {name} already; give another --name, or --overwrite to move it aside")
    if wrong := [fault for fault in config_errors(RunConfig(name=name), 1) if fault.startswith("name ")]:
        raise UserError("; ".join(wrong))
    foreign = read_external_model(where)
    config = RunConfig(name=name, model=foreign.config)
    with claim_run(run):
        if aside := archive_old_run(run):
            say(f"the older run was moved to {aside}")
        if foreign.tokenizer_file:
            vocabulary = run.root / TOKENIZER
            write_text(vocabulary, foreign.tokenizer_file.read_bytes().decode("utf-8"))
            config = replace(config, data=replace(config.data, tokenizer=paths.relative_to_data(vocabulary)))
        write_config(run, config)
        write_json(run.imported, {"source": _source_label(source, revision)})
        state = TrainState(0, 0, DataPosition(0, 0, 0, NO_DATASET))
        save_checkpoint(run.checkpoints, state, to_dict(config), foreign.weights, {}, [], 0, foreign.tokenizer_file)
    for note in foreign.notes:
        say(f"note: {note}")
    return run


def is_external_model(where: Path) -> bool:
    """Whether a file or folder is a model made elsewhere, or an export of ours; not a run, not a checkpoint of ours."""
    if where.is_file():
        return where.suffix in (".pth", ".pt")
    if _is_own(where):
        return False
    # A run that has saved nothing yet has a config.json too.
    return (where / CHECKPOINT).is_file() or b'"model_type"' in _content(where / CONFIG)


def _is_own(where: Path) -> bool:
    return (where / MANIFEST).is_file() or (where / "checkpoints").is_dir()


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def is_repository(source: str) -> bool:
    """Whether it could be the name of a repository."""
    return REPOSITORY.fullmatch(source) is not None


def resolve_source(source: str, revision: str | None, say: Callable[[str], None]) -> Path:
    """What a user means: a file or folder here, or one of the Hub, which is then in its cache.

    Raises:
        UserError: nothing there.
    """
    path = user_path(source)
    if path.exists():
        if revision:
            raise UserError(f"{path} is on this disk: --revision is for repositories of the Hub")
        return path
    if found := REPOSITORY.fullmatch(source):
        return download(found[1], revision or found[2], say)
    raise UserError(NO_MODEL.format(source))


def read_external_model(where: Path) -> ExternalModel:
    """A model made elsewhere, its weights in float32 and of exactly the shapes that ours has.

    Raises:
        UserError: nothing that can be used here.
    """
    foreign = _read_any(where)
    if wrong := [fault for fault in config_errors(RunConfig(model=foreign.config), 1) if fault.startswith("model.")]:
        raise UserError(f"the model in {where} cannot be used here:\n" + "\n".join(f"  - {fault}" for fault in wrong))
    return replace(foreign, weights=_validate_weights(where, foreign))


def _read_any(where: Path) -> ExternalModel:
    if where.is_file():
        return read_lf_llm(where)
    if (where / CONFIG).is_file() and not _is_own(where):
        return read_transformers(where)
    if (where / CHECKPOINT).is_file():
        return read_lf_llm(where / CHECKPOINT)
    if _is_own(where):
        raise UserError(f"{where} is a run or a checkpoint of this program already: there is nothing to import")
    seen = ", ".join(sorted(path.name for path in where.iterdir())[:8])
    raise UserError(
        f"{where} holds {seen or 'nothing'}; expected a folder of transformers ({CONFIG}, model.safetensors) or one "
        f"with a {CHECKPOINT}"
    )


def _validate_weights(where: Path, foreign: ExternalModel) -> dict[str, Tensor]:
    """The weights in float32, with the vocabulary's padding, of exactly the shapes that the model has."""
    weights = {name: _pad_vocab(name, tensor.float(), foreign.config) for name, tensor in foreign.weights.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in Transformer(foreign.config).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [
        f"{name}: {found.get(name)}, expected {shape}" for name, shape in expected.items() if found.get(name) != shape
    ]
    wrong += [f"{name} is not finite" for name, tensor in weights.items() if not tensor.isfinite().all()]
    if wrong:
        raise UserError(f"the weights in {where} do not fit:\n" + "\n".join(f"  - {fault}" for fault in wrong[:8]))
    return weights


def _pad_vocab(name: str, weight: Tensor, config: ModelConfig) -> Tensor:
    if name not in ("embedding.weight", "head.weight"):
        return weight.contiguous()
    rows = weight.new_zeros(config.padded_vocab_size - config.vocab_size, weight.shape[1])
    return torch.cat((weight, rows))


def _source_label(source: str, revision: str | None) -> str:
    """What cards say of where weights came from: a repository with its revision, but no folders of this disk."""
    found = REPOSITORY.fullmatch(source)
    if found and not user_path(source).exists():
        revision = revision or found[2]
        return found[1] + (f"@{revision}" if revision else "")
    return user_path(source).absolute().name


def _default_name(source: str) -> str:
    """A run's name after a source."""
    found = REPOSITORY.fullmatch(source)
    path = user_path(source)
    if found and not path.exists():
        path = Path(found[1])
    path = path.absolute() if path.exists() else path
    return (path.parent if path.name == CHECKPOINT else path).name or "imported"
