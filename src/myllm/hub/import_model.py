"""Import models made elsewhere as runs, which can be sampled, evaluated, exported, and named by --init.from."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from myllm import paths
from myllm.checkpoint.format import Snapshot, write_checkpoint
from myllm.checkpoint.layout import MANIFEST, TOKENIZER
from myllm.checkpoint.state import NO_DATASET, TrainState
from myllm.config import ModelConfig, RunConfig, to_dict
from myllm.data.sampler import DataPosition
from myllm.errors import UserError
from myllm.files import write_json, write_text
from myllm.paths import NO_MODEL, REPOSITORY, RunPaths, user_path
from myllm.planning.config_checks import name_errors
from myllm.runs.run_dir import archive_old_run, claim_run, write_config

from .download import download
from .external_model import ExternalModel, finalize_weights
from .import_lf_llm import CHECKPOINT, read_lf_llm
from .import_transformers import CONFIG, read_model_config, read_transformers


def import_model(
    source: str,
    name: str | None = None,
    revision: str | None = None,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> RunPaths:
    """Create a run from a model, at step 0 and without a data set.

    Args:
        source: a folder of transformers, such as one of our exports; the reference run's pytorch_model.pth, or its
            folder; or a Hub repository, namespace/name or namespace/name@revision.
        name: name of the run. Default: from the source.
        revision: branch, tag or commit of the repository.
        overwrite: move an existing run of that name aside.

    Raises:
        UserError: no such source, an unsupported model, or a run of that name.
    """
    path = resolve_source(source, revision, say)
    name = name or _default_name(source)
    run = RunPaths.of(name)
    if any(run.root.glob("checkpoints/step_*")) and not overwrite:
        raise UserError(f"a run {name} exists; give another --name, or --overwrite to move it aside")
    if errors := name_errors(name):
        raise UserError("; ".join(errors))
    external = read_external_model(path)
    config = RunConfig(name=name, model=external.config)
    with claim_run(run):
        if aside := archive_old_run(run):
            say(f"moved the older run to {aside}")
        if external.tokenizer_file:
            tokenizer = run.root / TOKENIZER
            write_text(tokenizer, external.tokenizer_file.read_bytes().decode("utf-8"))
            config = replace(config, data=replace(config.data, tokenizer=paths.relative_to_data(tokenizer)))
        write_config(run, config)
        write_json(run.imported, {"source": source_label(source, revision)})
        state = TrainState(0, 0, DataPosition(0, 0, 0, NO_DATASET))
        snapshot = Snapshot(state, to_dict(config), external.weights, {}, {}, external.tokenizer_file)
        write_checkpoint(run.checkpoints, snapshot)
    for note in external.notes:
        say(f"note: {note}")
    return run


def is_external_model(path: Path) -> bool:
    """True for a model made elsewhere or an export of ours, false for a run or a checkpoint of ours."""
    if path.is_file():
        return path.suffix in (".pth", ".pt")
    if _is_own(path):
        return False
    if (path / CHECKPOINT).is_file():
        return True
    try:  # a run without checkpoints has a config.json too
        return b'"model_type"' in (path / CONFIG).read_bytes()
    except OSError:
        return False


def _is_own(path: Path) -> bool:
    return (path / MANIFEST).is_file() or (path / "checkpoints").is_dir()


def resolve_source(source: str, revision: str | None, say: Callable[[str], None]) -> Path:
    """The file or folder of a source. A Hub repository is downloaded into the Hub's cache.

    Raises:
        UserError: no such source.
    """
    path = user_path(source)
    if path.exists():
        if revision:
            raise UserError(f"{path} is a local path, and --revision is for Hub repositories")
        return path
    if match := REPOSITORY.fullmatch(source):
        return download(match[1], revision or match[2], say)
    raise UserError(NO_MODEL.format(source))


def read_external_model(path: Path) -> ExternalModel:
    """Read a model made elsewhere. Its weights are complete: float32, with all shapes of our model.

    Raises:
        UserError: an unsupported model.
    """
    external = _read(path)
    return replace(external, weights=finalize_weights(external, path))


def read_external_config(path: Path) -> tuple[ModelConfig, Path | None]:
    """A model's config and the file of its vocabulary (None for the default vocabulary), without its weights.

    Raises:
        UserError: an unsupported model.
    """
    if (path / CONFIG).is_file():
        return read_model_config(path)[:2]
    external = _read(path)
    return external.config, external.tokenizer_file


def _read(path: Path) -> ExternalModel:
    if path.is_file():
        return read_lf_llm(path)
    if (path / CONFIG).is_file() and not _is_own(path):
        return read_transformers(path)
    if (path / CHECKPOINT).is_file():
        return read_lf_llm(path / CHECKPOINT)
    if _is_own(path):
        raise UserError(f"{path} is a run or a checkpoint of MyLLM and need not be imported")
    names = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{path} holds {names}; expected a folder of transformers ({CONFIG}, model.safetensors) or one with "
        f"{CHECKPOINT}"
    )


def source_label(source: str, revision: str | None) -> str:
    """The source for model cards: a repository with its revision, or the last part of a local path."""
    path, match = user_path(source), REPOSITORY.fullmatch(source)
    if path.exists() or not match:
        return path.absolute().name
    revision = revision or match[2]
    return f"{match[1]}@{revision}" if revision else match[1]


def _default_name(source: str) -> str:
    """A name for the run of a source."""
    path, match = user_path(source), REPOSITORY.fullmatch(source)
    path = path.absolute() if path.exists() or not match else Path(match[1])
    return (path.parent if path.name == CHECKPOINT else path).name or "imported"
