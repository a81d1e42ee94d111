"""The command line: what it accepts, what it refuses, and what it says."""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, command, launch, write_run_config

from myllm.cli import main as cli
from myllm.cli.errors import exit_on_error
from myllm.cli.launch import parse_args
from myllm.cli.plan import check_prepared_data, describe_dry_run
from myllm.config import DataConfig, RunConfig
from myllm.data.prepare.prepare import prepare
from myllm.errors import UserError
from myllm.presets import PRESETS, get_preset


def test_preset_only() -> None:
    assert parse_args(["debug"]).config == get_preset("debug")


def test_overrides() -> None:
    parsed = parse_args(
        ["debug", "--train.max-steps", "7", "--optim.max_lr=1e-3", "--name", "mine", "--model.no-qk-norm"]
    )
    assert parsed.config.train.max_steps == 7
    assert parsed.config.optim.max_lr == 1e-3
    assert parsed.config.name == "mine"
    assert parsed.config.model.qk_norm is False
    assert parse_args(["debug"]).config.eval.sample_prompts == get_preset("debug").eval.sample_prompts
    assert parse_args(["debug", "--data.source", "files:."]).config.eval.sample_prompts == ()
    assert parse_args(["debug", "--data.dataset", "x"]).config.eval.sample_prompts == ()
    assert parse_args(["debug", "--data.dataset", "x", "--eval.sample-prompts", "a"]).config.eval.sample_prompts == (
        "a",
    )
    assert parse_args(["debug", "--eval.sample-prompts", "one two", "three"]).config.eval.sample_prompts == (
        "one two",
        "three",
    )


def test_prompts_of_a_config_file_stay_with_other_text(tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    for content, expected in (
        ('{"eval": {"sample_prompts": ["mine"]}}', ("mine",)),
        ('{"data": {"source": "files:."}}', ()),
        ('{"data": {"source": "files:."}, "eval": {"sample_prompts": ["mine"]}}', ("mine",)),
    ):
        file.write_text(content)
        for words in ((), ("--data.dataset", "x"), ("--data.source", "files:/")):
            found = parse_args(["debug", "--config", str(file), *words]).config.eval.sample_prompts
            assert found == expected, (content, words)
    same = parse_args(["debug", "--data.source", "python-stdlib"])
    assert same.config.eval.sample_prompts == get_preset("debug").eval.sample_prompts


def test_saved_config_round_trip(tmp_path: Path) -> None:
    config = replace(get_preset("gpt2-124m"), name="saved")
    path = write_run_config(config, tmp_path / "config.json")
    assert parse_args(["--config", str(path)]).config == config
    assert parse_args([f"--config={path}", "--train.max-steps", "5"]).config.train.max_steps == 5


def test_config_file_overrides_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"name": "mine", "optim": {"max_lr": 0.01}}')
    config = parse_args(["debug", "--config", str(path), "--dry-run"]).config
    assert (config.name, config.optim.max_lr, config.model) == ("mine", 0.01, get_preset("debug").model)


def test_config_read_from_pipe(tmp_path: Path) -> None:
    """As the shell's `--config <(jq ...)` does: it can be read once."""
    reader, writer = os.pipe()
    os.write(writer, b'{"name": "piped", "data": {"source": "files:texts"}}')
    os.close(writer)
    launch = parse_args(["debug", "--config", f"/dev/fd/{reader}", "--dry-run"])
    os.close(reader)
    assert (launch.config.name, launch.config.data.source, launch.own_text) == ("piped", "files:texts", True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["debug", "--eval.tasks", "piqa", "arc_easy"],
            "eval.tasks has 'arc_easy', did you mean 'arc-easy'.; expected",
        ),
        (["debug", "--eval.tasks", "hellaswag"], "settings of their own: eval.hellaswag_every_steps"),
        (["debug", "--eval.tasks", "piqa", "piqa:x.jsonl"], "eval.tasks has a task twice: piqa, piqa:x.jsonl"),
        (["dbug"], "unknown preset 'dbug', did you mean 'debug'"),
        (["--train.max-steps", "3"], "missing PRESET"),
        (["debug", "--config"], "--config needs"),
        (["debug", "--config", "nowhere.json"], "cannot read the config nowhere.json"),
        (["debug", "--config", "/dev/zero"], "cannot read the config /dev/zero: it is a device"),
        (["debug", "--train.batch-tokens", "3000"], r"2,560 or 3,072"),
        (["debug", "--train.max-steps", "0", "--optim.beta1", "2"], r"2 errors(.|\n)*max_steps(.|\n)*beta1"),
        (["debug", "--name", "../up"], "plain folder name"),
        (["debug", "--name=-x"], "does not begin with '-'"),
        (["debug", "--name", "a\nb"], "plain folder name"),
        (["debug", "--name", "n" * 300], "plain folder name"),
        (["debug", "--config=", "--dry-run"], "--config needs"),
        (["debug", "--eval.sample-prompts", "\udcff"], r"eval\.sample_prompts\[0\] .* is not UTF-8: rename"),
        (["debug", "--data.source", "files:\udcc3\udca9"], r"data\.source .* is not text in this locale's encoding"),
        (["debug", "--train.batch-tokens", "1000000000256"], "is not a multiple"),
    ],
)
def test_invalid_arguments_raise(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_args(words)


def test_unknown_config_keys_raise(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{"train": {"max_step": 3, "seed": "x"}, "modle": {}}')
    with pytest.raises(UserError, match=r"train\.max_step: unknown key, did you mean 'max_steps'") as caught:
        parse_args(["debug", "--config", str(path)])
    assert "modle: unknown key, did you mean 'model'" in str(caught.value)
    assert "train.seed: expected an integer, found 'x'" in str(caught.value)


def test_batch_checked_for_planned_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"3 rank\(s\)"):
        parse_args(["lf-llm-269m", "--dry-run"])
    assert parse_args(["lf-llm-269m"])  # but without torchrun this process would train alone
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "x 8 rank(s) x 2 accumulation step(s) = 524,288" in describe_dry_run(
        parse_args(["lf-llm-269m", "--dry-run"])
    )


def test_dry_run_of_reference_preset() -> None:
    text = describe_dry_run(parse_args(["lf-llm-269m"]))
    assert "320,145,408 in all, 268,682,240 without the embedding" in text
    assert "2.324 G per token" in text
    assert "19,073 steps = 9,999,745,024 tokens" in text
    shown, _, _ = text.partition("\n\nrun ")
    assert shown == "settings     those of lf-llm-269m; `python pretrain.py lf-llm-269m --help` lists them"


def test_dry_run_refuses_the_data_that_training_refuses(tiny: RunConfig, tmp_path: Path) -> None:
    check_prepared_data(tiny)  # nothing is prepared yet
    name = prepare(tiny.data, progress=False).name
    check_prepared_data(tiny)
    for changes, message in (
        ({"model": replace(tiny.model, vocab_size=4_096)}, "model.vocab_size is 4,096, but the tokenizer of "),
        ({"train": replace(tiny.train, batch_tokens=1 << 20)}, "fewer than the 16,384 of one step"),
    ):
        for data in (tiny.data, DataConfig(dataset=name)):
            with pytest.raises(UserError, match=message):
                check_prepared_data(replace(tiny, data=data, **changes))
    saved = write_run_config(replace(tiny, data=DataConfig(dataset=name)), tmp_path / "run.json")
    done = launch("--config", saved, "--model.vocab-size", "4096", "--dry-run")
    assert done.returncode == 2
    assert "batch        " in done.stdout
    assert "model.vocab_size is 4,096" in done.stderr


def test_dry_run_shows_differences_from_preset(tmp_path: Path) -> None:
    words = ["--train.max-steps", "7", "--data.source", "files:/a b", "--model.no-qk-norm", "--name", "other"]
    expected = [
        "settings     those of debug (`python pretrain.py debug --help` lists them), but",
        "  model.qk_norm    True -> False",
        "  data.source      'python-stdlib' -> 'files:/a b'",
        "  train.max_steps  600 -> 7",
    ]
    parsed = parse_args(["debug", *words])
    assert describe_dry_run(parsed).split("\n\n")[0].splitlines() == expected
    saved = write_run_config(parsed.config, tmp_path / "config.json")
    assert describe_dry_run(parse_args(["--config", str(saved)])).split("\n\n")[0].splitlines() == expected


def test_help_names_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in PRESETS)


def test_preset_help_shows_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(["gpt2-124m", "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "--optim.max-lr" in shown
    assert re.search(r"--train\.max-steps INT[^-]*default: 19073", shown)


def test_config_error_exits_with_code_2(temp_data: Path) -> None:
    done = launch("debug", "--train.batch-tokens", "1000", "--model.n-heads", "3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "error: the config has 2 errors" in done.stderr
    assert not temp_data.exists()  # nothing was made


@pytest.mark.parametrize("case", ["empty", "missing", "latin1"])
def test_invalid_text_leaves_no_dataset(tmp_path: Path, temp_data: Path, case: str) -> None:
    folder = tmp_path / "texts"
    if case != "missing":
        folder.mkdir()
    if case == "latin1":
        (folder / "a.txt").write_bytes("café".encode("latin1"))
        (folder / "b.txt").write_text("fine")
    done = launch("debug", "--data.source", f"files:{folder}")
    assert done.returncode == 2, done.stderr
    assert str(folder) in done.stderr
    assert "Traceback" not in done.stderr
    left = {path.name for path in temp_data.rglob("*") if path.suffix != ".lock" and path.parent.name != "listings"}
    assert left <= {"datasets", "listings", ".locks"}, "more than what is known of the files"


def test_profile_flag_not_part_of_config() -> None:
    """And no setting of the run: its config.json would ask for it again."""
    plain, profiled = parse_args(["debug"]), parse_args(["debug", "--profile"])
    assert (plain.profile, profiled.profile) == (False, True)
    assert plain.config == profiled.config


def test_prepare_only(tiny: RunConfig, tmp_path: Path, temp_data: Path) -> None:
    path = write_run_config(tiny, tmp_path / "tiny.json")
    done = launch("--config", path, "--prepare-only")
    assert done.returncode == 0, done.stderr
    assert "data ready" in done.stdout
    assert len(list(temp_data.glob("datasets/*/manifest.json"))) == 1
    assert not (temp_data / "runs").exists()


def test_runs_from_any_folder_without_installation(tmp_path: Path) -> None:
    assert Path(command("debug")[1]).is_absolute()
    done = launch("--help")
    assert done.returncode == 0
    assert "lf-llm-269m" in done.stdout


def test_unavailable_device_rejected(temp_data: Path) -> None:
    missing = "cuda" if not torch.cuda.is_available() else "mps"
    done = launch("debug", "--train.device", missing)
    assert done.returncode == 2
    assert f"torch sees 0 {missing} device(s)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not temp_data.exists()


@pytest.mark.parametrize("value", ["abc", "0", "-1"])
def test_invalid_world_size_raises(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(UserError, match="WORLD_SIZE is"):
        parse_args(["debug", "--dry-run"])


def test_file_in_place_of_run_folder_rejected(tiny: RunConfig, tmp_path: Path, temp_data: Path) -> None:
    (temp_data / "runs").mkdir(parents=True)
    (temp_data / "runs" / "tiny").write_text("")
    done = launch("--config", write_run_config(tiny, tmp_path / "tiny.json"))
    assert done.returncode == 2
    assert "cannot write the run folder" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("here", [True, False])
def test_rank_defers_to_failed_peer_error(
    here: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real words of gloo and NCCL; another RuntimeError is a fault of one's own, and keeps its traceback."""
    waited: list[float] = []
    monkeypatch.setattr("myllm.cli.errors.time", SimpleNamespace(sleep=waited.append))  # not other threads' sleep
    monkeypatch.setattr("os._exit", sys.exit)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    elsewhere = (
        "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:64669. This is typically\nGLHF",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    )
    if not here:
        with pytest.raises(SystemExit) as end, exit_on_error():
            raise RuntimeError("mine")
        assert end.value.code == 1
        assert "Traceback" in capsys.readouterr().err
        return
    for message in elsewhere:
        with pytest.raises(SystemExit) as end, exit_on_error():
            raise RuntimeError(message)
        assert end.value.code == 1  # so that a launcher starts it again
        assert (
            f"rank 1: another rank failed first; see its error above ({message.splitlines()[0]}"
            in capsys.readouterr().err
        )
    assert len(waited) == 2


def run_without_reader(program: str) -> tuple[int, bytes]:
    """The exit code and stderr of a program whose stdout is a pipe that nobody reads, from its start."""
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, env=buffered, stdout=writer, stderr=subprocess.PIPE, timeout=240, check=False)
    os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize("lines", [1, 100_000])
def test_closed_stdout_exits_with_sigpipe(lines: int) -> None:
    """As in `myllm eval RUN | head -0`: neither a traceback nor a complaint at the end."""
    code = f"from myllm.cli.errors import exit_on_error\nwith exit_on_error():\n    for _ in range({lines}): print(1)"
    assert run_without_reader(code) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize(
    ("ending", "code"),
    [("raise SystemExit(0)", 141), ("raise SystemExit(75)", 75), ("raise UserError('mine')", 2), ("pass", 141)],
)
def test_exit_code_with_closed_stdout(ending: str, code: int) -> None:
    """As in `myllm --help | true` and `myllm status RUN | true`."""
    program = f"""
from myllm.errors import UserError
from myllm.cli.errors import exit_on_error
with exit_on_error():
    print('a line')
    {ending}
"""
    assert run_without_reader(program) == (code, b"error: mine\n" if code == 2 else b"")


def test_missing_packages_error_names_environment(tmp_path: Path) -> None:
    """Not a traceback about tyro: a newcomer's first `python pretrain.py` is often the system's Python."""
    bare = tmp_path / "checkout"
    bare.mkdir()
    shutil.copy(ROOT / "pretrain.py", bare)
    (bare / "src").symlink_to(ROOT / "src")
    words = [sys.executable, "-S", "-I", str(bare / "pretrain.py"), "debug"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .+ has no package '\w+'; use MyLLM's environment: .* in \.venv\n", done.stderr)
    (bare / ".venv/bin").mkdir(parents=True)
    (bare / ".venv/bin/activate").touch()
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert f"source {bare}/.venv/bin/activate" in done.stderr


TYPOS = """
import sys
sys.path.insert(0, ROOT)
import pretrain
from myllm.cli import main as cli
for words in COMMANDS:
    start = cli.main
    if words[0] == "pretrain.py":
        start, sys.argv = pretrain.main, words
    try:
        start(words) if start is cli.main else start()
    except SystemExit as end:
        assert end.code == (0 if "--help" in words else 2), (words, end.code)
    else:
        raise AssertionError(words)
    heavy = [name for name in ("torch", "matplotlib", "transformers", "pyarrow") if name in sys.modules]
    assert not heavy, (words, heavy)
"""


def test_typo_reported_before_importing_torch(temp_data: Path) -> None:
    """It takes seconds, and so does no word of help or of a mistake that can be seen without it."""
    commands = [
        ["pretrain.py", *words.split()]
        for words in (
            "debg", "debug --train.max-step 3", "debug --help", "debug --train.batch-tokens 1000",
            "debug --data.source files:/nowhere", "debug --data.source pyton-stdlib", "debug --data.dataset nothing",
            "debug --data.tokenizer nowhere.json", "debug --train.device cudaa", "--config nowhere.json",
        )
    ]  # fmt: skip
    commands += [
        words.split()
        for words in (
            "--help", "evl nothing", "eval nothing", "eval nothing --device cudaa", "eval nothing --tasks validatio",
            "sample nothing", "sample nothing --top-p 2", "chat nothing", "serve nothing", "export nothing --to there",
            "export nothing", "import nothing", "publish nothing --repo a/b", "publish nothing --repo a",
            "report nothing", "replay nothing", "status nothing", "plan debg", "preflight debg",
            "preflight debug --data.source nothing", "prove-resume debg", "checkpoint list nothing",
            "checkpoint verify nothing", "data prepare nothing",
            "data show nothing --sequence 1", "tokenizer train nothing", "doctor --device cudaa",
            "sample ~nobody-of-this-name/x", f"eval {'x' * 300}",
        )
    ]  # fmt: skip
    commands += [[*name.split(), "--help"] for name in cli.COMMANDS]
    code = TYPOS.replace("ROOT", repr(str(ROOT))).replace("COMMANDS", repr(commands))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr


def test_missing_cxx_compiler_error(tmp_path: Path) -> None:
    """A real torch.compile, with a C++ compiler that does not work; and what Triton says where C's is missing."""
    code = "import torch; from myllm.cli.errors import exit_on_error\n"
    code += "with exit_on_error(): torch.compile(lambda x: x * 2 + 1)(torch.ones(8))"
    environment = os.environ | {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "Warning" not in line]
    assert line.startswith("error: torch.compile needs a working C++ compiler and found none (tried /bin/false)")
    assert line.endswith("--train.compile off")


def test_missing_c_compiler_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_error():
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable or set triton.knobs")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: torch.compile needs a working C compiler and found none:")


@pytest.mark.parametrize(
    "error",
    [
        subprocess.CalledProcessError(
            1, ["/usr/bin/gcc", "/tmp/x/cuda_utils.c", "-lcuda", "-I/usr/include/python3.12"]
        ),
        RuntimeError("C++ compile error\n\nOutput:\n/tmp/x.cpp:4:10: fatal error: Python.h: No such file or directory"),
    ],
    ids=["Triton", "Inductor"],
)
def test_missing_python_headers_error(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit) as caught, exit_on_error():
        raise RuntimeError("backend='inductor' raised") from error
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(
        f"error: torch.compile needs the headers of Python, and {tmp_path}/Python.h"
    )
    (tmp_path / "Python.h").touch()
    with pytest.raises(RuntimeError, match="inductor"), exit_on_error():
        raise RuntimeError("backend='inductor' raised") from error
