"""`myllm data COMMAND`: from a source to shards, and looking at them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from myllm.config import DataConfig, RunConfig
from myllm.errors import UserError
from myllm.formatting import format_bytes, format_si, parse_count, parse_target
from myllm.planning.validation import check_data_config

if TYPE_CHECKING:
    from myllm.data.dataset import Dataset

Positional = tyro.conf.Positional


def list_sources() -> None:
    """List known data sources and prepared data sets."""
    from myllm.data.sources.catalog import CORPORA

    rows = [("source", "download", "tokens", "license", "text", "layout")]
    rows += [
        (each.name, f"{each.download_gb:,g} GB", each.tokens, each.license, each.column, each.layout)
        for each in CORPORA.values()
    ]
    rows.append(("python-stdlib", "none", "4M", "PSF-2.0", "-", "the .py files of this Python's own library"))
    rows.append(("hub:NAMESPACE/NAME[:GLOB]", "", "", "its own", "text", "any dataset repository of parquet or jsonl"))
    rows.append(("files:PATH", "none", "", "yours", "text", "a file, folder or glob: .txt .md .py .jsonl .parquet ..."))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\n" + "\n".join(f"{each.name}: {each.description}; {each.location}" for each in CORPORA.values()))
    print("\nFigures are approximate; `myllm data estimate SOURCE` measures.")
    _list_prepared()


def _list_prepared() -> None:
    """The data sets under temp_data/datasets, and how far each is."""
    from myllm import paths
    from myllm.data.dataset import MANIFEST, PROGRESS, SETTINGS, Dataset

    folders = sorted(path.parent for path in paths.datasets_dir().glob(f"[!.]*/{SETTINGS}"))
    print(
        f"\nprepared, under {paths.datasets_dir()}:"
        if folders
        else f"\nnothing is prepared under {paths.datasets_dir()} yet"
    )
    for folder in folders:
        if not any((folder / name).exists() for name in (MANIFEST, PROGRESS)):
            print(f"  {folder.name}  begun; the same command goes on")
            continue
        try:
            dataset = Dataset.open(folder, unfinished=True)
        except UserError as error:
            print(f"  {folder.name}  {error}")
            continue
        state = "" if dataset.complete else "  not whole yet: the same command goes on"
        print(f"  {folder.name}  {dataset.train.tokens:,} tokens to train on{state}")


def estimate(
    source: Positional[str],
    target: str | None = None,
    documents: int | None = None,
    tokenizer: str = "r50k_base",
    text_column: str | None = None,
    workers: int = 0,
) -> None:
    """Estimate a source's tokens, disk space and hours from a sample.

    Args:
        source: as for `myllm data prepare`.
        target: of how much: 10GB (of text) or 10BT (tokens); None: all of it.
        documents: of how many documents, instead of target.
        tokenizer: r50k_base, or the path of a tokenizer.json.
        text_column: None: the source's own.
        workers: processes to reckon with; 0: one a core.
    """
    from myllm.data.prepare.estimate import estimate as measure
    from myllm.data.prepare.spec import make_spec
    from myllm.distributed.cpu_threads import usable_cores

    if target is not None and documents is not None:
        raise UserError("--target and --documents both say how much; give one")
    if documents is not None and documents < 1:
        raise UserError(f"--documents is {documents}, but must be at least 1")
    wanted = ("documents", float(documents)) if documents else parse_target(target) if target else None
    recipe = make_spec(DataConfig(source=source, tokenizer=tokenizer, text_column=text_column), hashed=False)
    found = measure(recipe, workers or usable_cores(), wanted)
    many = f"{found.workers} process{'es' if found.workers > 1 else ''}"
    remote = any(file.remote for file in recipe.source.files)
    print(f"{recipe.source.description}: {len(recipe.source.files):,} files, {format_bytes(recipe.source.size_bytes)}")
    if note := recipe.source.ignored_note:
        print(note)
    print(f"sample: {found.sampled_documents:,} documents of {found.sampled_from}\n")
    if found.share > 1:
        print(f"that is {found.share:,.1f} times what the source holds: training would go through it more than once\n")
    for name, figure, write in (
        ("documents", found.documents, format_si),
        ("text", found.text_bytes, format_bytes),
        ("tokens", found.tokens, format_si),
        ("tokens a byte", found.tokens_per_byte, format_si),
        ("to download" if remote else "to read", found.download_bytes, format_bytes),
        ("shards on disk", found.shard_bytes, format_bytes),
    ):
        error = figure.error / figure.value if figure.value else 1.0
        print(f"  {name:<15} {write(figure.value):>11} +- {error:.1%}")
    hours, error = found.hours.value, found.hours.error / found.hours.value
    took = f"{hours:.3g} h" if hours >= 1 else f"{hours * 60:.3g} min"
    print(f"  {'tokenising':<15} {took:>11} +- {error:.1%}, with {many} at the speed of this machine")
    print("\n+- is half a 95 % interval from the sample alone: other files of the source may differ more.")


@dataclass(frozen=True)
class PrepareOptions:
    """Options of `myllm data prepare`: DataConfig's, as one writes them by hand, with its defaults."""

    tokenizer: str = DataConfig.tokenizer
    """r50k_base, or the path of a tokenizer.json."""
    text_column: str | None = DataConfig.text_column
    """Column or key that holds the text; None: the source's own."""
    val_tokens: str = f"{DataConfig.val_tokens // 10**6}M"
    """Held out for validation: whole documents, at most so many tokens and at most a tenth of the text."""
    target_tokens: str | None = None
    """Stop after this many training tokens, such as 10BT or 500M; None: all there are."""
    limit: int | None = DataConfig.max_documents
    """Stop after this many documents; None: all there are."""
    shard_tokens: str = f"{DataConfig.shard_tokens // 10**6}M"
    """Tokens a shard file."""
    max_file_size_mb: int = 512
    """A shard file is never larger, whatever shard_tokens says."""
    shuffle_files: bool = DataConfig.shuffle_files
    """Take files, and the parts of a large one, in a seeded order."""
    seed: int = DataConfig.shuffle_seed
    """Of that order."""
    normalize_unicode: bool = DataConfig.normalize_unicode
    """Bring every text to Unicode's form NFC."""
    strip_control: bool = DataConfig.strip_control
    """Remove control characters but tab, newline and carriage return."""
    min_chars: int = DataConfig.min_chars
    """Drop shorter documents."""
    dedup_exact: bool = DataConfig.dedup_exact
    """Keep the first of several documents with the same tokens."""
    part: str | None = None
    """Such as 3/16: tokenise one of several parts only, each on its own machine; `myllm data seal` joins."""
    fallback: str | None = DataConfig.fallback
    """Take this source without asking if the other cannot be reached."""
    keep_downloads: bool = DataConfig.keep_downloads
    """Keep downloaded files under temp_data/downloads."""
    workers: int = DataConfig.workers
    """Processes that tokenise; 0: one a core. Never changes the bytes."""

    def config(self, source: str) -> DataConfig:
        """
        Raises:
            UserError: a setting that cannot be.
        """
        if self.max_file_size_mb < 1:
            raise UserError(f"--max-file-size-mb is {self.max_file_size_mb}, but must be at least 1")
        most = (self.max_file_size_mb * 10**6 - 128) // 2  # a header of 128 bytes, two bytes a token
        config = DataConfig(
            source=source, tokenizer=self.tokenizer, text_column=self.text_column,
            val_tokens=parse_count(self.val_tokens, "--val-tokens"),
            target_tokens=parse_count(self.target_tokens, "--target-tokens") if self.target_tokens else None,
            max_documents=self.limit, shard_tokens=min(parse_count(self.shard_tokens, "--shard-tokens"), most),
            shuffle_files=self.shuffle_files, shuffle_seed=self.seed, normalize_unicode=self.normalize_unicode,
            strip_control=self.strip_control, min_chars=self.min_chars, dedup_exact=self.dedup_exact,
            fallback=self.fallback, keep_downloads=self.keep_downloads, workers=self.workers,
        )  # fmt: skip
        check_data_config(RunConfig(data=config))
        return config


def prepare(source: Positional[str], options: Annotated[PrepareOptions, tyro.conf.arg(name="")]) -> None:
    """Download and tokenize a source into shards.

    The same command goes on where an interrupted one stopped.

    Args:
        source: a name of `myllm data list`, hub:NAMESPACE/NAME[:GLOB], or files:PATH for a file, folder or glob.
        options: of the preparation.
    """
    from myllm.data.prepare.multi_machine import prepare_worker_shard
    from myllm.data.prepare.prepare import prepare as make

    config = options.config(source)
    if options.part is None:
        _say_made(make(config))
        return
    folder = prepare_worker_shard(config, options.part)
    print(f"part {options.part} is done: {folder}")
    print(f"join them all with: myllm data seal {folder.parent.parent.name}")


def seal(name: Positional[str], workers: int = 0) -> None:
    """Merge parts prepared on several machines into one data set.

    Args:
        name: the data set's folder under temp_data/datasets, or the start of its name.
        workers: processes; 0: one a core.
    """
    from myllm.data.dataset import SETTINGS, find_dataset_folder
    from myllm.data.prepare.multi_machine import merge_worker_shards as join

    _say_made(join(find_dataset_folder(name, (SETTINGS,)), workers))


def verify(name: Positional[str], repair: bool = False, workers: int = 0) -> None:
    """Check every shard of a data set against its manifest.

    Args:
        name: under temp_data/datasets, or a folder.
        repair: make damaged and missing shards again from the source, and nothing else.
        workers: processes that repair; 0: one a core.
    """
    from myllm.data.dataset import Dataset, find_dataset_folder
    from myllm.data.prepare.repair import repair as mend

    dataset = Dataset.read(find_dataset_folder(name))
    damaged = dataset.damaged()
    if damaged and not repair:
        raise UserError(
            f"{dataset.folder} is damaged: {', '.join(damaged)}; `myllm data verify {dataset.name} --repair` makes "
            "them again from the source"
        )
    if damaged:
        print(f"damaged: {', '.join(damaged)}; making them again")
        mend(dataset, damaged, workers)
    dataset.tokenizer()  # no shard is worth much without the vocabulary that made it
    print(f"{dataset.folder}: {len(dataset.shards)} shards, all as the manifest says")


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
        document: its number, from 0.
        sequence: its number, from 0.
        split: train or val.
        seq_len: tokens a sequence, as model.max_seq_len.
        train_seed: count sequences in the order in which a run with this train.seed takes them; None: as they lie.
    """
    from myllm.data.dataset import find_dataset
    from myllm.data.inspect import describe_tokens, document_at, sequence_at

    if (document is None) == (sequence is None):
        raise UserError("give --document N or --sequence N, one of them")
    number = document if document is not None else sequence
    if split not in ("train", "val") or number is None or number < 0 or seq_len < 1:
        raise UserError(f"expected --split train or val, numbers from 0; found {split!r}, {number}, {seq_len}")
    dataset = find_dataset(name, unfinished=True)
    if document is not None:
        start, tokens = document_at(dataset, split, document)
        print(f"{dataset.name}, {split} document {document:,}: {len(tokens) - 1:,} tokens, at token {start:,}\n")
    else:
        start, tokens = sequence_at(dataset, split, number, seq_len, train_seed)
        print(f"{dataset.name}, {split} sequence {number:,}: tokens {start:,} to {start + seq_len:,}\n")
    print(describe_tokens(dataset, tokens))


def _say_made(dataset: "Dataset") -> None:
    counts = dataset.manifest["counts"]
    print(f"{dataset.folder}")
    for split in ("train", "val"):
        tokens, documents = counts[f"{split}_tokens"], counts[f"{split}_documents"]
        print(f"  {split:<5}  {tokens:>15,} tokens  {documents:>11,} documents")
    if counts.get("documents_split"):  # older data sets have none
        print("         too few documents to hold out whole ones alone: val has the end of the longest, train the rest")
    others = {name: counts[name] for name in ("copies_of_validation_dropped", "duplicates_dropped") if counts[name]}
    for reason, count in {**others, **counts["passed_over"]}.items():
        print(f"  {count:>13,} x {reason.replace('_', ' ')}")
    if (dataset.folder / "passed_over.jsonl").exists():
        print(f"  what was passed over, by name: {dataset.folder / 'passed_over.jsonl'}")
    size = dataset.manifest["tokenizer"]["vocab_size"]
    vocabulary = "" if dataset.manifest["tokenizer"]["kind"] == "tiktoken" else f" --model.vocab-size {size}"
    print(f"train on it with: python pretrain.py PRESET --data.dataset {dataset.name}{vocabulary}")
