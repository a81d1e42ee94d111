"""The public corpora that are known by name: location, content and license.

Sizes and counts are approximate, and publishers count tokens in different ways; `myllm data estimate` measures.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Corpus:
    """A public corpus: where it is, and how large."""

    name: str
    description: str
    repo: str
    """Dataset repository on the Hub."""
    license: str
    download_gb: float
    tokens: str
    """Approximate count, as text."""
    layout: str
    """Kind and number of files, as text."""
    pattern: str = ""
    """Glob of the files in the repository."""
    revision: str | None = None
    """A commit that was tested. None: the newest, pinned by the first listing."""
    url_list: str = ""
    """Instead of `pattern`: a file of the repository that lists URLs, one per line; {} is the variant."""
    variants: tuple[str, ...] = ()
    """The first is the default."""
    column: str = "text"
    """Of a row's text, or a template of several columns such as "{title}\\n{text}" (text_column.py)."""
    grouping: str = "rows"
    """Key of documents.GROUPINGS."""

    @property
    def location(self) -> str:
        """Repository and files, as text."""
        return f"{self.repo}, {self.pattern or self.url_list.format(self.variants[0])}"


_ALL = (
    Corpus(
        # Source: the dataset's card, and the tree of that revision.
        name="fineweb-edu-10bt", description="educational web pages, a 10B token sample of FineWeb-Edu",
        repo="HuggingFaceFW/fineweb-edu", revision="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        pattern="sample/10BT/*.parquet", license="ODC-By 1.0", download_gb=28.5, tokens="10B",
        layout="14 parquet files of up to 2.2 GB, 9.7M documents",
    ),
    Corpus(
        name="fineweb-10bt", description="web pages, a 10B token sample of FineWeb", repo="HuggingFaceFW/fineweb",
        pattern="sample/10BT/*.parquet", license="ODC-By 1.0", download_gb=30.6, tokens="10B",
        layout="15 parquet files of up to 2.2 GB",
    ),
    Corpus(
        # Source: allenai/dolma, urls/v1_6-sample.txt.
        name="dolma-sample", description="web, papers, books, code and encyclopedias: a sample of Dolma 1.6",
        repo="allenai/dolma", url_list="urls/{}.txt", variants=("v1_6-sample",), license="ODC-By 1.0",
        download_gb=16.4, tokens="10B", layout="103 .json.gz",
    ),
    Corpus(
        name="dolma", description="all of Dolma: 4.5 TB, use --target-tokens", repo="allenai/dolma",
        url_list="urls/{}.txt", variants=("v1_7", "v1_6", "v1_5", "v1_6-sample", "v1_5-sample"),
        license="ODC-By 1.0", download_gb=4_500, tokens="2,300B", layout="2,419 .json.gz; dolma:v1_6 and others",
    ),
    Corpus(
        name="c4", description="web pages of April 2019, cleaned, English: the Colossal Clean Crawled Corpus",
        repo="allenai/c4", pattern="en/c4-train.*.json.gz", license="ODC-By 1.0", download_gb=325, tokens="160B",
        layout="1,024 .json.gz of 318 MB, 365M documents; 60 hold 10B tokens",
    ),
    Corpus(
        # A mirror: the original repository is a script that `datasets` no longer runs.
        name="bookcorpus", description="unpublished novels, as sentences in lower case, joined here into documents",
        repo="SamuelYang/bookcorpus", pattern="*.arrow", license="unknown", download_gb=4.8, tokens="1B words",
        layout="one .arrow, 74M sentences", grouping="sentences",
    ),
    Corpus(
        name="tinystories", description="short stories in a small child's words, written by GPT-3.5 and GPT-4",
        repo="roneneldan/TinyStories", pattern="data/train-*.parquet", license="CDLA-Sharing 1.0", download_gb=1.0,
        tokens="0.47B", layout="4 parquet files, 2.1M stories",
    ),
    Corpus(
        name="wikitext-103", description="good and featured articles of Wikipedia, joined here from lines",
        repo="Salesforce/wikitext", pattern="wikitext-103-raw-v1/train-*.parquet", license="CC BY-SA 3.0",
        download_gb=0.31, tokens="0.12B", layout="2 parquet files, one line per row, 29K articles", grouping="articles",
    ),
)  # fmt: skip
CORPORA = {corpus.name: corpus for corpus in _ALL}


def find_corpus(source: str) -> Corpus | None:
    """The corpus that a source such as `dolma:v1_6` names; None for files, other repositories and unknown names."""
    return CORPORA.get(source.partition(":")[0])


def actual_source(source: str, dataset: str | None, recorded: str | None = None) -> str:
    """The source that a run was trained on.

    Runs given a data set by name used to keep their preset's source in config.json. If that contradicts the data set,
    the data set is right.

    Args:
        source: `data.source` of the run's config.
        dataset: `data.dataset` of the run's config.
        recorded: the source's name in the data set's manifest, if the run recorded it.

    Returns:
        `source`, or only the name of another source: of a known corpus, or one that matches no public name.
    """
    if recorded and " " in recorded:  # of a mixture
        return recorded
    kind, _, rest = source.partition(":")
    name, is_corpus = source.replace(":", "-"), kind not in ("files", "hub", "datasets")
    if recorded:
        repository = re.split("[@:]", rest)[0].replace("/", "-") if kind == "hub" else ""
        matches = recorded == name if is_corpus else recorded.startswith(f"{kind}-{repository}"[:40])
        return source if matches else recorded
    if dataset is None or not is_corpus:
        return source
    folder = re.sub(r"-[0-9a-f]{12}$", "", dataset.rstrip("/").rpartition("/")[2])
    return source if folder == name else folder
