"""A path that cannot be is one sentence and exit code 2, whichever option of whichever command it was given to."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from support.saved_checkpoints import SMALL, Save

from myllm.cli.errors import exit_on_error
from myllm.cli.launch import parse_args
from myllm.cli.main import COMMANDS, main
from myllm.data.prepare.prepare import disk_errors_for_users
from myllm.errors import UserError, explain_os_error, full_disk_path
from myllm.files import add_filename, atomic_write
from myllm.paths import temp_data, user_path

PATHS = ("~nobody-of-this-name/x", "n" * 300, "a/" + "é" * 200 + "/b.json", "/dev/null/x")
OPTIONS = [
    "data estimate files:PATH", "data estimate files:TEXTS --tokenizer PATH", "data prepare files:PATH",
    "data prepare files:TEXTS --tokenizer PATH", "data merge PATH", "data verify PATH", "data show PATH",
    "tokenizer train files:PATH", "tokenizer train files:TEXTS --vocab-size 257 --out PATH",
    "plan --config PATH --gpus cpu", "preflight --config PATH", "preflight debug --data.source files:PATH",
    "preflight debug --data.dataset PATH", "preflight debug --data.tokenizer PATH", "eval PATH",
    "eval RUN --tasks perplexity:PATH", "eval RUN --tasks hellaswag --hellaswag-file PATH", "eval RUN --out PATH",
    "eval RUN --tasks heldout --dataset PATH", "sample PATH", "sample RUN --prompts-file PATH", "sample RUN --out PATH",
    "chat PATH", "serve PATH", "serve RUN PATH", "report PATH", "replay PATH", "status PATH", "export PATH --to there",
    "export RUN --to PATH", "export RUN --to-onnx PATH", "export RUN --to-gguf PATH", "import PATH --name x",
    "import x --name PATH", "publish PATH --repo a/b", "checkpoint list PATH", "checkpoint verify PATH",
    "prove-resume --config PATH", "tune --config PATH", "tune debug --data.dataset PATH",
    "ladder debug small-50m --data.dataset PATH", "ladder PATH debug --data.dataset x",
    "data delete PATH", "runs delete PATH", "runs rename PATH x", "runs rename RUN PATH", "runs archive PATH",
    "runs sync PATH --to tensorboard",
]  # fmt: skip
NOT_PATHS = {"data list", "doctor"}


def test_path_options_cover_all_commands() -> None:
    named = {name for name in COMMANDS if any(words.startswith(f"{name} ") for words in OPTIONS)}
    assert named == COMMANDS.keys() - NOT_PATHS, "add the command with a PATH to OPTIONS, or its name to NOT_PATHS"


@pytest.mark.usefixtures("temp_data")
def test_invalid_path_options_exit_with_error(
    save: Save, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(SMALL)
    for words in OPTIONS:
        for path in PATHS:
            given = [word.replace("TEXTS", str(corpus)).replace("RUN", "made") for word in words.split()]
            given = [word.replace("PATH", path) for word in given]
            with pytest.raises(SystemExit) as caught:
                main(given)
            assert caught.value.code == 2, given
            assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("path", PATHS)
def test_invalid_config_and_data_paths_raise(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        parse_args(["--config", path])
    if not path.startswith(("/dev", "a/")):  # what is not there may be made
        with pytest.raises(UserError, match=r"cannot (find|read or write)"):
            user_path(path)
    monkeypatch.setenv("MYLLM_DATA", path)
    with pytest.raises((UserError, SystemExit)), exit_on_error():
        (temp_data() / "runs").mkdir(parents=True)


WORDS = [
    (errno.EACCES, "unreadable", "cannot read .*unreadable: Permission denied; make it readable"),
    (errno.EACCES, "new", "cannot write .*new: Permission denied; make it writable"),
    (errno.EROFS, "new", "cannot write .*new: Read-only file system; make it writable"),
    (errno.ENOSPC, "new", "cannot write .*new: No space left on device; free some space"),
    (errno.EISDIR, "", "cannot use .*: Is a directory; expected a file, not a folder"),
    (errno.ENOTDIR, "new", "cannot use .*: Not a directory; expected a folder, not a file"),
    (errno.ENAMETOOLONG, "new", "cannot use .*: File name too long; expected a shorter name"),
    (errno.ELOOP, "new", ".*; expected no link that leads back to itself"),
    (errno.EMFILE, "new", "too many files are open"),
]


@pytest.mark.parametrize(("number", "name", "expected"), WORDS)
def test_file_errors_have_readable_messages(
    number: int, name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "unreadable").touch()
    monkeypatch.setattr(os, "access", lambda path, *_, **__: not str(path).endswith("unreadable"))
    with pytest.raises(SystemExit) as caught, exit_on_error():
        raise OSError(number, os.strerror(number), str(tmp_path / name))
    assert caught.value.code == 2
    assert re.search(f"^error: {expected}", capsys.readouterr().err)


def test_internal_os_errors_are_not_explained() -> None:
    for number in (errno.EIO, errno.ESTALE, errno.ENOENT, errno.ECONNRESET):
        assert explain_os_error(OSError(number, os.strerror(number), "file"), Path("data")) is None


def test_full_disk_error_names_file(tmp_path: Path) -> None:
    for place in (add_filename(tmp_path / "a"), atomic_write(tmp_path / "a")):
        with pytest.raises(OSError, match=r"No space left on device: '.*/a'"), place:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_full_shared_memory_names_dev_shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where processes keep semaphores and queues; their errors name no file."""
    full = Path("/dev/shm")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0 if path == full else 10**12))
    error = OSError(errno.ENOSPC, "No space left on device")
    assert full_disk_path(error, tmp_path) == full
    with pytest.raises(UserError, match=r"cannot write /dev/shm: No space left .*--shm-size"), disk_errors_for_users():
        raise error
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0 if path == tmp_path else 10**12))
    assert full_disk_path(error, tmp_path) == tmp_path


def test_missing_fcntl_exits_with_wsl_hint() -> None:
    """Windows: before anything is imported that it lacks."""
    hide = "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None; "
    for program in ("from myllm.cli.main import main; main(['data', 'list'])", "import pretrain; pretrain.main()"):
        done = subprocess.run(
            [sys.executable, "-c", hide + program, "debug"], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == 2
        assert re.fullmatch(r"error: .* on Windows in WSL .*\n", done.stderr)
