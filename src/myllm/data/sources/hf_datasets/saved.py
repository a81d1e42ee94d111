"""A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

Source: the layout that datasets 5 writes: `state.json` lists the arrow files of a data set in order, and
`dataset_dict.json` the splits, each in a folder of its name.
"""

from pathlib import Path

from myllm.data.sources.hub_listing import RemoteFile
from myllm.data.sources.text_column import column_types
from myllm.errors import UserError
from myllm.files import read_json

from .listing import DatasetListing
from .name import DatasetName, choose_split

STATE, SPLITS = "state.json", "dataset_dict.json"


def list_saved(name: DatasetName) -> DatasetListing | None:
    """The files of a split; None if the folder was not written by `save_to_disk`.

    Raises:
        UserError: an unknown split, or a damaged folder.
    """
    folder = name.path
    if folder is None or not ((folder / STATE).is_file() or (folder / SPLITS).is_file()):
        return None
    if len(name.words) > 1 and name.words[0]:
        raise UserError(f"{name}: a folder of save_to_disk has no configurations; name the split alone")
    try:
        if (folder / SPLITS).is_file():
            splits = [str(name) for name in read_json(folder / SPLITS)["splits"]]
            split = choose_split(name, "", name.words[-1] if name.words else "", splits, [])
            folder /= split
        else:
            own = [str(read_json(folder / STATE).get("_split") or "train")]
            split = choose_split(name, "", name.words[-1] if name.words else "", own, [])
        names = [str(file["filename"]) for file in read_json(folder / STATE)["_data_files"]]
        columns = _columns(folder / names[0]) if names else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a complete folder of save_to_disk: {error}; save it again") from None
    files = [RemoteFile(name, str(folder / name), 0, "") for name in names]
    return DatasetListing("", split, "arrow", {}, columns, files)


def _columns(file: Path) -> dict[str, str]:
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(file)) as stream:
            return dict(column_types(pyarrow.ipc.open_stream(stream).schema))
    except pyarrow.ArrowException:  # the preparation names it
        return {}
