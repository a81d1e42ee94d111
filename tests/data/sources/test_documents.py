"""Rows of sentences or lines become documents without loss."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.data.sources import documents as grouping
from myllm.data.sources.documents import GROUPINGS, SENTENCE_DOCUMENT_CHARS


def articles(rows: list[str]) -> list[str]:
    return list(GROUPINGS["articles"](rows))


def sentences(rows: list[str]) -> list[str]:
    return list(GROUPINGS["sentences"](rows))


@given(st.lists(st.text(alphabet="ab =\n", max_size=9)))
def test_row_grouping_preserves_rows(rows: list[str]) -> None:
    assert list(GROUPINGS["rows"](rows)) == rows


# -- sentences --------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(alphabet="ab \u2003", max_size=12)), st.integers(1, 30))
def test_sentence_grouping_is_lossless(rows: list[str], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "SENTENCE_DOCUMENT_CHARS", size)
        documents = sentences(rows)
    assert [line for text in documents for line in text.split("\n")] == [row.strip() for row in rows if row.strip()]
    for number, text in enumerate(documents):
        # A document is closed by the sentence that fills it, no later.
        assert len(text) + 1 >= size or number == len(documents) - 1
        assert len(text.rpartition("\n")[0]) < size


def test_sentence_documents_reach_target_length() -> None:
    rng = random.Random(0)
    documents = sentences(["a sentence " * rng.randint(1, 20) + "." for _ in range(3_000)])
    assert len(documents) > 10
    assert all(SENTENCE_DOCUMENT_CHARS <= len(text) + 1 < SENTENCE_DOCUMENT_CHARS + 300 for text in documents[:-1])


def test_long_sentence_is_not_split() -> None:
    long = "x" * (3 * SENTENCE_DOCUMENT_CHARS)
    assert sentences(["a", long, "b"]) == [f"a\n{long}", "b"]
    assert sentences([]) == sentences(["", " \n"]) == []


# -- articles ---------------------------------------------------------------------------------------------------------

WIKITEXT = [
    ["", " = Valkyria Chronicles III = \n", "", " Senjō no Valkyria 3 : <unk> Chronicles = a game . \n", "",
     " = = Gameplay = = \n", "", " It has 2 + 2 = 4 modes . \n", " = = = Modes = = = \n", " None . \n"],
    ["", " = Tower Building of the Little Rock Arsenal = \n", " The Tower Building . \n"],
    [" = M = \n", "", " A letter . \n"],
    [" = = ( equals ) = \n"],
    [" = 1 = 1 = \n", " A sum . \n"],
]  # fmt: skip


def test_article_grouping_preserves_rows() -> None:
    """As parquet stores them: rows end with a newline, except empty ones."""
    rows = [row for article in WIKITEXT for row in article]
    whole = [[row if row.endswith("\n") else f"{row}\n" for row in article] for article in WIKITEXT]
    found = articles(rows)
    assert "".join(found) == "".join(row for article in whole for row in article)
    # The fourth begins as a section does, and empty rows before a title belong to the article before.
    starts = [text.strip().splitlines()[0].strip() for text in found]
    assert starts == [
        "= Valkyria Chronicles III =", "= Tower Building of the Little Rock Arsenal =", "= M =", "= 1 = 1 =",
    ]  # fmt: skip


@pytest.mark.parametrize("title", [" = A = ", " = AB = \n", "= Robert <unk> = \n", " = 1992 = \n", " = C = D = \n"])
def test_title_starts_new_article(title: str) -> None:
    assert len(articles([" = First = \n", " Text . \n", title, " More . \n"])) == 2


@pytest.mark.parametrize(
    "row", [" = = Section = = \n", " = = = Part = = = \n", "", " = \n", " = = \n", " x = y = \n", " a = b \n", "=A=\n"]
)
def test_non_title_does_not_start_article(row: str) -> None:
    assert len(articles([" = First = \n", " Text . \n", row, " More . \n"])) == 1


def test_rows_before_first_title_and_empty_files() -> None:
    assert articles(["The end of an article .\n", " = A = \n"]) == ["The end of an article .\n", " = A = \n"]
    assert articles(["", "", " \n"]) == articles([]) == []


@given(st.lists(st.sampled_from([row for article in WIKITEXT for row in article] + ["=" * 9, " = " * 9])))
def test_article_grouping_is_lossless(rows: list[str]) -> None:
    found = "".join(articles(rows))
    expected = "".join(row if row.endswith("\n") else f"{row}\n" for row in rows)
    assert found == expected or (not found and not expected.strip())


@pytest.mark.parametrize("row", [" " * 10**6, "= " * 10**6, " = a" + " " * 10**6 + "b", "= a" + " =" * 10**6 + " b"])
def test_title_search_takes_linear_time(row: str) -> None:
    assert len(articles([" = First = \n", row, "end"])) == 1
