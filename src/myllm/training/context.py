"""What every part of a training run shares."""

from collections.abc import Callable
from dataclasses import dataclass

from myllm.config import RunConfig
from myllm.distributed.collectives import DistContext
from myllm.paths import RunPaths
from myllm.runs.logs import JsonlFile, Log


@dataclass(frozen=True)
class RunContext:
    """Created once per run. Functions that need only one of these take that one."""

    config: RunConfig
    dist: DistContext
    paths: RunPaths
    log: Callable[[str], None]
    metrics: JsonlFile
    samples: JsonlFile

    @classmethod
    def create(cls, config: RunConfig, dist: DistContext, paths: RunPaths | None = None) -> "RunContext":
        """Opens nothing: the files appear with their first lines.

        Args:
            paths: None: the folder of the run that has the config's name.
        """
        paths = paths or RunPaths.of(config.name)
        log = Log(paths.log, dist.is_rank_zero)
        return cls(config, dist, paths, log, JsonlFile(paths.metrics, log), JsonlFile(paths.samples, log))
