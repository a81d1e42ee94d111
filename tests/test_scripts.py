"""The shell scripts, without a real installation or training.

environment.sh runs for real in a small checkout with a space in its name, on a machine whose environments come with
a fake pip: it writes down what it was asked and lays out the metadata of what it "installed". The launchers run with
a python that only writes down its arguments.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted(ROOT.glob("*.sh")), *sorted(ROOT.glob("src/*.sh")), ROOT / ".ci" / "run"]
BASE_PYTHON = Path(sys.base_prefix, "bin", "python3")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEV = PROJECT["optional-dependencies"]["dev"] + PROJECT["optional-dependencies"]["docs"]
DEADLINE_S = 240
PINS = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] not in ("", "#")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck is missing: it comes with src/environment.sh --dev"
    result = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert os.access(script, os.X_OK)


def test_requirements_match_pyproject():
    ranges = {canonicalize_name(r.name): r.specifier for r in map(Requirement, PROJECT["dependencies"])}
    pins = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in PINS}
    assert pins.keys() == ranges.keys()
    assert {name: pin for name, pin in pins.items() if pin not in ranges[name]} == {}


def test_pyproject_uses_parsable_version_forms():
    """It has no TOML or version library at hand, so it reads only these forms."""
    torch = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "torch")
    assert {specifier.operator for specifier in torch.specifier} <= {">=", "<"}
    assert re.search(r'^requires-python = ">=3\.\d+"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert all(re.fullmatch(r"[\w.-]+==\S+", line) for line in DEV)


# ---- environment.sh

FAKE_PIP = """
import json, os, re, shutil, sys, sysconfig, time
from pathlib import Path

site, arguments = Path(sysconfig.get_path("purelib")), sys.argv[1:]
wanted, constraints = (
    Path(arguments[arguments.index(flag) + 1]).read_text().split() if flag in arguments else [] for flag in ("-r", "-c")
)
with open(os.environ["LOG"], "a") as log:
    print(json.dumps({"wanted": wanted, "constraints": constraints, "arguments": arguments}), file=log)
if os.environ.get("PIP_HANGS"):
    time.sleep(600)
if os.environ.get("PIP_FAILS_AT", "nothing") in arguments:
    sys.exit(1)
for name, version in (pin.split("==") for pin in wanted):
    for old in site.glob(name.replace("-", "_") + "-*.dist-info"):
        shutil.rmtree(old)
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    (site / name).mkdir(exist_ok=True)
    (site / name / "__init__.py").touch()
if "-e" in arguments:
    (site / "myllm.pth").write_text(arguments[-1] + "/src\\n")
    Path(sys.prefix, "bin", "myllm").touch()
"""

SYSTEM_PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
  echo "{{\\"venv\\": \\"$*\\"}}" >>"$LOG"
  shift 2
  "{python}" -m venv --without-pip "$@" || exit
  for folder in "$@"; do :; done
  cp -R "{pip}" "$folder"/lib/python*/site-packages/
  exit
fi
PYTHONPATH="{packages}" exec "{python}" -S "$@"
"""


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Machine:
    """A checkout, a system python, and the log of what was made and installed."""

    def __init__(self, tmp_path: Path):
        self.root, self.bin, self.packages = tmp_path / "my llm", tmp_path / "bin", tmp_path / "system packages"
        self.pip, self.log_file = tmp_path / "fake" / "pip", tmp_path / "log.jsonl"
        for name in (
            "pyproject.toml",
            "requirements.txt",
            "src/environment.sh",
            "src/environment.py",
            "src/myllm/__init__.py",
        ):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        for name, text in (("__init__.py", ""), ("__main__.py", FAKE_PIP)):
            write_script(self.pip / name, text)
        python = SYSTEM_PYTHON.format(python=BASE_PYTHON, pip=self.pip, packages=self.packages)
        write_script(self.bin / "python3", python)
        # A script that gets this far would have no network either.
        self.env = {"PATH": f"{self.bin}:/usr/bin:/bin", "LOG": str(self.log_file), "HOME": str(tmp_path)}
        self.env |= {"PIP_NO_INDEX": "1", "PIP_INDEX_URL": "http://127.0.0.1:9"}

    def start(self, *arguments, **env) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        return subprocess.Popen(
            [self.root / "src/environment.sh", *arguments], env=self.env | env, cwd=self.bin, **pipes
        )

    def run(self, *arguments, status=0, **env) -> str:
        """Returns stdout for success, stderr for failure."""
        process = self.start(*arguments, **env)
        stdout, stderr = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == status, stderr
        if status:
            assert stdout == ""
        return stderr if status else stdout

    def log(self) -> list[dict]:
        """What happened since the last call."""
        text = self.log_file.read_text() if self.log_file.exists() else ""
        self.log_file.write_text("")
        return [json.loads(line) for line in text.splitlines()]

    def make_venv(self, path: Path, **versions: str) -> Path:
        subprocess.run([self.bin / "python3", "-m", "venv", path], env=self.env, check=True)
        requirements = path.parent / "wanted.txt"
        requirements.write_text("\n".join(f"{name}=={version}" for name, version in versions.items()))
        subprocess.run([path / "bin/python", "-m", "pip", "install", "-r", requirements], env=self.env, check=True)
        self.log()
        return path


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def pins(*, torch: bool) -> list[str]:
    return [str(pin) for pin in PINS if torch or pin.name != "torch"]


def test_creates_venv_once(machine):
    python = machine.root / ".venv" / "bin" / "python"
    assert machine.run() == f"{python}\n"
    assert python.exists()
    venv, torch, rest, project = machine.log()
    assert "--system-site-packages" not in venv["venv"]
    assert torch["wanted"] == rest["constraints"] == [str(pin) for pin in PINS if pin.name == "torch"]
    assert rest["wanted"] == pins(torch=False)
    assert project["arguments"][-3:] == ["--no-deps", "-e", str(machine.root)]

    assert machine.run() == f"{python}\n"
    assert machine.log() == []
    assert not (machine.root / ".venv.lock").exists()


def test_dev_installs_test_packages(machine):
    machine.run("--dev")
    assert machine.log()[2]["wanted"] == pins(torch=False) + DEV
    machine.run()  # has all it needs
    machine.run("--dev")
    assert machine.log() == []
    assert "usage" in machine.run("--develop", status=2)


def test_repairs_altered_environment(machine):
    machine.run()
    site = next(machine.root.glob(".venv/lib/python*/site-packages"))
    for remove in (next(site.glob("tyro-*")), site / "tiktoken", site / "myllm.pth"):
        machine.log()
        shutil.rmtree(remove) if remove.is_dir() else remove.unlink()
        machine.run()
        assert len(machine.log()) == 2, f"removing {remove.name} went unnoticed"  # no venv, and torch is kept

    requirements = machine.root / "requirements.txt"
    requirements.write_text(re.sub(r"tyro==\S+", "tyro==1.0.1", requirements.read_text()))
    machine.run()
    assert "tyro==1.0.1" in machine.log()[0]["wanted"]


def test_recreates_moved_or_broken_venv(machine):
    machine.run()
    machine.log()
    machine.root = machine.root.rename(machine.root.parent / "it's elsewhere")
    assert machine.run() == f"{machine.root}/.venv/bin/python\n"
    assert "venv" in machine.log()[0]
    machine.run()
    assert machine.log() == []

    (machine.root / ".venv/bin/python").unlink()
    (machine.root / ".venv/bin/python").symlink_to("/nowhere/python")
    machine.run()
    assert "venv" in machine.log()[0]


def test_continues_after_failed_install(machine):
    assert "Run this again" in machine.run(status=1, PIP_FAILS_AT="-e")
    assert len(machine.log()) == 4
    machine.run()
    assert len(machine.log()) == 2


def test_continues_after_interrupted_install(machine):
    process = machine.start(PIP_HANGS="1")
    deadline = time.monotonic() + DEADLINE_S
    while len(machine.log_file.read_text().splitlines() if machine.log_file.exists() else []) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    stdout, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode != 0
    assert stdout == ""
    assert not list(machine.root.glob(".venv/.myllm-*"))
    machine.log()
    machine.run()
    assert len(machine.log()) == 3


def test_concurrent_runs_install_once(machine):
    processes = [machine.start(), machine.start()]
    answers = [process.communicate(timeout=DEADLINE_S)[0] for process in processes]
    assert answers == [f"{machine.root}/.venv/bin/python\n"] * 2
    assert len(machine.log()) == 4


def test_takes_over_stale_lock(machine):
    dead = subprocess.Popen(["true"])
    dead.wait(timeout=DEADLINE_S)
    (machine.root / ".venv.lock").mkdir()
    (machine.root / ".venv.lock" / "owner").write_text(f"{os.uname().nodename} {dead.pid}\n")
    machine.run(status=1, PIP_FAILS_AT="install")
    assert not (machine.root / ".venv.lock").exists()


def test_stale_lock_is_taken_over_once(machine, tmp_path):
    """By one that is slow to remove it, and not by another that finds it meanwhile."""
    go, reached = tmp_path / "go", tmp_path / "reached"
    wait = f'touch "{reached}"; while [ ! -e "{go}" ]; do sleep 0.05; done'
    write_script(machine.bin / "rm", f'#!/bin/sh\nif [ -n "$SLOW" ]; then {wait}; fi\nexec /bin/rm "$@"\n')
    dead = subprocess.Popen(["true"])
    dead.wait(timeout=DEADLINE_S)
    (machine.root / ".venv.lock").mkdir()
    (machine.root / ".venv.lock" / "owner").write_text(f"{os.uname().nodename} {dead.pid}\n")
    slow, deadline = machine.start(SLOW="yes"), time.monotonic() + DEADLINE_S
    while not reached.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    other = machine.start()
    assert "Waiting for another installation" in other.stderr.readline()
    go.touch()
    answers = [process.communicate(timeout=DEADLINE_S)[0] for process in (slow, other)]
    assert answers == [f"{machine.root}/.venv/bin/python\n"] * 2
    assert len(machine.log()) == 4


@pytest.mark.parametrize(("variable", "torch"), [("VIRTUAL_ENV", "2.11.0+cu130"), ("CONDA_PREFIX", "2.12.0a0+nv1")])
def test_uses_active_environment_and_keeps_torch(machine, tmp_path, variable, torch):
    active = machine.make_venv(tmp_path / "active env", torch=torch)
    assert machine.run(**{variable: str(active)}) == f"{active}/bin/python\n"
    rest, project = machine.log()
    assert rest["wanted"] == pins(torch=False)
    assert rest["constraints"] == [f"torch=={torch}"]
    assert "-e" in project["arguments"]
    assert not (machine.root / ".venv").exists()
    machine.run(**{variable: str(active)})
    assert machine.log() == []


@pytest.mark.parametrize("torch", ["2.10.9+cu128", "2.15.0"])
def test_incompatible_torch_requires_replace_flag(machine, tmp_path, torch):
    """An environment of the user's own: other programs there may need that very torch."""
    active = machine.make_venv(tmp_path / "active", torch=torch)
    for found in ({"VIRTUAL_ENV": str(active)}, {"PATH": f"{active}/bin:{machine.env['PATH']}"}):
        message = machine.run(status=2, **found)
        assert f"{active} has torch {torch}, and MyLLM needs torch>=2." in message
        assert "src/environment.sh --replace-torch" in message
        assert machine.log() == []
    machine.run("--replace-torch", VIRTUAL_ENV=str(active), status=1, PIP_FAILS_AT="install")  # seen enough
    assert machine.log()[0]["wanted"] == [str(pin) for pin in PINS if pin.name == "torch"]


def test_replaces_incompatible_torch_in_own_venv(machine):
    machine.make_venv(machine.root / ".venv", torch="2.2.0")
    machine.run(status=1, PIP_FAILS_AT="install")
    assert machine.log()[0]["wanted"] == [str(pin) for pin in PINS if pin.name == "torch"]


def test_ignores_conda_base_environment(machine, tmp_path):
    base = machine.make_venv(tmp_path / "conda")
    machine.run(CONDA_PREFIX=str(base), CONDA_DEFAULT_ENV="base", status=1, PIP_FAILS_AT="install")
    assert "venv" in machine.log()[0]


def test_uses_venv_on_path(machine, tmp_path):
    image = machine.make_venv(tmp_path / "image", torch="2.12.0+cu130")
    assert machine.run(PATH=f"{image}/bin:{machine.env['PATH']}") == f"{image}/bin/python\n"


def test_venv_reuses_system_torch(machine, tmp_path):
    site = next(machine.make_venv(tmp_path / "donor", torch="2.12.0a0+nv1").glob("lib/python*/site-packages"))
    site.rename(machine.packages)
    machine.run(status=1, PIP_FAILS_AT="install")
    assert "--system-site-packages" in machine.log()[0]["venv"]


def test_rejects_old_python(machine, tmp_path):
    old = '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.18 && exit\nexit 1\n'
    for name in ("python3", "python3.13", "python3.12", "python3.11"):
        write_script(machine.bin / name, old)
    message = machine.run(status=2)
    assert "needs Python 3.11 or newer" in message
    assert "3.9.18" in message
    write_script(tmp_path / "active/bin/python", old)
    assert "active environment" in machine.run(status=2, VIRTUAL_ENV=str(tmp_path / "active"))


def test_missing_venv_module_suggests_debian_package(machine):
    python = (machine.bin / "python3").read_text()
    write_script(machine.bin / "python3", python.replace("shift 2", "exit 1"))
    assert re.search(r"apt install python3\.\d+-venv", machine.run(status=2, PATH=f"{machine.bin}:/usr/bin:/bin"))
    assert not (machine.root / ".venv").exists()


@pytest.mark.parametrize("has_pip", [True, False])
def test_installs_with_uv_when_available(machine, tmp_path, has_pip):
    active = machine.make_venv(tmp_path / "active")
    if not has_pip:
        shutil.rmtree(next(active.glob("lib/python*/site-packages/pip")))
    # uv pip install --python PYTHON ARGUMENTS...
    uv = f'python="$4"\nshift 4\nPYTHONPATH="{machine.pip.parent}" exec "$python" -m pip uv-install "$@"\n'
    write_script(machine.bin / "uv", f"#!/bin/sh\n{uv}")
    machine.run(VIRTUAL_ENV=str(active))
    assert [call["arguments"][0] for call in machine.log()] == ["uv-install"] * 3


def test_failing_uv_falls_back_to_pip(machine, tmp_path):
    """It knows nothing of pip.conf, which may name the only index that can be reached."""
    write_script(machine.bin / "uv", "#!/bin/sh\nexit 1\n")
    machine.run(VIRTUAL_ENV=str(machine.make_venv(tmp_path / "active")))
    assert [call["arguments"][0] for call in machine.log()] == ["install"] * 3


# ---- run_pre_training_e2e.sh and its debug sibling

RECORDER = """
import json, os, sys
if sys.argv[1] == "-c":
    print(os.environ["GPUS"])
    sys.exit()
names = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
call = {"arguments": sys.argv[1:], "cwd": os.getcwd()} | {name: os.environ.get(name) for name in names}
with open(os.environ["LOG"], "a") as log:
    print(json.dumps(call), file=log)
stage = next((word for word in ("--dry-run", "preflight", "8xA100-80") if word in sys.argv), "train")
sys.exit(int(os.environ["STATUS"]) if os.environ.get("FAILS_AT") == stage else 0)
"""


# A preflight that takes minutes, unless it is told to end.
LASTING = """
import os, signal, sys, time

def say(word):
    with open(os.environ["LOG"], "a") as log:
        print(word, file=log)

def end(*_):
    say("ended")
    sys.exit(143)

if sys.argv[1] == "-c":
    print(os.environ["GPUS"])
elif "preflight" in sys.argv:
    signal.signal(signal.SIGTERM, end)
    say("began")
    time.sleep(600)
elif "--dry-run" not in sys.argv:
    say("trained")
"""

PREFLIGHT = ["-m", "myllm", "preflight"]


class Launch:
    """Runs a launcher in a folder of the user's and collects the calls of python."""

    def __init__(self, tmp_path: Path):
        self.root, self.cwd, self.log_file = tmp_path / "my llm", tmp_path / "user's folder", tmp_path / "log.jsonl"
        for folder in (self.root, self.cwd):
            folder.mkdir()
        for script in ROOT.glob("*.sh"):
            shutil.copy(script, self.root)
        (tmp_path / "recorder.py").write_text(RECORDER)
        python = f'#!/bin/sh\nexec "{BASE_PYTHON}" "{tmp_path}/recorder.py" "$@"\n'
        python = write_script(tmp_path / "bin" / "python", python)
        write_script(self.root / "src/environment.sh", f'#!/bin/sh\necho "{python}"\n')
        self.pretrain = str(self.root / "pretrain.py")

    def __call__(self, *arguments, gpus=0, script="run_pre_training_e2e.sh", **env):
        env = {"PATH": "/usr/bin:/bin", "LOG": str(self.log_file), "GPUS": str(gpus)} | env
        self.log_file.write_text("")
        command = [self.root / script, *arguments]
        self.result = subprocess.run(command, env=env, cwd=self.cwd, capture_output=True, text=True, timeout=DEADLINE_S)
        calls = [json.loads(line) for line in self.log_file.read_text().splitlines()]
        assert all(call["cwd"] == str(self.cwd) for call in calls)
        return self.result.returncode, [call["arguments"] for call in calls], calls


@pytest.fixture
def launch(tmp_path) -> Launch:
    return Launch(tmp_path)


def test_without_gpu_shows_plan_and_exits(launch):
    status, commands, calls = launch("--train.max-steps", "5")
    assert status == 2
    plan = ["-m", "myllm", "plan", "lf-llm-269m", "--train.max-steps", "5", "--gpus", "8xA100-80"]
    assert [call["arguments"] for call in calls] == commands == [plan]
    assert "--force" in launch.result.stderr
    assert "--dry-run" in launch.result.stderr
    assert "run_pre_training_e2e_debug.sh" in launch.result.stderr


def test_plan_without_gpu_tries_single_gpu(launch):
    status, commands, _ = launch("small-50m", FAILS_AT="8xA100-80", STATUS="2")
    assert (status, [command[-1] for command in commands]) == (2, ["8xA100-80", "1xA100-80"])
    assert "The plan above is for 1 x A100" in launch.result.stderr
    assert "Plan: small-50m, on 1 x A100" in launch.result.stdout


@pytest.mark.parametrize("arguments", ["--force small-50m --name x", "small-50m --name x --force"])
def test_force_trains_on_cpu_without_torchrun(launch, arguments):
    status, commands, calls = launch(*arguments.split(), RANK="3", LOCAL_RANK="3", WORLD_SIZE="4")
    run = [launch.pretrain, "small-50m", "--name", "x"]
    assert status == 0
    assert commands == [[*run, "--dry-run"], [*PREFLIGHT, *run[1:]], run]
    assert [call["WORLD_SIZE"] for call in calls] == ["1", None, None]
    assert {call["RANK"] for call in calls} == {call["LOCAL_RANK"] for call in calls} == {None}


@pytest.mark.parametrize("gpus", [1, 8])
def test_process_count_matches_gpus(launch, gpus):
    status, commands, calls = launch(gpus=gpus)
    torchrun = ["-m", "myllm.distributed.elastic", "--standalone", f"--nproc_per_node={gpus}"]
    assert status == 0
    assert commands[1:] == [[*torchrun, *PREFLIGHT, "lf-llm-269m"], [*torchrun, launch.pretrain, "lf-llm-269m"]]
    assert [call["WORLD_SIZE"] for call in calls] == [str(gpus), None, None]


@pytest.mark.parametrize("shell", ["sh", "dash"])
@pytest.mark.parametrize("script", ["run_pre_training_e2e.sh", "run_pre_training_e2e_debug.sh"])
def test_other_shells_reexec_bash(launch, shell, script):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    env = {"PATH": "/usr/bin:/bin", "LOG": str(launch.log_file), "GPUS": "0"}
    words = [shell, launch.root / script, "--dry-run", "--name", "my run"]
    done = subprocess.run(words, env=env, cwd=launch.cwd, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert "my run" in launch.log_file.read_text()


def test_symlinked_script_resolves_its_directory(launch, tmp_path):
    for name in ("run_pre_training_e2e.sh", "run_pre_training_e2e_debug.sh"):
        (tmp_path / "links" / "more").mkdir(parents=True, exist_ok=True)
        (tmp_path / "links" / name).symlink_to(launch.root / name)
        (tmp_path / "links" / "more" / name).symlink_to(Path("..", name))
        for link in (tmp_path / "links" / name, tmp_path / "links" / "more" / name):
            status, commands, _ = launch("--force", "--no-preflight", script=link)
            assert status == 0, launch.result.stderr
            assert commands[-1][0] == launch.pretrain


def test_multi_node_launch(launch):
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    status, commands, calls = launch("default-150m", gpus=4, **nodes)
    meeting = ["--rdzv_backend=c10d", "--rdzv_id=myllm", "--rdzv_endpoint=10.0.0.1:29500", "--rdzv_conf=is_host=0"]
    where = ["--nnodes=2", *meeting, "--nproc_per_node=4"]
    assert status == 0
    rehearsal = [word.replace("rdzv_id=myllm", "rdzv_id=myllm-preflight") for word in where]
    assert commands[1] == ["-m", "myllm.distributed.elastic", *rehearsal, *PREFLIGHT, "default-150m"]
    assert commands[2] == ["-m", "myllm.distributed.elastic", *where, launch.pretrain, "default-150m"]
    assert [call["WORLD_SIZE"] for call in calls] == ["8", None, None]


@pytest.mark.parametrize("nodes", [{"NNODES": "2", "NODE_RANK": "0"}, {"NNODES": "two"}, {"NNODES": "0"}])
def test_incomplete_node_settings_are_rejected(launch, nodes):
    status, commands, _ = launch(gpus=4, **nodes)
    assert (status, commands) == (2, [])
    if nodes["NNODES"] == "2":
        assert "MASTER_ADDR MASTER_PORT" in launch.result.stderr
    else:
        assert nodes["NNODES"] in launch.result.stderr


def test_overrides_pass_through_unchanged(launch):
    overrides = ["--data.source", "files:my texts/*.txt", "--name", "it's $HOME", "--empty", "", "--x=a  b", "*"]
    status, commands, _ = launch(*overrides, gpus=2)
    assert status == 0
    assert commands[-1][-len(overrides) :] == commands[1][-len(overrides) :] == overrides
    assert commands[0][2:-1] == overrides


def test_config_file_replaces_preset(launch):
    for words in (["--config", "my run.json"], ["--name", "x", "--config=my.json"]):
        status, commands, _ = launch(*words, gpus=2)
        assert status == 0
        assert commands[0] == [launch.pretrain, *words, "--dry-run"]
        assert commands[-1][-len(words) - 1 :] == [launch.pretrain, *words]


def test_debug_script_always_uses_single_process(launch):
    script = "run_pre_training_e2e_debug.sh"
    for gpus in (0, 4):
        status, commands, calls = launch("--name", "a b", gpus=gpus, script=script, NNODES="2")
        assert status == 0
        assert commands[1:] == [[*PREFLIGHT, "debug", "--name", "a b"], [launch.pretrain, "debug", "--name", "a b"]]
        assert [call["WORLD_SIZE"] for call in calls] == ["1", None, None]


def test_budget_options_reach_only_preflight(launch):
    words = ["--max-hours", "9.5", "small-50m", "--name", "x", "--dollars-per-hour=12"]
    status, commands, _ = launch(*words, gpus=1)
    assert status == 0
    assert commands[1][-6:] == ["small-50m", "--name", "x", "--max-hours", "9.5", "--dollars-per-hour=12"]
    assert commands[2][-4:] == [launch.pretrain, "small-50m", "--name", "x"]
    status, commands, _ = launch("small-50m", "--max-hours", gpus=1)
    assert (status, commands) == (2, [])
    assert "--max-hours needs a number" in launch.result.stderr


def test_no_preflight_option(launch):
    status, commands, _ = launch("small-50m", "--no-preflight", gpus=1)
    assert status == 0
    assert [command[-2:] for command in commands[1:]] == [[launch.pretrain, "small-50m"]]


@pytest.mark.parametrize("gpus", [0, 8])
def test_dry_run_and_prepare_need_no_gpu(launch, gpus):
    status, commands, _ = launch("--dry-run", "--name", "x", gpus=gpus)
    assert (status, commands) == (0, [[launch.pretrain, "lf-llm-269m", "--name", "x", "--dry-run"]])
    status, commands, _ = launch("small-50m", "--prepare-only", gpus=gpus)
    words = [launch.pretrain, "small-50m"]
    assert (status, commands) == (0, [[*words, "--dry-run"], [*words, "--prepare-only"]])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signals_are_forwarded_to_preflight(launch, tmp_path, number, status):
    """Nothing is left behind, and nothing is started after it."""
    lasting = write_script(tmp_path / "bin" / "lasting", f"#!{BASE_PYTHON}\n{LASTING}")
    write_script(launch.root / "src/environment.sh", f'#!/bin/sh\necho "{lasting}"\n')
    env = {"PATH": "/usr/bin:/bin", "LOG": str(launch.log_file), "GPUS": "0"}
    command = [launch.root / "run_pre_training_e2e.sh", "--force", "small-50m"]
    process = subprocess.Popen(command, env=env, cwd=launch.cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + DEADLINE_S
    while not launch.log_file.exists() or not launch.log_file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=DEADLINE_S) == status
    assert launch.log_file.read_text() == "began\nended\n"


@pytest.mark.parametrize(("stage", "n_calls"), [("--dry-run", 1), ("preflight", 2), ("train", 3)])
def test_failing_stage_status_is_returned(launch, stage, n_calls):
    status, commands, _ = launch(gpus=1, FAILS_AT=stage, STATUS="7")
    assert (status, len(commands)) == (7, n_calls)


@pytest.mark.parametrize("script", ["run_pre_training_e2e.sh", "run_pre_training_e2e_debug.sh"])
def test_help(launch, script):
    status, commands, _ = launch("-h", script=script)
    assert (status, commands) == (0, [])
    assert launch.result.stdout.startswith(f"Usage: ./{script}")
