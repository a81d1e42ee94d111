"""Training on a data set that is still being made: waiting for it, visibly, and on every rank together."""

import time

from myllm.data.dataloader import has_step
from myllm.data.dataset import Dataset
from myllm.data.prepare.status import describe_progress, raise_if_abandoned
from myllm.data.sampler import DataPosition, count_sequences
from myllm.distributed import collectives as distributed
from myllm.errors import UserError
from myllm.planning.batch import BatchPlan
from myllm.runs.logs import Log

from .stop_signals import StopRequest
from .throughput import ThroughputMeter

LOOK_EVERY_S = 0.5
SAY_EVERY_S = 30.0


def known_sequences(dataset: Dataset, batch: BatchPlan) -> int | None:
    """Sequences in an epoch; None while the data set grows, which is within the first."""
    return count_sequences(dataset.train.tokens, batch.seq_len) if dataset.complete else None


def wait_for_data(
    dataset: Dataset, position: DataPosition, batch: BatchPlan, stop: StopRequest, meter: ThroughputMeter, log: Log
) -> tuple[bool, UserError | None]:
    """Wait until every rank has the data of the next step.

    Returns:
        whether they are there (if not, someone asked to stop, or they will not come), and why they will not come.
    """
    started, said = time.perf_counter(), 0.0
    while True:
        failure: UserError | None = None
        here = has_step(dataset.train, position, batch)
        if not here:
            try:
                raise_if_abandoned(dataset)  # looks again at what is there
            except UserError as error:
                failure = error
            here = has_step(dataset.train, position, batch)
        missing, stopping, failed = distributed.all_reduce_any(not here, stop.requested(), failure is not None)
        if stopping:  # first: what stops a run may have ended the preparation too
            return False, None
        if failed:
            # A rank whose own data are all right says what the others met.
            return False, failure or UserError("the data of another rank will not come; see its message")
        if not missing:
            return True, None
        waited = time.perf_counter() - started
        if waited >= said:
            log(f"waiting for data: {describe_progress(dataset)}")
            said += SAY_EVERY_S
        # The wait alone: to count apart waits for the device, which a step that has its data should not.
        with meter.timed("waiting for data"):
            time.sleep(LOOK_EVERY_S)
