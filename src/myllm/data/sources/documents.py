"""Rows to documents, for corpora whose rows are sentences or lines."""

import re
from collections.abc import Iterable, Iterator

SENTENCE_DOCUMENT_CHARS = 20_000
"""About 4,500 tokens: more than twice the longest context of any preset, so that few sequences cross a border."""
# WikiText-103 marks an article with one "=" on either side of its title, its sections with more.
_TITLE = re.compile(r"\s*= [^=].*[^=] =\s*|\s*= [^=\s] =\s*")


def group_rows(rows: Iterable[str], group: str) -> Iterator[str]:
    """Documents from the rows of a file: each row one ("rows"), or joined as `group` says."""
    if group == "sentences":
        return join_sentences(rows)
    if group == "articles":
        return join_articles(rows)
    return iter(rows)


def join_sentences(rows: Iterable[str]) -> Iterator[str]:
    """Consecutive sentences, a line each, up to about SENTENCE_DOCUMENT_CHARS: where one book ends is not known."""
    held: list[str] = []
    size = 0
    for row in rows:
        if sentence := row.strip():
            held.append(sentence)
            size += len(sentence) + 1
        if size >= SENTENCE_DOCUMENT_CHARS:
            yield "\n".join(held)
            held, size = [], 0
    if held:
        yield "\n".join(held)


def join_articles(rows: Iterable[str]) -> Iterator[str]:
    """Lines up to the next title of an article. Source: the layout of WikiText-103, raw."""
    held: list[str] = []
    for row in rows:
        if _TITLE.fullmatch(row) and any(line.strip() for line in held):
            yield "".join(held)
            held = []
        held.append(row if row.endswith("\n") else row + "\n")
    if any(line.strip() for line in held):
        yield "".join(held)
