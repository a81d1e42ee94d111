"""What every export needs: the checkpoint it reads, the folder it writes in, and optional packages."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from myllm.checkpoint.format import Checkpoint, load_checkpoint
from myllm.checkpoint.integrity import HASH_MODEL
from myllm.config import RunConfig, saved_config
from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.load import load_tokenizer
from myllm.errors import UserError, out_of_space
from myllm.files import fsync_dir, temporary_dir
from myllm.hub.weights import cast_weights
from myllm.model.transformer import Transformer
from myllm.paths import RunPaths
from myllm.runs.history import get_text, read_json_or_empty


@dataclass(frozen=True)
class ExportSource:
    """A checkpoint to be exported."""

    config: RunConfig
    step: int
    tokens_seen: int
    tokenizer: Tokenizer
    weights: dict[str, Tensor]
    """In float32, by our names."""
    imported: str | None = None
    """The source of the weights that training started from."""
    recorded_source: str | None = None
    """The source of the training data, as the data set names it."""

    def model(self, dtype: str = "float32") -> Transformer:
        """The model on the CPU, in float32, with weights rounded to `dtype`."""
        model = Transformer(self.config.model).eval()
        model.load_state_dict(cast_weights(self.weights, dtype))
        return model


def load_export_source(checkpoint: Path | Checkpoint) -> ExportSource:
    """
    Args:
        checkpoint: a checkpoint, or its folder.

    Raises:
        UserError: a damaged checkpoint, or a tokenizer that does not match its model.
    """
    saved = load_checkpoint(checkpoint, HASH_MODEL) if isinstance(checkpoint, Path) else checkpoint
    config = saved_config(saved.config, saved.folder / "config.json")
    run = RunPaths(saved.folder.parent.parent)
    tokenizer = load_tokenizer(saved.tokenizer_file)
    if config.model.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"the tokenizer does not match the model: in {saved.folder} the vocabulary {tokenizer.name} has "
            f"{tokenizer.vocab_size:,} tokens, the model {config.model.vocab_size:,}"
        )
    name = get_text(read_json_or_empty(run.config), "name") or config.name  # the run may have been renamed
    return ExportSource(
        replace(config, name=name),
        saved.state.step,
        saved.state.tokens_seen,
        tokenizer,
        saved.model,
        imported=get_text(read_json_or_empty(run.imported), "source"),
        recorded_source=get_text(read_json_or_empty(run.environment), "source"),
    )


@contextmanager
def atomic_dir(to: Path) -> Iterator[Path]:
    """Create a private folder next to `to` to write in. The caller renames its files to their final names.

    The folder is removed at the end, or after a kill by the next export to `to`.

    Raises:
        UserError: the folder cannot be created, or the disk is full.
    """
    with ExitStack() as stack:
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            work = stack.enter_context(temporary_dir(to))
        except OSError as error:
            raise UserError(f"cannot write {to}: {error.strerror}; give another path") from None
        try:
            yield work
        except Exception as error:
            if not out_of_space(error):
                raise
            raise UserError(f"cannot write {to}: the disk is full. Nothing was exported; free some space") from None
    fsync_dir(to.parent)
