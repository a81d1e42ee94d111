"""Experiment trackers behind one interface. Each package is imported when its tracker starts, and never by training.

    tensorboard   RUN/tensorboard; each start writes the whole curve again and hides the earlier one (purge_step)
    wandb         RUN/wandb; offline without an account, and then uploaded with `wandb sync`
    trackio       its own database, in ~/.cache/huggingface/trackio
    mlflow        the server of MLFLOW_TRACKING_URI, else temp_data/mlflow.db

Trackers other than TensorBoard cannot take rows back: `rows.SentRows` remembers what they have.
"""

import shlex
import time
from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import Any

from myllm import paths
from myllm.errors import UserError
from myllm.runs.history import flatten

PROJECT = "myllm"
"""Project or experiment, where the user's environment names no other."""


class Tracker(ABC):
    """A run in a tracker. A second object for the same `id` continues its curve."""

    keeps_rows = True
    """False: it starts empty, and needs all rows again."""

    @abstractmethod
    def __init__(self, run: paths.RunPaths, id: str, config: dict[str, Any]) -> None: ...

    @abstractmethod
    def log(self, step: int, figures: dict[str, float]) -> None:
        """Add figures such as "train/loss" at a step, which never decreases."""

    @abstractmethod
    def close(self) -> None:
        """Wait until all is stored."""

    def flush(self) -> None:  # noqa: B027 (most trackers have nothing to do)
        """Make what was logged visible, where the tracker does not do so by itself."""


class TensorBoard(Tracker):
    """Event files that `tensorboard --logdir temp_data/runs` reads."""

    keeps_rows = False

    def __init__(self, run: paths.RunPaths, id: str, config: dict[str, Any]) -> None:
        # What torch.utils.tensorboard.SummaryWriter is made of: without torch it starts in a fraction of a second.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(run.tensorboard))
        # Readers drop what earlier files of the folder say of steps from 0 on.
        self._add(0, session_log=SessionLog(status=SessionLog.START))
        settings = "".join(f"    {name}: {value}\n" for name, value in flatten(config).items())
        self._add(0, summary=text_pb("config", settings))

    def log(self, step: int, figures: dict[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._add(step, summary=self._summary(value=values))

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event(step=step, wall_time=time.time(), **content))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases: its own variables (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, ...) hold."""

    def __init__(self, run: paths.RunPaths, id: str, config: dict[str, Any]) -> None:
        import wandb

        environment = wandb.setup().settings
        offline = environment.mode == "online" and not wandb.login(prompt=False)
        self._run = wandb.init(
            project=environment.project or PROJECT, id=id, name=run.root.name, config=config, dir=str(run.root),
            mode="offline" if offline else None, resume="allow",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )  # fmt: skip

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # waits until its service has written the file


class Trackio(Tracker):
    """A run of trackio; its own variables (TRACKIO_DIR, ...) hold."""

    def __init__(self, run: paths.RunPaths, id: str, config: dict[str, Any]) -> None:
        import trackio

        # trackio continues a run by its name, and a run that was started over is another one.
        self._run = trackio.init(
            PROJECT, f"{run.root.name}-{id}", config=config, resume="allow", embed=False, auto_log_cpu=False,
            auto_log_gpu=False,
        )  # fmt: skip

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow(Tracker):
    """A run of MLflow, in the server or folder that its own variables name."""

    def __init__(self, run: paths.RunPaths, id: str, config: dict[str, Any]) -> None:
        import mlflow

        uri = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else _mlflow_file()
        self._client = mlflow.MlflowClient(uri)
        found = self._client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
        # MLflow chooses its own ids, so ours is a tag.
        runs = self._client.search_runs([experiment], f"tags.{PROJECT}_id = '{id}'")
        new = None if runs else self._client.create_run(experiment, tags={f"{PROJECT}_id": id}, run_name=run.root.name)
        self._id = (new or runs[0]).info.run_id
        self._client.update_run(self._id, status="RUNNING")
        if new:
            from mlflow.entities import Param

            settings = [Param(name, str(value)) for name, value in flatten(config).items()]
            self._client.log_batch(self._id, params=settings)

    def log(self, step: int, figures: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in figures.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
    "mlflow": MLflow,
}
"""By the name of the package."""


def view_command(name: str, run: paths.RunPaths) -> str:
    """What to type to look at a tracker."""
    commands = {
        "tensorboard": f"tensorboard --logdir {shlex.quote(str(run.root.parent))}",
        "wandb": f"wandb sync {shlex.quote(str(run.root))}/wandb/offline-run-*, if it is offline",
        "trackio": f"trackio show --project {PROJECT}",
        "mlflow": f"mlflow ui --backend-store-uri {_mlflow_file()}, if MLFLOW_TRACKING_URI is not set",
    }
    return commands[name]


def _mlflow_file() -> str:
    return f"sqlite:///{paths.temp_data()}/mlflow.db"


def check_installed(names: tuple[str, ...]) -> None:
    """
    Raises:
        UserError: a tracker's package is missing.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"the tracker {name} needs the package {name}, which is not installed: pip install {name}, or all "
                "trackers with pip install -e '.[trackers]'"
            )
