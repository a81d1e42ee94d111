"""What every part of a training run shares."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from myllm.config import RunConfig
from myllm.distributed.collectives import DistContext
from myllm.paths import RunPaths
from myllm.runs.logs import JsonlFile, Log


@dataclass(frozen=True)
class RunContext:
    """Created once per run. A function that needs only one of these takes that one."""

    config: RunConfig
    dist: DistContext
    paths: RunPaths
    log: Callable[[str], None]
    metrics: JsonlFile
    samples: JsonlFile
    started: float
    """When this process began, by the monotonic clock. `train.max_wall_s` counts from here."""

    @classmethod
    def create(
        cls,
        config: RunConfig,
        dist: DistContext,
        paths: RunPaths | None = None,
        log: Callable[[str], None] | None = None,
        started: float | None = None,
    ) -> "RunContext":
        """Creates no file: each appears with its first line.

        Args:
            paths: None: the folder of the run that the config names.
            log: None: log.txt in that folder, and the terminal.
            started: None: now.
        """
        paths = paths or RunPaths.of(config.name)
        log = log or Log(paths.log, dist.is_rank_zero)
        metrics, samples = JsonlFile(paths.metrics, log), JsonlFile(paths.samples, log)
        return cls(config, dist, paths, log, metrics, samples, time.monotonic() if started is None else started)
