"""One rank on several machines: report the rank and the device that it would use, then train.

report_rank.py CONFIG.json FOLDER    writes FOLDER/rank<N>.json
"""

import json
import os
import sys
from pathlib import Path
from unittest import mock

from myllm.cli.errors import exit_on_error
from myllm.config import RunConfig, load_config
from myllm.data.prepare.background import prepare_in_background
from myllm.distributed import collectives, launcher
from myllm.training.loop import train

if __name__ == "__main__":
    config, folder = load_config(Path(sys.argv[1]), RunConfig()), Path(sys.argv[2])
    with mock.patch.object(collectives, "cuda_device_count", return_value=2):
        device = collectives.choose_device("cuda", launcher.local_rank())
    with (
        exit_on_error(),  # a mistake is not started again
        prepare_in_background(config.data, starts=launcher.local_rank() == 0) as dataset,
        collectives.process_group("cpu") as process,
    ):
        outcome = train(config, dataset, process)
    about = {
        "machine": os.environ["MYLLM_DATA"], "rank": process.rank, "local_rank": process.local_rank,
        "world_size": process.world_size, "device": str(device),
        "main": process.is_rank_zero, "step": outcome.step, "dataset": str(dataset.folder),
    }  # fmt: skip
    (folder / f"rank{process.rank}.json").write_text(json.dumps(about))
