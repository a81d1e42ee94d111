"""What a rehearsal's figures mean for the whole run: a table, and the reasons not to start it."""

import bisect
from dataclasses import dataclass, field, replace
from math import ceil, isfinite
from typing import TYPE_CHECKING

from myllm.config import RunConfig
from myllm.distributed.collectives import DistContext
from myllm.distributed.device_info import device_name, has_triton
from myllm.distributed.precision import describe_precision
from myllm.evals.hellaswag import BATCH_SIZE
from myllm.formatting import format_bytes, format_clock, format_gib
from myllm.planning.batch import batch_plan
from myllm.planning.disk import checkpoint_bytes, n_added, n_saves
from myllm.planning.flops import flops_per_token
from myllm.planning.gpu_specs import peak_flops
from myllm.planning.length import describe_length
from myllm.planning.memory_estimate import ComputeMode, predicted_bytes

from .batch_size import nothing_fits_message

if TYPE_CHECKING:
    from .data_and_disk import DataAndDisk

CLOZE_BATCH = 8
HELLASWAG_EXAMPLES = 10_042


@dataclass(frozen=True)
class Limits:
    """What the user will pay."""

    max_hours: float | None = None
    """For the rest of the run."""
    dollars_per_hour: float | None = None
    """For all machines of the run together."""


@dataclass(frozen=True)
class Measurements:
    """Figures of a rehearsal."""

    step_s: float
    steps: int
    """Whole ones that were timed; 0: a part of one was."""
    share: float
    """Of a step's micro-steps that were timed."""
    loss: float
    grad_norm: float
    """Of the first step."""
    finite: bool = True
    peak_bytes: int = 0
    """Of the rank that used most."""
    evals: dict[str, tuple[float, str]] = field(default_factory=dict)
    """Seconds of one batch on each rank, and why it failed, by the evaluation's name."""
    save_s: float = 0.0
    load_s: float = 0.0
    checkpoint_bytes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "finite", self.finite and isfinite(self.loss) and isfinite(self.grad_norm))


def shorten_evals(config: RunConfig, world_size: int) -> RunConfig:
    """The config with one batch of each evaluation for each rank."""
    evals = config.eval
    return replace(
        config,
        eval=replace(
            evals,
            validation_tokens=config.train.micro_batch_size * config.model.max_seq_len * world_size,
            cloze_examples=min(evals.cloze_examples, CLOZE_BATCH * world_size),
            hellaswag_examples=min(evals.hellaswag_examples or HELLASWAG_EXAMPLES, BATCH_SIZE * world_size),
            sample_prompts=evals.sample_prompts[:1],
        ),
    )


def count_eval_batches(config: RunConfig, world_size: int) -> dict[str, int]:
    """Batches that one rank goes through in each evaluation; of samples, prompts."""
    evals, model = config.eval, config.model
    sequences = min(evals.validation_tokens, config.data.val_tokens) // model.max_seq_len
    hellaswag = evals.hellaswag_examples or HELLASWAG_EXAMPLES
    return {
        "validation": ceil(ceil(sequences / world_size) / config.train.micro_batch_size),
        "cloze": ceil(ceil(evals.cloze_examples / world_size) / CLOZE_BATCH),
        "hellaswag": ceil(ceil(hellaswag / BATCH_SIZE) / world_size),
        "samples": len(evals.sample_prompts),
    }


def count_due(every: int, done: int, max_steps: int) -> int:
    """How often something is done from step `done` on, that step included: at multiples of `every` and at the end."""
    if not every:
        return 0
    return max_steps // every - ceil(done / every) + 1 + (max_steps % every > 0)


@dataclass(frozen=True)
class PreflightResult:
    """A rehearsal of a run, and the run that it was of."""

    config: RunConfig
    process: DistContext
    bounds: Limits
    room: "DataAndDisk"
    limit_bytes: int
    """Memory that one rank may use."""
    done: int = 0
    """Steps that the run has behind it."""
    measured: Measurements | None = None
    out_of_memory: bool = False
    fits: int | None = None
    """The largest micro-batch size that does, if the config's does not."""

    # -- the whole run, from its parts --------------------------------------------------------------------------------

    @property
    def seconds_left(self) -> dict[str, float]:
        """By what takes them."""
        train, evals, measured = self.config.train, self.config.eval, self.measured
        batches = count_eval_batches(self.config, self.process.world_size)
        every = {
            "validation": evals.validation_every_steps, "cloze": evals.cloze_every_steps,
            "hellaswag": evals.hellaswag_every_steps, "samples": evals.sample_every_steps,
        }  # fmt: skip
        left = {"training": (train.max_steps - self.done) * measured.step_s}
        for name, (seconds, _) in measured.evals.items():
            left[name] = seconds * batches[name] * count_due(every[name], self.done, train.max_steps)
        saves = n_saves(train, self.done, train.max_steps)
        return left | {"saves": saves * measured.save_s}

    @property
    def checkpoint_bytes(self) -> int:
        measured = self.measured.checkpoint_bytes if self.measured else 0
        return measured or checkpoint_bytes(self.config)

    @property
    def has_room_to_save(self) -> bool:
        """Whether a rehearsal's own checkpoint does no harm."""
        return self.room.free_bytes > 2 * self.checkpoint_bytes

    @property
    def disk_bytes(self) -> dict[str, int]:
        """Still to be written, by what."""
        checkpoints = n_added(self.config) * self.checkpoint_bytes
        room = self.room
        return {
            "checkpoints": max(checkpoints - room.checkpoints_bytes, 0),
            "shards": room.shards_bytes,
            "downloads": room.downloads_bytes,
        }

    # -- for people ---------------------------------------------------------------------------------------------------

    def table(self) -> str:
        config, process, measured = self.config, self.process, self.measured
        if self.done >= config.train.max_steps:
            return (
                f"nothing left to train: the run {config.name} is at step {self.done:,} of {config.train.max_steps:,}"
            )
        batch = batch_plan(config, process.world_size)
        where = f"{process.world_size} x {device_name(process.device)} ({process.device.type})"
        precision = describe_precision(config.train.precision, process.device)
        lines = [f"preflight of {config.name} on {where}", f"batch        {batch}", f"precision    {precision}"]
        lines += self._memory_lines()
        if measured is not None:
            lines += self._step_lines(measured)
        if measured is not None and measured.finite:
            lines += self._time_lines()
        need, free = self.disk_bytes, self.room.free_bytes
        parts = ", ".join(f"{name} {format_bytes(n_bytes)}" for name, n_bytes in need.items() if n_bytes)
        lines.append(
            f"disk         {format_bytes(sum(need.values()))} to write ({parts or 'nothing'}); {format_bytes(free)} "
            "free"
        )
        return "\n".join([*lines, *self._token_lines()])

    def _memory_lines(self) -> list[str]:
        device = self.process.device
        mode = ComputeMode.of(self.config, device.type, self.process.world_size, has_triton(device))
        estimate = format_gib(predicted_bytes(self.config, mode))
        if self.measured is None:
            return [
                f"memory       more than the {format_gib(self.limit_bytes)} that one rank may use (estimate {estimate})"
            ]
        what = "resident memory" if device.type == "cpu" else "device memory"
        peak = format_gib(self.measured.peak_bytes)
        may = f"{format_gib(self.limit_bytes)} may be used"
        return [f"memory       {peak} at most, {what} of one rank (estimate {estimate}); {may}"]

    def _step_lines(self, measured: Measurements) -> list[str]:
        config, process = self.config, self.process
        tokens_per_s = config.train.batch_tokens / measured.step_s
        peak = peak_flops(device_name(process.device))
        mfu = flops_per_token(config.model) * tokens_per_s / (peak * process.world_size) if peak else None
        how = f"median of {measured.steps}" if measured.steps else f"from {measured.share:.1%} of one"
        return [
            f"first step   loss {measured.loss:.4f}, gradient norm {measured.grad_norm:.4g}",
            f"step         {measured.step_s:.3f} s ({how}), {tokens_per_s:,.0f} tokens/s"
            + (f", mfu {mfu:.1%}" if mfu else ""),
        ]

    def _time_lines(self) -> list[str]:
        measured, left = self.measured, self.seconds_left
        total = sum(left.values())
        parts = ", ".join(f"{name} {format_clock(seconds)}" for name, seconds in left.items() if seconds >= 0.5)
        lines = []
        if measured.checkpoint_bytes:
            estimate = checkpoint_bytes(self.config)
            lines.append(
                f"checkpoint   {format_bytes(measured.checkpoint_bytes)} (estimate {format_bytes(estimate)}), saved in "
                f"{measured.save_s:.1f} s, loaded in {measured.load_s:.1f} s"
            )
        after = f" after step {self.done:,}" if self.done else ""
        lines.append(f"time left    {format_clock(total)}{after}: {parts or 'nothing'}")
        if self.bounds.dollars_per_hour is not None:
            cost = total / 3_600 * self.bounds.dollars_per_hour
            lines.append(f"cost left    ${cost:,.2f} at ${self.bounds.dollars_per_hour:,.2f} an hour")
        return lines

    def _token_lines(self) -> list[str]:
        train, room = self.config.train, self.room
        if not room.tokens:
            wanted = train.max_steps * train.batch_tokens
            return [f"tokens       {wanted:,} to train on; how many {room.text} has is not known yet"]
        first, *others = describe_length(self.config, room.tokens, room.tokens_are_counted)
        return [f"tokens       {first} of {room.text}", *(f"             {line}" for line in others)]

    # -- why not to start ---------------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """One sentence a reason, with the number to change; empty where there is none."""
        measured = self.measured
        if self.done >= self.config.train.max_steps:
            return []
        found = [self._memory_refusal(), self._disk_refusal()]
        if measured is not None and not measured.finite:
            found.append(
                f"the first step is not finite (loss {measured.loss}, gradient norm {measured.grad_norm}): lower "
                f"optim.max_lr {self.config.optim.max_lr:g}, or set train.precision to float32"
            )
        elif measured is not None:
            found += [self._time_refusal(), *self._eval_refusals(measured)]
        return [each for each in found if each]

    def _memory_refusal(self) -> str:
        if not self.out_of_memory:
            return ""
        if self.fits is None:
            return nothing_fits_message(self.config, self.limit_bytes)
        return (
            f"out of memory: train.micro_batch_size {self.config.train.micro_batch_size} needs more than the "
            f"{format_gib(self.limit_bytes)} that one rank may use; set it to {self.fits}, the largest that fits"
        )

    def _disk_refusal(self) -> str:
        need, free = self.disk_bytes, self.room.free_bytes
        missing = sum(need.values()) - free
        if missing <= 0:
            return ""
        train, advice = self.config.train, []

        def too_many(keep: int) -> bool:
            fewer = replace(self, config=replace(self.config, train=replace(train, keep_last=keep)))
            return sum(fewer.disk_bytes.values()) > free

        keep = bisect.bisect_left(range(1, train.keep_last or train.max_steps), True, key=too_many)
        if keep:
            advice.append(f"lower train.keep_last from {train.keep_last or 'all (0)'} to {keep}")
        tokens = (need["shards"] - missing) // 2
        if need["shards"] > missing and tokens > 0:
            advice.append(f"set data.target_tokens to {tokens - self.config.data.val_tokens:,}")
        advice.append("free that much, or set MYLLM_DATA to a folder on a larger disk")
        parts = ", ".join(f"{name} {format_bytes(n_bytes)}" for name, n_bytes in need.items() if n_bytes)
        return (
            f"the disk of {self.room.folder} has {format_bytes(free)} free, the run writes about "
            f"{format_bytes(sum(need.values()))} "
            f"({parts}): {format_bytes(missing)} are missing; " + "; or ".join(advice)
        )

    def _time_refusal(self) -> str:
        most, total = self.bounds.max_hours, sum(self.seconds_left.values())
        if most is None or total <= most * 3_600:
            return ""
        steps = self.done + int((self.config.train.max_steps - self.done) * most * 3_600 / total)
        fewer = f"lower train.max_steps from {self.config.train.max_steps:,} to {steps:,}, or " if steps else ""
        return (
            f"the run needs {total / 3_600:,.2f} hours more, beyond --max-hours {most:g}; {fewer}raise --max-hours to "
            f"{ceil(total / 36) / 100:,.2f}"
        )

    def _eval_refusals(self, measured: Measurements) -> list[str]:
        found = []
        for name, (_, failure) in measured.evals.items():
            if failure:
                setting = "sample" if name == "samples" else name
                found.append(
                    f"{failure.partition(';')[0]}; lower train.micro_batch_size, or set eval.{setting}_every_steps to 0"
                )
        return found
