"""What a rehearsal means for the whole run: time, cost, memory and disk as a table, and the problems it would have."""

from dataclasses import dataclass, field, replace
from math import ceil

from myllm.config import EvalConfig, RunConfig
from myllm.data.inspect import PROMPTS
from myllm.distributed.collectives import DistContext
from myllm.distributed.device_info import device_name, has_triton
from myllm.distributed.precision import describe_precision
from myllm.evals.choice import BATCH_SIZE
from myllm.evals.tasks import TASKS
from myllm.formatting import format_bytes, format_clock, format_gib
from myllm.planning.batch import batch_plan
from myllm.planning.disk import checkpoint_bytes, n_added, n_saves
from myllm.planning.flops import flops_per_token
from myllm.planning.gpu_specs import peak_flops
from myllm.planning.memory_estimate import ComputeMode, predicted_bytes

from .batch_size import nothing_fits_message
from .data_and_disk import DataAndDisk


@dataclass(frozen=True)
class Limits:
    """Command-line limits and prices."""

    max_hours: float | None = None
    """For the rest of the run."""
    dollars_per_hour: float | None = None
    """For all machines of the run together."""


@dataclass(frozen=True)
class Measurements:
    """Results of a rehearsal."""

    step_s: float
    steps: int
    """Whole steps that were timed. 0: a part of one was."""
    fraction: float
    """Of a step's micro-steps that were timed."""
    loss: float
    grad_norm: float
    """Of the first step."""
    finite: bool = True
    """Loss, gradient norm and the weights after these steps."""
    peak_bytes: int = 0
    """Of the rank that used most."""
    evals: dict[str, tuple[float, str]] = field(default_factory=dict)
    """Seconds of one batch on each rank, and the error if it failed, by the evaluation's name."""
    save_s: float = 0.0
    load_s: float = 0.0
    checkpoint_bytes: int = 0


def shorten_evals(config: RunConfig, world_size: int) -> RunConfig:
    """The config with one batch of each evaluation for each rank."""
    evals = config.eval
    short = replace(
        evals,
        validation_tokens=batch_plan(config, world_size).micro_tokens,
        cloze_examples=min(evals.cloze_examples, BATCH_SIZE * world_size),
        hellaswag_examples=min(_n_examples("hellaswag", evals), BATCH_SIZE * world_size),
        tasks_examples=min(evals.tasks_examples or BATCH_SIZE * world_size, BATCH_SIZE * world_size),
        sample_prompts=evals.sample_prompts[:1] or ("text",),
    )
    return replace(config, eval=short)


def count_eval_batches(config: RunConfig, world_size: int) -> dict[str, int]:
    """Batches of one rank in each evaluation; for samples, prompts."""
    evals, model = config.eval, config.model
    sequences = min(evals.validation_tokens, config.data.val_tokens) // model.max_seq_len
    public = ["hellaswag", *(task.partition(":")[0] for task in evals.tasks)]
    return {
        "validation": ceil(ceil(sequences / world_size) / batch_plan(config, world_size).micro_batch_size),
        "cloze": ceil(ceil(evals.cloze_examples / BATCH_SIZE) / world_size),
        **{name: ceil(ceil(_n_examples(name, evals) / BATCH_SIZE) / world_size) for name in public},
        "samples": len(evals.sample_prompts) or PROMPTS,
    }


def _n_examples(name: str, evals: EvalConfig) -> int:
    """Examples of a public task that a run uses."""
    wanted = evals.hellaswag_examples if name == "hellaswag" else evals.tasks_examples
    return min(wanted or TASKS[name].n_examples, TASKS[name].n_examples)


def count_due(every: int, step: int, max_steps: int) -> int:
    """How often an evaluation runs from `step` on, that step included: at multiples of `every` and at the end."""
    if not every:
        return 0
    return max_steps // every - ceil(step / every) + 1 + (max_steps % every > 0)


@dataclass(frozen=True)
class PreflightResult:
    """A run and its rehearsal."""

    config: RunConfig
    dist: DistContext
    limits: Limits
    storage: DataAndDisk
    limit_bytes: int
    """Memory that one rank may use."""
    steps_done: int = 0
    measured: Measurements | None = None
    out_of_memory: bool = False
    fitting_size: int | None = None
    """The largest micro-batch size that fits, if the configured one does not."""

    # -- from the parts to the whole run ------------------------------------------------------------------------------

    @property
    def is_complete(self) -> bool:
        return self.steps_done >= self.config.train.max_steps

    @property
    def seconds_left(self) -> dict[str, float]:
        """By activity."""
        train, evals, measured = self.config.train, self.config.eval, self.measured
        assert measured is not None
        batches = count_eval_batches(self.config, self.dist.world_size)
        cadences = {
            "validation": evals.validation_every_steps, "cloze": evals.cloze_every_steps,
            "hellaswag": evals.hellaswag_every_steps, "samples": evals.sample_every_steps,
            **{task.partition(":")[0]: evals.tasks_every_steps for task in evals.tasks},
        }  # fmt: skip
        left = {"training": (train.max_steps - self.steps_done) * measured.step_s}
        for name, (seconds, _) in measured.evals.items():
            left[name] = seconds * batches[name] * count_due(cadences[name], self.steps_done, train.max_steps)
        return left | {"saves": n_saves(train, self.steps_done, train.max_steps) * measured.save_s}

    @property
    def checkpoint_bytes(self) -> int:
        measured = self.measured.checkpoint_bytes if self.measured else 0
        return measured or checkpoint_bytes(self.config)

    @property
    def has_space_to_save(self) -> bool:
        """True if the rehearsal's own checkpoint does not fill the disk."""
        return self.storage.free_bytes > 2 * self.checkpoint_bytes

    @property
    def disk_bytes(self) -> dict[str, int]:
        """Still to be written, by kind."""
        return {
            "checkpoints": max(n_added(self.config) * self.checkpoint_bytes - self.storage.run_bytes, 0),
            "shards": self.storage.shards_bytes,
            "downloads": self.storage.downloads_bytes,
        }

    # -- as text ------------------------------------------------------------------------------------------------------

    def table(self) -> str:
        config, device, measured = self.config, self.dist.device, self.measured
        if self.is_complete:
            return f"nothing left to train: {config.name} is at step {self.steps_done:,} of {config.train.max_steps:,}"
        return "\n".join(
            [
                f"preflight of {config.name} on {self.dist.world_size} x {device_name(device)} ({device.type})",
                f"batch        {batch_plan(config, self.dist.world_size)}",
                f"precision    {describe_precision(config.train.precision, device)}",
                self._memory_line(),
                *(self._step_lines(measured) if measured else []),
                *(self._time_lines(measured) if measured and measured.finite else []),
                f"disk         {self._disk_use()}; {format_bytes(self.storage.free_bytes)} free",
                *self._token_lines(),
            ]
        )

    def _memory_line(self) -> str:
        device, limit = self.dist.device, format_gib(self.limit_bytes)
        mode = ComputeMode.of(self.config, device.type, self.dist.world_size, has_triton(device))
        estimate = format_gib(predicted_bytes(self.config, mode))
        if self.measured is None:
            return f"memory       more than the {limit} that one rank may use (estimate {estimate})"
        kind = "resident memory" if device.type == "cpu" else "device memory"
        peak = format_gib(self.measured.peak_bytes)
        return f"memory       {peak} peak {kind} of one rank (estimate {estimate}), {limit} allowed"

    def _step_lines(self, measured: Measurements) -> list[str]:
        tokens_per_s = self.config.train.batch_tokens / measured.step_s
        peak = peak_flops(device_name(self.dist.device))
        flops = flops_per_token(self.config.model) * tokens_per_s
        mfu = f", mfu {flops / (peak * self.dist.world_size):.1%}" if peak else ""
        basis = f"median of {measured.steps}" if measured.steps else f"from {measured.fraction:.1%} of one"
        return [
            f"first step   loss {measured.loss:.4f}, gradient norm {measured.grad_norm:.4g}",
            f"step         {measured.step_s:.3f} s ({basis}), {tokens_per_s:,.0f} tokens/s{mfu}",
        ]

    def _time_lines(self, measured: Measurements) -> list[str]:
        left, lines, price = self.seconds_left, [], self.limits.dollars_per_hour
        total = sum(left.values())
        if measured.checkpoint_bytes:
            lines.append(
                f"checkpoint   {format_bytes(measured.checkpoint_bytes)} (estimate "
                f"{format_bytes(checkpoint_bytes(self.config))}), saved in {measured.save_s:.1f} s, loaded in "
                f"{measured.load_s:.1f} s"
            )
        parts = ", ".join(f"{name} {format_clock(seconds)}" for name, seconds in left.items() if seconds >= 0.5)
        after = f" after step {self.steps_done:,}" if self.steps_done else ""
        lines.append(f"time left    {format_clock(total)}{after}: {parts or 'nothing'}")
        if price is not None:
            lines.append(f"cost left    ${total / 3_600 * price:,.2f} at ${price:,.2f} per hour")
        return lines

    def _disk_use(self) -> str:
        need = self.disk_bytes
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in need.items() if size)
        return f"{format_bytes(sum(need.values()))} to write ({parts or 'nothing'})"

    def _token_lines(self) -> list[str]:
        train, storage = self.config.train, self.storage
        if not storage.tokens:
            tokens = train.max_steps * train.batch_tokens
            return [f"tokens       {tokens:,}; the number of tokens in {storage.source} is not known yet"]
        first, *notes = storage.describe_length(self.config)
        return [f"tokens       {first} of {storage.source}", *(f"             {note}" for note in notes)]

    # -- problems -----------------------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """One sentence per problem, with the setting to change."""
        measured = self.measured
        if self.is_complete:
            return []
        problems = [self._memory_problem(), self._disk_problem()]
        if measured is not None and not measured.finite:
            problems.append(
                f"the first step is not finite (loss {measured.loss}, gradient norm {measured.grad_norm}): lower "
                f"optim.max_lr {self.config.optim.max_lr:g}, or set train.precision to float32"
            )
        elif measured is not None:
            problems += [self._time_problem(), *self._eval_problems(measured)]
        return [problem for problem in problems if problem]

    def _memory_problem(self) -> str:
        if not self.out_of_memory:
            return ""
        if self.fitting_size is None:
            return nothing_fits_message(self.config, self.limit_bytes)
        return (
            f"out of memory: train.micro_batch_size {self.config.train.micro_batch_size} needs more than "
            f"the {format_gib(self.limit_bytes)} that one rank may use; set it to {self.fitting_size}, the largest "
            "that fits"
        )

    def _disk_problem(self) -> str:
        need, free, train = self.disk_bytes, self.storage.free_bytes, self.config.train
        missing = sum(need.values()) - free
        if missing <= 0:
            return ""
        settings = {
            "checkpoints": f"lower train.keep_last from {train.keep_last or 'all (0)'}",
            "shards": "lower data.target_tokens",
        }
        advice = [setting for name, setting in settings.items() if need[name]]
        return (
            f"not enough disk space at {self.storage.folder}: {self._disk_use()}, {format_bytes(free)} free, "
            f"{format_bytes(missing)} missing; {', or '.join([*advice, 'free that much'])}, or set MYLLM_DATA to a "
            "folder on a larger disk"
        )

    def _time_problem(self) -> str:
        limit, total, train = self.limits.max_hours, sum(self.seconds_left.values()), self.config.train
        if limit is None or total <= limit * 3_600:
            return ""
        steps = self.steps_done + int((train.max_steps - self.steps_done) * limit * 3_600 / total)
        fewer = f"lower train.max_steps from {train.max_steps:,} to {steps:,}, or " if steps else ""
        return (
            f"the run needs {total / 3_600:,.2f} more hours, but --max-hours is {limit:g}; {fewer}raise --max-hours to "
            f"{ceil(total / 36) / 100:,.2f}"
        )

    def _eval_problems(self, measured: Measurements) -> list[str]:
        problems = []
        for name, (_, error) in measured.evals.items():
            if error:
                setting = f"eval.{'sample' if name == 'samples' else name}_every_steps"
                problems.append(f"{error.partition(';')[0]}; lower train.micro_batch_size, or set {setting} to 0")
        return problems
