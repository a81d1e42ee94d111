"""Train on several ranks, of which the second measures another validation loss, which must not matter."""

import json
import sys
from pathlib import Path

from myllm.config import RunConfig, load_config
from myllm.data.prepare.prepare import prepare
from myllm.distributed.collectives import process_group
from myllm.evals import perplexity
from myllm.training.loop import train

if __name__ == "__main__":
    config = load_config(Path(sys.argv[1]), RunConfig())
    with process_group("cpu") as process:
        real = perplexity.finish
        falling = iter(range(100, 0, -1))  # left to itself, this rank would never run out of patience
        if not process.is_rank_zero:
            perplexity.finish = lambda sums: real(sums) | {"loss": float(next(falling))}
        outcome = train(config, prepare(config.data, progress=False), process)
        result = {"step": outcome.step, "stopped_early": outcome.stopped_early}
        Path(sys.argv[2], f"rank{process.rank}.json").write_text(json.dumps(result))
