"""The command line's help and what its values may be."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from tyro.conf import Positional

from myllm.cli import main as cli
from myllm.cli.launch import parse_args
from myllm.cli.parse import parse_arguments
from myllm.config import RunConfig

SUBCOMMANDS = [name for name in cli.COMMANDS if name not in cli.TAKES_WORDS]


@dataclass(frozen=True)
class Part:
    """A part."""

    count: int | Literal["auto"] = 3
    """How many, in one long sentence that continues
    over a second line."""
    limit: float | None = None


@dataclass(frozen=True)
class Whole:
    """A whole."""

    name: str
    part: Part = dataclasses.field(default_factory=Part)


def parse_whole(*words: str) -> Whole:
    return parse_arguments(Whole, words, "program")


def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str, columns: int = 80) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as end:
        cli.main(list(words))
    assert end.value.code == 0
    return capsys.readouterr().out


def test_values() -> None:
    assert parse_whole("--name", "a b") == Whole("a b")
    assert parse_whole("--name", "None", "--part.count", "auto") == Whole("None", Part("auto"))
    assert parse_whole("--name", "x", "--part.count", "5", "--part.limit", "2") == Whole("x", Part(5, 2.0))
    default = Whole("x", Part(limit=3.5))
    assert parse_arguments(Whole, ["--part.limit", "None"], "program", default) == Whole("x")
    assert parse_arguments(Whole, [], "program", default) == default


@pytest.mark.parametrize("words", [(), ("--name", "x", "--part.count", "many"), ("--name", "x", "--part.limit", "y")])
def test_invalid_values_rejected(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_whole(*words)
    assert end.value.code == 2
    assert capsys.readouterr().err


def test_function_called_with_parsed_arguments() -> None:
    def double(number: Positional[int], plus: int | None = None, path: Path = Path("x")) -> tuple[int, Path]:
        """Double.

        Args:
            number: to double.
            plus: added
                afterwards.
        """
        return 2 * number + (plus or 0), path

    assert parse_arguments(double, ["4", "--plus", "1", "--path", "a/b"], "program") == (9, Path("a/b"))


@pytest.mark.parametrize("name", SUBCOMMANDS)
@pytest.mark.parametrize("columns", [80, 200])
def test_help_names_values_and_fits_width(
    name: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(capsys, monkeypatch, *name.split(), "--help", columns=columns)
    assert "{None}" not in text
    assert max(map(len, text.splitlines())) <= columns
    broken = re.findall(r"[a-z,] {20,}│\n│ +[a-z]\w* ", text) if columns == 200 else []
    assert not broken, "a line ends long before the box does"


LISTED = [group for group in cli.GROUPS if group not in cli.COMMANDS]
"""Groups whose first word alone lists them; `myllm runs` lists runs."""


@pytest.mark.parametrize("words", [[], ["--help"], *([group] for group in LISTED)])
@pytest.mark.parametrize("columns", [60, 80])
def test_command_lists_fit_width(
    words: list[str], columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == (0 if "--help" in words else 2), "help that was asked for is a success"
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns
    expected = [name for name in cli.COMMANDS if words in ([], ["--help"]) or name.startswith(words[0])]
    assert re.findall(r"^  (\S+(?: \S+)?)  ", text, re.MULTILINE) == expected


@pytest.mark.parametrize("group", LISTED)
def test_group_help(group: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(capsys, monkeypatch, group, "--help")
    assert f"usage: myllm {group} COMMAND" in text
    assert "prove-resume" not in text


def test_group_typo_lists_group_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["data", "shwo"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "did you mean 'data show'?" in error
    assert "data verify" in error
    assert "prove-resume" not in error


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1", "1e300"])
@pytest.mark.parametrize("words", [["doctor", "--timeout-s"], ["status", "a-run", "--silent-s"]])
def test_impossible_seconds_are_rejected(words: list[str], seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither waits for ever, nor never, nor overflows."""
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, seconds])
    assert ended.value.code == 2
    assert f"{words[-1]} is {float(seconds)}, but must be above 0" in capsys.readouterr().err


def test_positional_arguments_have_names(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for words, name in ((("data", "prepare"), "SOURCE"), (("sample",), "MODEL"), (("status",), "RUN")):
        assert f"usage: myllm {' '.join(words)} [-h] " in (text := shown(capsys, monkeypatch, *words, "--help"))
        assert name in text.splitlines()[0]


@pytest.mark.parametrize("command", [["plan"], ["preflight"], ["prove-resume"], ["tune"], None])
@pytest.mark.parametrize("columns", [60, 80, 200])
def test_manual_help_layout_fits_width(
    command: list[str] | None, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if command is not None:
        text = shown(capsys, monkeypatch, *command, "--help", columns=columns)
    else:
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit):
            parse_args(["--help"])
        text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns
    if "presets:" in text:
        assert re.search(r"^  lf-llm-269m +The reference run", text, re.MULTILINE)
        assert not re.search(r"^ {1,9}[a-z]\w* [a-z]", text, re.MULTILINE), "a description leaves its column"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_args(["--version"])
    assert end.value.code == 0
    cli.main(["--version"])
    first, second = capsys.readouterr().out.splitlines(keepends=True)
    assert first == second
    assert re.fullmatch(r"myllm \d+\.\d+\.\d+, Python 3\.\d+\.\d+, torch \d+\.\S+\n", second)


def test_prove_resume_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(capsys, monkeypatch, "prove-resume", "--help")
    assert "usage: myllm prove-resume [PRESET]" in text
    assert "Prove that a killed and restarted run matches an uninterrupted one." in text


def test_every_setting_has_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        parse_args(["debug", "--help"])
    text = capsys.readouterr().out
    without = [
        f"{part.name}.{field.name}"
        for part in dataclasses.fields(RunConfig)
        if dataclasses.is_dataclass(part.type)
        for field in dataclasses.fields(part.type)
        for option in [field.metadata.get("option", field.name.replace("_", "-"))]
        if not re.search(rf"--{part.name}\.{option}\b[^│]*?[A-Za-z0-9}}]\s+[^\s(]", text)
    ]
    assert not without
