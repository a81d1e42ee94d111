"""Join rows into documents, for corpora whose rows are sentences or lines."""

import re
from collections.abc import Callable, Iterable, Iterator

SENTENCE_DOCUMENT_CHARS = 20_000
"""About 4,500 tokens: more than twice the longest context of any preset, so that few sequences cross a boundary."""
# WikiText-103 marks the title of an article with one "=" on either side, and section titles with more.
_TITLE = re.compile(r"\s*= [^=].*[^=] =\s*|\s*= [^=\s] =\s*")


def join_sentences(rows: Iterable[str]) -> Iterator[str]:
    """Consecutive sentences, one per line, up to about SENTENCE_DOCUMENT_CHARS. Book boundaries are not known."""
    sentences: list[str] = []
    size = 0
    for row in rows:
        if sentence := row.strip():
            sentences.append(sentence)
            size += len(sentence) + 1
        if size >= SENTENCE_DOCUMENT_CHARS:
            yield "\n".join(sentences)
            sentences, size = [], 0
    if sentences:
        yield "\n".join(sentences)


def join_articles(rows: Iterable[str]) -> Iterator[str]:
    """Lines up to the next article title. Source: the layout of WikiText-103, raw."""
    lines: list[str] = []
    for row in rows:
        if _TITLE.fullmatch(row) and any(line.strip() for line in lines):
            yield "".join(lines)
            lines = []
        lines.append(row if row.endswith("\n") else row + "\n")
    if any(line.strip() for line in lines):
        yield "".join(lines)


GROUPINGS: dict[str, Callable[[Iterable[str]], Iterator[str]]] = {
    "rows": iter, "sentences": join_sentences, "articles": join_articles,
}  # fmt: skip
"""The rows of a file in order, and the documents that they make."""
SPLITTABLE = ("rows", "sentences")
"""Groupings for which documents may begin at any row, so that several processes can read parts of a file."""
