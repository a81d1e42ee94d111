"""`myllm sample` and `myllm chat`: files, text while it is generated, and the two functions of the package."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from support import warm_start
from support.saved_checkpoints import save_weights

import myllm
from myllm.cli.main import main as run_command
from myllm.config import ModelConfig
from myllm.data.tokenizer.load import load_tokenizer
from myllm.errors import UserError
from myllm.inference.completion import Completion, complete, generate
from myllm.inference.load import LanguageModel
from myllm.inference.samples import OrderedPrinter, read_prompts
from myllm.inference.sampling_params import SamplingParams
from myllm.model.transformer import Transformer

CONFIG = ModelConfig(max_seq_len=32, d_model=16, n_layers=1, n_heads=2, d_ff=32)


@pytest.fixture(scope="module")
def pair() -> LanguageModel:
    return LanguageModel(Transformer(CONFIG).eval(), load_tokenizer())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temp_data/ with an untrained run `tiny`."""
    folder = tmp_path_factory.mktemp("completion")
    save_weights(folder / "runs/tiny/checkpoints", Transformer(CONFIG))
    return folder


def command(data: Path, *words: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    done = warm_start.run("-m", "myllm", *words, env=os.environ | {"MYLLM_DATA": str(data)}, stdin=stdin)
    assert "Traceback" not in done.stderr
    return done


# -- the package ------------------------------------------------------------------------------------------------------


def test_readme_example(data: Path) -> None:
    code = re.search(r"```python\n(from myllm import.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len(code.split("\n")) == 4  # two lines, the formatter's blank one, and the end
    done = subprocess.run(
        [sys.executable, "-c", code.replace('"debug"', '"tiny"')], env=os.environ | {"MYLLM_DATA": str(data)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")
    assert len(done.stdout) > 50


def test_package_import_does_not_load_torch() -> None:
    code = "import sys, myllm; print('torch' in sys.modules); print(myllm.load_model, hasattr(myllm, 'other'))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.startswith("False\n<function load_model")
    assert output.endswith("False\n")
    assert myllm.generate is generate


# -- the command ------------------------------------------------------------------------------------------------------


def test_unusual_line_separators_in_prompts(tmp_path: Path) -> None:
    """Form feeds of old sources, NEL and U+2028 of web pages; and lines that our own --format jsonl wrote."""
    odd = ["page\x0ctwo", "next\x85line", "sep\u2028arated", "last"]
    (tmp_path / "p.txt").write_bytes("\r\n".join(odd).encode())
    assert read_prompts(tmp_path / "p.txt") == odd
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in odd]
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read_prompts(tmp_path / "p.jsonl") == odd
    (tmp_path / "p.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r'line 1 of .*: expected an object with a string "prompt"'):
        read_prompts(tmp_path / "p.jsonl")


def test_json_and_jsonl_records(data: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the river"}\n\n{"prompt": "two\\nlines é", "other": 1}\n', encoding="utf-8")
    words = ("sample", "tiny", "--prompts-file", prompts, "--num-samples", "2", "--max-new-tokens", "4", "--seed", "7")
    done = command(data, *words, "--format", "jsonl", "--stop", "never", "there")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        ("the river", 7), ("the river", 8), ("two\nlines é", 7), ("two\nlines é", 8),
    ]  # fmt: skip
    assert rows[0]["finish_reason"] == "length"
    assert rows[0]["tokens"] == 4
    assert rows[0]["settings"]["temperature"] == 0.8
    assert rows[0]["settings"]["stop"] == ["never", "there"]
    out = tmp_path / "made.json"
    assert command(data, *words, "--format", "json", "--out", out, "--stop", "never", "there").stdout == ""
    assert json.loads(out.read_text(encoding="utf-8")) == rows


def test_ordered_printer() -> None:
    file = io.StringIO()
    turns = OrderedPrinter(["A", "B", "C"], file)
    expected = []

    def completions() -> Iterator[Completion]:
        done = Completion("", "", 0, "length", 0)
        for number, text in ((0, "a"), (1, "x"), (2, "u"), (0, "b")):
            turns.add_text(number, text)
        expected.append(("--- 1\nAab", file.getvalue()))  # the first as it comes, and nothing of the others
        yield done
        expected.append(("--- 1\nAab\n--- 2\nBx", file.getvalue()))  # what the second had, at once
        turns.add_text(1, "y")
        turns.add_text(2, "v")
        expected.append(("--- 1\nAab\n--- 2\nBxy", file.getvalue()))
        yield done
        yield done

    turns.print_all(completions())
    assert file.getvalue() == "--- 1\nAab\n--- 2\nBxy\n--- 3\nCuv\n"
    assert [seen for _, seen in expected] == [target for target, _ in expected]


@pytest.mark.parametrize("form", ["text", "jsonl"])
def test_output_streamed(data: Path, pair: LanguageModel, tmp_path: Path, form: str) -> None:
    """Two samples; the first ends at a stop string, the second would take hours."""
    (first,) = complete(pair, ["the river"], 40, SamplingParams(seed=3))
    (second,) = complete(pair, ["the river"], 400, SamplingParams(seed=4))
    stop = next(text for at in range(8, 80) if (text := first.text[at : at + 3]) not in second.text)
    process = subprocess.Popen(
        [sys.executable, "-m", "myllm", "sample", "tiny", "--prompt", "the river", "--num-samples", "2", "--seed", "3",
         "--max-new-tokens", "100000000", "--format", form, "--stop", stop],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"MYLLM_DATA": str(data)},
    )  # fmt: skip
    killer = threading.Timer(240, process.kill)
    killer.start()
    try:
        cut = first.text[: first.text.index(stop)]
        if form == "jsonl":
            row = json.loads(process.stdout.readline())
            assert (row["text"], row["finish_reason"]) == (cut, "stop")
        else:
            expected = f"--- 1\nthe river{cut}\n--- 2\nthe river{second.text[:300]}".encode()
            assert process.stdout.read(len(expected)) == expected
        assert process.poll() is None
    finally:
        killer.cancel()
        process.kill()
        process.communicate(timeout=240)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("tiny", "--top-p", "0"), 2, "top_p 0.0: give a number above 0 and at most 1"),
        (("tiny", "--top-p", "1.5", "--top-k", "-1"), 2, "top_k -1"),
        (("tinny",), 2, "no checkpoint at 'tinny'; runs with checkpoints: tiny"),
        (("tiny", "--prompts-file", "/nowhere/x"), 2, "cannot read the prompts in /nowhere/x"),
        (("tiny", "--prompt", "", "--max-new-tokens", "2"), 0, "the prompt is empty: the model starts a new document"),
        (("tiny", "--prompt", "a b " * 40, "--max-new-tokens", "2"), 0, "only its last 32 are read"),
        (("tiny", "--prompt", "a", "--temperature", "0", "--max-new-tokens", "2"), 0, "temperature 0 is greedy"),
    ],
)  # fmt: skip
def test_errors_and_notes(
    data: Path, words: tuple[str, ...], code: int, message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("MYLLM_DATA", str(data))
    ended = 0
    try:
        run_command(["sample", *words])
    except SystemExit as error:
        ended = error.code
    output = capsys.readouterr().err
    assert ended == code, output
    assert message in output


# -- chat -------------------------------------------------------------------------------------------------------------


def test_chat_reset_forgets_text(data: Path) -> None:
    typed = "the river\n/reset\nthe river\n/unknown\n"
    done = command(data, "chat", "tiny", "--max-new-tokens", "4", "--temperature", "0", stdin=typed)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.partition("stops a reply.\n")[2].split("text cleared\n")
    assert first.strip()
    assert second.startswith(first)
    assert "unknown command /unknown; commands: /reset" in second


def test_ctrl_c_stops_only_reply(data: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "myllm", "chat", "tiny", "--max-new-tokens", "100000000"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"MYLLM_DATA": str(data)},
    )  # fmt: skip
    try:
        assert any(b"/quit exits" in line for line in process.stdout)  # ends with the process
        process.stdin.write(b"the river\n")
        process.stdin.flush()
        assert process.stdout.read(200)  # in the middle of a reply that would take hours
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(b"/temperature 0.5\n/quit\n", timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert b" [stopped]" in output
    assert b"temperature 0.5" in output
    assert b"Traceback" not in errors
