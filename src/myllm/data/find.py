"""Find a prepared data set, or those of a mixture, by name."""

from pathlib import Path

from myllm import paths
from myllm.errors import UserError, did_you_mean
from myllm.paths import user_path

from .dataset import MANIFEST, PROGRESS, Dataset
from .mixture.mixed_dataset import MixedDataset
from .mixture.spec import parse_mixture


def find_dataset(name: str, allow_incomplete: bool = False) -> Dataset:
    """A data set by its folder, its name under temp_data/datasets, or a unique prefix of that name; or a mixture of
    complete ones."""
    if mixture := parse_mixture(name):
        return MixedDataset.of(mixture, [find_dataset(component) for component in mixture.names])
    return Dataset.open(
        find_dataset_folder(name, (MANIFEST, PROGRESS) if allow_incomplete else (MANIFEST,)), allow_incomplete
    )


def find_dataset_folder(name: str, names: tuple[str, ...] = (MANIFEST,)) -> Path:
    """The folder that `find_dataset` opens: it has a file of one of the names.

    Raises:
        UserError: there is no such folder, or more than one.
    """
    for folder in (user_path(name), paths.datasets_dir() / name):
        if any((folder / file).is_file() for file in (*names, PROGRESS)):
            paths.warn_if_ambiguous(name, folder, paths.datasets_dir() / name)
            return folder
    known = sorted({path.parent.name for file in names for path in paths.datasets_dir().glob(f"[!.]*/{file}")})
    matches = [candidate for candidate in known if candidate.startswith(name)]
    if len(matches) == 1:
        return paths.datasets_dir() / matches[0]
    if matches:
        raise UserError(f"{len(matches)} prepared data sets begin with {name!r}; give one name: {', '.join(matches)}")
    raise UserError(f"no prepared data set {name!r}{did_you_mean(name, known)}; known: {', '.join(known) or 'none'}")
