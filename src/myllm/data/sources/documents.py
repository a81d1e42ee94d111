"""Rows to documents, for corpora whose rows are sentences or lines."""

import re
from collections.abc import Iterable, Iterator

SENTENCE_DOCUMENT_CHARS = 20_000
"""About 4,500 tokens: more than twice the longest context of any preset, so that few sequences cross a boundary."""
# WikiText-103 marks the title of an article with one "=" on either side, and section titles with more.
_TITLE = re.compile(r"\s*= [^=].*[^=] =\s*|\s*= [^=\s] =\s*")


def group_rows(rows: Iterable[str], grouping: str) -> Iterator[str]:
    """
    Args:
        grouping: "rows" (each row is a document), "sentences" or "articles".
    """
    if grouping == "sentences":
        return join_sentences(rows)
    if grouping == "articles":
        return join_articles(rows)
    return iter(rows)


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
