"""Trials: whole training runs that a command starts, compares, and never trains twice.

A trial is an ordinary run, trained by pretrain.py in a process of its own; `myllm report NAME` draws it. That process
can be killed at any moment, and so can the one that waits for it: the next start continues. The run's folder also has
trial.json, the config of the trial, trial.log, the output of its process, and given_up, if it was.
"""

import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from myllm.config import CheckpointConfig, HubConfig, RunConfig, load_config, to_dict
from myllm.distributed.cpu_threads import num_threads
from myllm.distributed.library_env import visible_gpus
from myllm.errors import TrainingDiverged, UserError, bullets
from myllm.files import is_locked, write_json
from myllm.paths import RunPaths, is_checkout, project_root
from myllm.presets import diff_settings
from myllm.runs.history import as_float, read_json_or_empty, read_metrics
from myllm.training.stop_signals import raise_exit, signal_handler

POLL_S, READ_EVERY_S = 0.1, 1.0
LAST_LINES = 12
MEASURED_STEPS = 20
SAVES = 4
"""Checkpoints of a trial, evenly spaced, each in place of the one before. None is kept after the end."""
HOPELESS_FROM = 5
"""Tenths of a run after which it can be given up."""
Limit = Callable[[RunConfig, int], float]
"""The training loss above which a trial is given up after some steps."""


@dataclass(frozen=True)
class TrialResult:
    """The outcome of a trial."""

    name: str
    loss: float
    """Final validation loss, in nats per token; infinite if the run diverged or was given up."""
    tokens: int
    seconds: float
    """In training steps."""


@dataclass(frozen=True)
class Share:
    """The part of the machine that one of several trials gets."""

    threads: int | None = None
    """None: as pretrain.py decides."""
    gpus: tuple[str, ...] = ()
    """As in CUDA_VISIBLE_DEVICES."""


def as_trial(config: RunConfig) -> RunConfig:
    """The config without what a comparison of final losses does not need: other evaluations, checkpoints to keep."""
    train, steps = config.train, config.train.max_steps
    return replace(
        config,
        train=replace(
            train, save_every_steps=-(-steps // SAVES), keep_last=1, keep_every_steps=0, early_stop_patience=None,
            early_stop_on=None, max_wall_s=None, fresh=False,
            log_every_steps=min(train.log_every_steps, max(steps // 20, 1)),
        ),
        eval=replace(
            config.eval, validation_every_steps=steps, cloze_every_steps=0, hellaswag_every_steps=0,
            tasks=(), validation_sets=(), sample_every_steps=0,
        ),
        checkpoint=CheckpointConfig(),
        hub=HubConfig(),
    )  # fmt: skip


def run_trials(
    configs: Iterable[RunConfig], jobs: int = 1, limit: Limit | None = None
) -> Generator[TrialResult, None, None]:
    """Train trials, several at a time, and read the results of those that are complete.

    Ctrl-C and SIGTERM stop them; they save, and the same call continues.

    Args:
        configs: each is changed by `as_trial`. The next one is taken when there is room for it, so it may depend on the
            results so far. All train on the device of the first.
        jobs: trials at a time. Each gets an equal share of the cores or of the GPUs.
        limit: a trial in the second half of its steps whose training loss is above this is given up; called for each
            tenth of its steps.

    Yields:
        results in the order in which the trials end.

    Raises:
        UserError: a trial failed, or its name is that of another run.
    """
    if not is_checkout():
        raise UserError("this command needs pretrain.py; run it from a clone of the repository")
    waiting, running = iter(configs), list[_TrialProcess]()
    first = next(waiting, None)
    if first is None:
        return
    waiting, free = chain([first], waiting), machine_shares(first.train.device, jobs)
    # The trials are told to stop, as by Ctrl-C.
    with signal_handler((signal.SIGTERM, signal.SIGHUP), raise_exit):
        try:
            while True:
                while free and (config := next(waiting, None)) is not None:
                    config = as_trial(config)
                    if result := finished(config):
                        yield result
                    else:
                        running.append(_TrialProcess(config, free.pop()))
                if not running:
                    return
                for trial in [trial for trial in running if trial.ended(limit)]:
                    running.remove(trial)
                    free.append(trial.share)
                    yield trial.result()
                time.sleep(POLL_S)
        finally:
            _stop(running)


def seconds_per_token(configs: Sequence[RunConfig], jobs: int = 1) -> list[float]:
    """Measure the speed of configs with runs of MEASURED_STEPS, which leave nothing behind."""
    short = {}
    for config in configs:
        train = replace(config.train, max_steps=min(MEASURED_STEPS, config.train.max_steps))
        short[f"{config.name}-speed"] = replace(config, name=f"{config.name}-speed", train=train)
    seconds = {result.name: result.seconds for result in run_trials(short.values(), jobs)}
    for name in short:
        shutil.rmtree(RunPaths.of(name).root)
    return [seconds[name] / (run.train.max_steps * run.train.batch_tokens) for name, run in short.items()]


def finished(config: RunConfig) -> TrialResult | None:
    """The result of a trial that is complete; None if there is something left to train.

    Args:
        config: as `as_trial` returns it.

    Raises:
        UserError: the run of this name is no trial, or one with other settings.
    """
    run = RunPaths.of(config.name)
    if not run.trial.is_file():
        if run.metrics.is_file():
            raise UserError(f"the run {config.name} in {run.root} is not a trial of this command; move it away")
        return None
    different = diff_settings(load_config(run.trial, RunConfig()), config)
    if different:
        changes = bullets(f"{name}: {old} -> {new}" for name, (old, new) in different.items())
        raise UserError(
            f"the trial {config.name} was trained with other settings:\n{changes}\n"
            f"give the same ones, another name, or remove {run.root}"
        )
    code = read_json_or_empty(run.heartbeat).get("exit_code")
    if code not in (0, TrainingDiverged.EXIT_CODE) and not _given_up_file(run).exists():
        return None
    metrics = read_metrics(run.metrics)
    validation = metrics.last("validation")
    if code == 0 and validation.get("step") != config.train.max_steps:
        return None
    loss, seconds = as_float(validation.get("loss")) if code == 0 else math.nan, metrics.training_s()
    tokens = int(metrics.last().get("tokens") or 0)
    return TrialResult(
        config.name, loss if math.isfinite(loss) else math.inf, tokens, 0.0 if math.isnan(seconds) else seconds
    )


def machine_shares(device: str, jobs: int) -> list[Share]:
    """Equal parts of the machine for `jobs` trials at a time.

    Args:
        device: as in `train.device`.

    Raises:
        UserError: there are fewer GPUs than trials.
    """
    if device in ("auto", "cuda"):
        from myllm.distributed.device_info import cuda_device_count

        if n_gpus := cuda_device_count():
            if jobs > n_gpus:
                raise UserError(f"--jobs is {jobs}, but there are {n_gpus} GPUs; a trial needs at least one")
            names = (visible_gpus() or ",".join(map(str, range(n_gpus)))).split(",")[:n_gpus]
            per_job = n_gpus // jobs
            return [Share(None, tuple(names[job * per_job : (job + 1) * per_job])) for job in range(jobs)]
    threads = num_threads() if jobs > 1 else None  # also None if the user has chosen a number
    return [Share(max(threads // jobs, 1) if threads else None)] * jobs


class _TrialProcess:
    """A trial that trains in a process of its own."""

    def __init__(self, config: RunConfig, share: Share) -> None:
        """Start it, or wait for the process that an earlier start of this command left behind."""
        self.config, self.share, self.run = config, share, RunPaths.of(config.name)
        self.run.root.mkdir(parents=True, exist_ok=True)
        write_json(self.run.trial, to_dict(config))
        self.process: subprocess.Popen[bytes] | None = None
        self._given_up, self._read_at, self._checked_tenths = _given_up_file(self.run), 0.0, 0

    def ended(self, limit: Limit | None) -> bool:
        """True after the end of the process. Stops it if its loss is above the limit.

        Raises:
            UserError: it failed.
        """
        if self.process is None:
            if self._is_held():
                return False
            if finished(self.config):  # by the process that was left behind
                return True
            self.process = self._start()
            return False
        code = self.process.poll()
        if code is None:
            if limit and not self._given_up.exists() and self._is_hopeless(limit):
                self.process.send_signal(signal.SIGTERM)
                self._given_up.touch()
            return False
        # A process left behind held the folder only after this one had begun; it may have ended.
        if code == 2 and (self._is_held() or finished(self.config)):
            self.process = None
            return False
        if code not in (0, TrainingDiverged.EXIT_CODE) and not self._given_up.exists():
            raise UserError(f"the trial {self.config.name} ended with exit code {code}:{self._last_lines()}")
        return True

    def result(self) -> TrialResult:
        """The result after the end. The checkpoints are removed: they are most of what a run has on the disk.

        Raises:
            UserError: the run is complete but has no validation loss.
        """
        result = finished(self.config)
        if result is None:
            raise UserError(f"the trial {self.config.name} has no final validation loss:{self._last_lines()}")
        for folder in (self.run.checkpoints, self.run.anomalies):
            shutil.rmtree(folder, ignore_errors=True)
        return result

    def _start(self) -> subprocess.Popen[bytes]:
        threads, gpus = self.share.threads, self.share.gpus
        variables = [f"OMP_NUM_THREADS={threads}"] if threads else []
        variables += [f"CUDA_VISIBLE_DEVICES={','.join(gpus)}"] if gpus else []
        return start_training(["--config", str(self.run.trial)], self._log, len(gpus), variables)

    def _is_hopeless(self, limit: Limit) -> bool:
        """True if the training loss is above the limit after another tenth of the steps, in the second half."""
        if time.monotonic() < self._read_at + READ_EVERY_S or not self.run.metrics.is_file():
            return False
        self._read_at = time.monotonic()
        step, loss = recent_loss(self.run)
        tenths = 10 * step // self.config.train.max_steps
        if tenths < max(HOPELESS_FROM, self._checked_tenths + 1):
            return False
        self._checked_tenths = tenths
        return loss > limit(self.config, step)

    def _is_held(self) -> bool:
        return is_locked(self.run.root / ".lock")

    def _last_lines(self) -> str:
        return f"{last_lines(self._log)}\nall of it is in {self._log}"

    @property
    def _log(self) -> Path:
        return self.run.root / "trial.log"


def start_training(
    words: Sequence[str],
    log: Path,
    ranks: int = 1,
    variables: Sequence[str] = (),
    launcher: str = "myllm.distributed.elastic",
) -> subprocess.Popen[bytes]:
    """Start pretrain.py in a process of its own, or a launcher with several ranks of it.

    Its output is appended to the log. `variables` are NAME=VALUE, added to the environment.
    """
    # The process must not take part in a torchrun that may have started this one.
    command = ["env", "-u", "RANK", "-u", "LOCAL_RANK", "-u", "WORLD_SIZE", *variables, sys.executable]
    if ranks > 1:
        command += ["-m", launcher, "--standalone", f"--nproc_per_node={ranks}"]
    with log.open("ab") as out:
        # A session of its own: Ctrl-C reaches this process first, which passes it on once.
        return subprocess.Popen(
            [*command, str(project_root() / "pretrain.py"), *words],
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def last_lines(log: Path) -> str:
    """The end of a log, indented, each line after a line break."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    return "".join(f"\n    {line}" for line in lines)


def recent_loss(run: RunPaths, step: int | None = None) -> tuple[int, float]:
    """The last logged step (up to `step`), and the mean loss of the newest tenth of them; NaN if there are none."""
    try:
        rows = read_metrics(run.metrics).train
    except UserError:  # no row yet
        return 0, math.nan
    rows = [row for row in rows if step is None or row["step"] <= step]
    newest = rows[-max(len(rows) // 10, 1) :]
    losses = [as_float(row.get("loss")) for row in newest]
    return (rows[-1]["step"], sum(losses) / len(losses)) if rows else (0, math.nan)


def _given_up_file(run: RunPaths) -> Path:
    return run.root / "given_up"


def _stop(trials: list[_TrialProcess]) -> None:
    """Have the trials save and stop, and wait for them. Another Ctrl-C kills them."""
    processes = [trial.process for trial in trials if trial.process and trial.process.poll() is None]
    try:
        for process in processes:
            process.send_signal(signal.SIGINT)
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        raise
