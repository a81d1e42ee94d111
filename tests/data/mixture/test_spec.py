"""How mixtures are written: what is one, what it means, and what is said about mistakes."""

from fractions import Fraction

import pytest

from myllm.config import DataConfig
from myllm.data.mixture.spec import component_configs, find_mixture, parse_mixture
from myllm.errors import UserError


@pytest.mark.parametrize(
    "text",
    [
        "python-stdlib", "c4:en", "dolma:v1_6", "hub:roneneldan/TinyStories:*.txt", "files:/my texts/of 2024",
        "files-a", "datasets:ns/name:config:train",
    ],
)  # fmt: skip
def test_single_source_is_not_mixture(text: str) -> None:
    assert parse_mixture(text) is None


def test_weight_follows_last_colon() -> None:
    mixture = parse_mixture("fineweb-edu-10bt:0.7 files:/code:0.2 datasets:ns/name:2024:train:.1")
    assert mixture is not None
    assert mixture.names == ("fineweb-edu-10bt", "files:/code", "datasets:ns/name:2024:train")
    assert [stage.weights for stage in mixture.stages] == [(Fraction(7, 10), Fraction(1, 5), Fraction(1, 10))]


def test_stages_include_all_components() -> None:
    mixture = parse_mixture("A:0.7 B:0.3 @18000 C:0.6 A:0.2 B:0.2 @20000 C:1")
    assert mixture is not None
    assert mixture.names == ("A", "B", "C")
    assert [stage.step for stage in mixture.stages] == [0, 18_000, 20_000]
    assert [list(map(float, stage.weights)) for stage in mixture.stages] == [[0.7, 0.3, 0], [0.2, 0.2, 0.6], [0, 0, 1]]


def test_json_form_matches_and_allows_spaces() -> None:
    words = parse_mixture("A:0.7 B:0.3 @18000 A:1/3 C:2/3")
    assert parse_mixture('[["A", 0.7], ["B", 0.3], 18000, ["A", "1/3"], ["C", "2/3"]]') == words
    spaced = parse_mixture('[["files:/my texts", 0.25], ["B", 0.75], 5, ["B", 1]]')
    assert spaced is not None
    assert spaced.names == ("files:/my texts", "B")
    for mixture in (words, spaced):
        assert mixture is not None
        assert parse_mixture(mixture.format()) == mixture
    assert words is not None
    assert words.format(("x", "y", "z")) == "x:0.7 y:0.3 @18000 x:1/3 z:2/3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A:0.7 B:0.2", r"must add up to 1, but 0\.7 \+ 0\.2 = 0\.9"),
        ("A:0.7 B:0.3 @5 A:0.6 C:0.6", r"must add up to 1, but 0\.6 \+ 0\.6 = 1\.2"),
        ("A:0.333 B:0.333 C:0.333", r"= 0\.999 \(fractions work too: 1/3\)"),
        ("A:0.7 B", r"'B' in the mixture .* has no weight; expected NAME:WEIGHT"),
        ("A:0.5 A:0.5", "names a component twice"),
        ("A:0 B:1", "the weight 0 of A .* must be above 0 and at most 1"),
        ("A:1.5 B:0.5", "the weight 1.5 of A .* must be above 0"),
        ("A:1/0 B:1", "the weight '1/0' of A .* is not a number"),
        ("A:0.5 B:0.5 @9 A:1 @9 B:1", "steps of the mixture .* must grow"),
        ("@9 A:0.5 B:0.5", "needs entries NAME:WEIGHT at its start and after each @STEP"),
        ("A:0.5 B:0.5 @9", "needs entries NAME:WEIGHT at its start"),
        ("A:0.99999999 B:0.00000001", "too many digits; use at most six decimals"),
        ('[["A", 0.7], ["B"]]', r'\["B"\] in the mixture .* is not an entry'),
        ('[["A", 0.7], true]', "true in the mixture .* is not an entry"),
        ('[["A", "much"]]', "the weight 'much' of A .* is not a number"),
        ("[0.7", "is not valid JSON"),
    ],
)  # fmt: skip
def test_invalid_mixture_raises(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_mixture(text)


def test_components_prepared_independently() -> None:
    config = DataConfig(source="files:/a:0.5 files:/b:0.5", fallback="python-stdlib", val_tokens=99)
    mixture = find_mixture(config)
    assert mixture is not None
    assert component_configs(config, mixture) == [
        DataConfig(source="files:/a", val_tokens=99), DataConfig(source="files:/b", val_tokens=99),
    ]  # fmt: skip
    named = DataConfig(dataset="A:0.5 B:0.5")
    mixture = find_mixture(named)
    assert mixture is not None
    assert [part.dataset for part in component_configs(named, mixture)] == ["A", "B"]
