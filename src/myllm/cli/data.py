"""`myllm data COMMAND`: from a source to shards, and looking at them."""

import shlex
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated

import tyro

from myllm.config import DataConfig, RunConfig
from myllm.errors import UserError
from myllm.formatting import format_bytes, format_duration, format_si, format_table, parse_target
from myllm.planning.config_checks import check_data_config
from myllm.planning.own_text import command_for

if TYPE_CHECKING:
    from myllm.data.dataset import Dataset

Positional = tyro.conf.Positional


def list_sources(local: bool = False) -> None:
    """List known data sources and prepared data sets.

    Args:
        local: only the prepared ones, with tokens, size on the disk and the runs that use them.
    """
    from myllm.data.sources.catalog import CORPORA

    from .runs.datasets import describe_datasets

    if local:
        print(describe_datasets())
        return
    rows = [("source", "download", "tokens", "license", "text", "layout")]
    rows += [
        (corpus.name, f"{corpus.download_gb:,g} GB", corpus.tokens, corpus.license, corpus.column, corpus.layout)
        for corpus in CORPORA.values()
    ]
    rows.append(("python-stdlib", "none", "4M", "PSF-2.0", "-", "the .py files of this Python's own library"))
    rows.append(("hub:NAMESPACE/NAME[:GLOB]", "", "", "varies", "text", "any dataset repository of parquet or jsonl"))
    rows.append(("datasets:NAME[:CONFIG][:SPLIT]", "", "", "varies", "text", "whatever datasets.load_dataset opens"))
    rows.append(("files:PATH", "none", "", "yours", "text", "a file, folder or glob: .txt .md .py .jsonl .parquet ..."))
    print(format_table(rows))
    print("\n" + "\n".join(f"{corpus.name}: {corpus.description}; {corpus.location}" for corpus in CORPORA.values()))
    print("\nThe numbers are approximate; `myllm data estimate SOURCE` measures.")
    print(f"\n{describe_datasets()}")


def estimate(
    source: Positional[str],
    target: str | None = None,
    tokenizer: str = DataConfig.tokenizer,
    text_column: str | None = None,
    suffix: tuple[str, ...] = (),
    workers: int = 0,
) -> None:
    """Estimate a source's tokens, disk space and hours from a sample.

    Args:
        source: as for `myllm data prepare`.
        target: estimate this much of it, for example 10GB of text or 10BT tokens (default: all).
        tokenizer: r50k_base, or the path of a tokenizer.json.
        text_column: None: the source's own.
        suffix: also read local files with these suffixes as plain text.
        workers: processes that would tokenize; 0: one per core.
    """
    from myllm.data.prepare.estimate import estimate as estimate_source
    from myllm.data.prepare.spec import make_spec
    from myllm.distributed.cpu_threads import usable_cores

    config = DataConfig(source=source, tokenizer=tokenizer, text_column=text_column, suffixes=suffix)
    spec = make_spec(config, hashed=False)
    found = estimate_source(spec, workers or usable_cores(), parse_target(target) if target else None)
    remote = any(file.remote for file in spec.source.files)
    print(f"{spec.source.description}: {len(spec.source.files):,} files, {format_bytes(spec.source.size_bytes)}")
    if note := spec.source.ignored_note:
        print(note)
    print(f"sample: {found.sampled_documents:,} documents of {found.sampled_from}\n")
    if found.fraction > 1:
        print(f"the target is {found.fraction:,.1f} times the source: training would take more than one epoch\n")
    duration = format_duration(max(3600 * found.hours, 1))
    processes = f"{found.workers} process{'es' if found.workers > 1 else ''}"
    for name, figure in (
        ("documents", format_si(found.documents)),
        ("text", format_bytes(found.text_bytes)),
        ("tokens", format_si(found.tokens)),
        ("tokens per byte", format_si(found.tokens / found.text_bytes)),
        ("to download" if remote else "to read", format_bytes(found.download_bytes)),
        ("shards on disk", format_bytes(found.shard_bytes)),
        ("tokenizing", f"{duration}, with {processes} at the speed of this machine"),
    ):
        print(f"  {name:<15}  {figure}")


@dataclass(frozen=True)
class PrepareArgs(DataConfig):
    """DataConfig's settings as the options of `myllm data prepare`."""

    source: Positional[str] = tyro.MISSING
    """A name of `myllm data list`, hub:NAMESPACE/NAME[:GLOB], datasets:NAME[:CONFIG][:SPLIT], or files:PATH."""
    dataset: tyro.conf.Suppress[None] = None
    shard: str | None = None
    """For example 3/16: tokenize one of 16 worker shards, each on its own machine. `myllm data merge` joins them."""


def prepare(args: Annotated[PrepareArgs, tyro.conf.arg(name="")]) -> None:
    """Download and tokenize a source into shards.

    Run the same command again to continue an interrupted preparation.

    Args:
        args: options.
    """
    from myllm.data.mixture.mixed_dataset import MixedDataset
    from myllm.data.prepare.multi_machine import prepare_worker_shard
    from myllm.data.prepare.prepare import prepare as prepare_dataset

    config = DataConfig(**{field.name: getattr(args, field.name) for field in fields(DataConfig)})
    check_data_config(RunConfig(data=config))
    if args.shard is None:
        dataset = prepare_dataset(config)
        if isinstance(dataset, MixedDataset):
            for component in dataset.components:
                _print_dataset(component)
            words = f"--data.dataset {shlex.quote(dataset.name)} --name NAME"
            print(f"train on the mixture with: python pretrain.py PRESET {words}")
        else:
            _print_dataset(dataset)
        return
    folder = prepare_worker_shard(config, args.shard)
    print(f"worker shard {args.shard} is complete: {folder}")
    print(f"merge all worker shards with: myllm data merge {folder.parent.parent.name}")


def merge(name: Positional[str], workers: int = 0) -> None:
    """Merge worker shards prepared on several machines into one data set.

    Args:
        name: the data set's folder under temp_data/datasets, or the start of its name.
        workers: processes; 0: one per core.
    """
    from myllm.data.dataset import SETTINGS
    from myllm.data.find import find_dataset_folder
    from myllm.data.prepare.multi_machine import merge_worker_shards

    _print_dataset(merge_worker_shards(find_dataset_folder(name, (SETTINGS,)), workers))


def verify(name: Positional[str], repair: bool = False, workers: int = 0) -> None:
    """Check every shard of a data set against its manifest.

    Args:
        name: under temp_data/datasets, or a folder.
        repair: rebuild damaged and missing shards from the source.
        workers: processes that repair; 0: one per core.
    """
    from myllm.data.dataset import Dataset
    from myllm.data.find import find_dataset_folder
    from myllm.data.prepare.repair import repair as repair_shards

    dataset = Dataset.read(find_dataset_folder(name))
    damaged = dataset.damaged()
    if damaged and not repair:
        raise UserError(
            f"{dataset.folder} is damaged: {', '.join(damaged)}; `myllm data verify {dataset.name} --repair` "
            "rebuilds them from the source"
        )
    if damaged:
        print(f"damaged: {', '.join(damaged)}; rebuilding")
        repair_shards(dataset, damaged, workers)
    dataset.tokenizer()  # raises if the vocabulary is missing or another one
    print(f"{dataset.folder}: all {len(dataset.shards)} shards match the manifest")


def show(
    name: Positional[str],
    document: int | None = None,
    sequence: int | None = None,
    split: str = "train",
    seq_len: int = 2_048,
    train_seed: int | None = None,
) -> None:
    """Print a document or training sequence of a data set as text.

    Args:
        name: a data set under temp_data/datasets, or a folder.
        document: number of the document, from 0.
        sequence: number of the sequence, from 0.
        split: train or val.
        seq_len: tokens per sequence, as model.max_seq_len.
        train_seed: number sequences in the order of a run with this train.seed (default: in stored order).
    """
    from myllm.data.find import find_dataset
    from myllm.data.inspect import describe_tokens, document_at, sequence_at

    if (document is None) == (sequence is None):
        raise UserError("give --document N or --sequence N")
    number = document if document is not None else sequence
    if split not in ("train", "val") or number is None or number < 0 or seq_len < 1:
        raise UserError(f"expected --split train or val, numbers from 0; found {split!r}, {number}, {seq_len}")
    dataset = find_dataset(name, allow_incomplete=True)
    if document is not None:
        start, tokens = document_at(dataset, split, document)
        print(f"{dataset.name}, {split} document {document:,}: {len(tokens) - 1:,} tokens, at token {start:,}\n")
    else:
        start, tokens = sequence_at(dataset, split, number, seq_len, train_seed)
        print(f"{dataset.name}, {split} sequence {number:,}: tokens {start:,} to {start + seq_len:,}\n")
    print(describe_tokens(dataset, tokens))


def _print_dataset(dataset: "Dataset") -> None:
    from myllm.data.inspect import PASSED_OVER, describe_skipped

    counts = dataset.manifest["counts"]
    print(f"{dataset.folder}")
    for split in ("train", "val"):
        tokens, documents = counts[f"{split}_tokens"], counts[f"{split}_documents"]
        print(f"  {split:<5}  {tokens:>15,} tokens  {documents:>11,} documents")
    if counts.get("documents_split"):  # older data sets have none
        print("         few or long documents: val has the end of the longest document, train has the rest of it")
    wanted = dataset.manifest["val_tokens"]
    if counts["val_tokens"] < 0.9 * wanted and wanted != DataConfig.val_tokens:
        print(f"         val has less than --val-tokens {wanted:,}: at most a tenth of the text is held out")
    for count, reason in describe_skipped(dataset):
        print(f"  {count:>13,} x {reason}")
    if (listed := dataset.folder / PASSED_OVER).exists():
        print(f"  skipped documents are listed in {listed}")
    size = dataset.manifest["tokenizer"]["vocab_size"]
    command, line = command_for(dataset.name, counts["train_tokens"], size)
    print(f"{line}. Train on it with:")
    print(f"  {command} --dry-run    # time and memory on this machine")
    print(f"  {command}")
