"""A micro-batch that needs too much memory, in a process of its own, whose memory no other test has used.

oversized_micro_batch.py CONFIG.json    prints a JSON object; the limit is half-way between the peaks of one sequence
                                        and of the config's micro-batch
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch

from myllm.config import RunConfig, load_config
from myllm.data.tokenizer.load import load_tokenizer
from myllm.distributed.collectives import DistContext
from myllm.errors import UserError
from myllm.planning.forecast import with_micro_batch_size
from myllm.training.preflight import batch_size, rehearsal
from myllm.training.preflight.batch_size import measure_peak_bytes, resolve_micro_batch_size
from myllm.training.preflight.scratch import random_dataset, scratch_folder
from myllm.training.preflight.summary import Limits

ALONE = DistContext(0, 0, 1, torch.device("cpu"))


def main(config: RunConfig) -> dict[str, object]:
    tokenizer, size = load_tokenizer("r50k_base"), config.train.micro_batch_size
    with scratch_folder(ALONE) as folder:
        dataset = random_dataset(config, folder, tokenizer, ALONE)
        measure = partial(measure_peak_bytes, dataset=dataset, dist=ALONE, limit_bytes=2**40)
        # Of one sequence twice: the first steps of a process leave some of their memory behind.
        _, *peaks = [measure(with_micro_batch_size(config, tried)) for tried in (1, 1, size)]
    limit = sum(peaks) // 2
    # The estimate would refuse the size untried.
    batch_size.is_safe_to_try = rehearsal.is_safe_to_try = lambda *_: True
    result = rehearsal.preflight(config, ALONE, Limits(), lambda line: None, limit)
    auto = with_micro_batch_size(config, "auto")
    resolved, _ = resolve_micro_batch_size(auto, tokenizer, ALONE, limit_bytes=limit)
    try:
        refusal = str(resolve_micro_batch_size(auto, tokenizer, ALONE, limit_bytes=1_000))
    except UserError as error:
        refusal = f"error: {error}"
    return {
        "peaks": peaks, "out_of_memory": result.out_of_memory, "fitting_size": result.fitting_size,
        "problems": result.problems(), "auto": resolved.train.micro_batch_size, "refusal": refusal,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(load_config(Path(sys.argv[1]), RunConfig()))))
