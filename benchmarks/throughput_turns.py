"""What throughput.py measures: whether the ways compute the same, then their turns."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from throughput_ways import Way, Weights, has_transformers, ours, peer, peer_model, reference, reference_model
from torch import Tensor, nn

from myllm.config import RunConfig
from myllm.data.tokenizer.load import load_tokenizer
from myllm.distributed import collectives as distributed
from myllm.distributed.collectives import DistContext
from myllm.distributed.precision import compute_dtype
from myllm.errors import UserError
from myllm.hub.architectures import select_architecture
from myllm.model.transformer import Transformer
from myllm.training.preflight.device_memory import peak_bytes, reset_peak
from myllm.training.preflight.scratch import random_dataset, scratch_folder

WARM_UP_STEPS = 3
LOSS_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
NORM_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Of the gradient norm. Relative, as the loss's are."""
START_TOLERANCE = 0.02
"""Of the first training step's loss: dropout is on, where a way has it."""
Figures = tuple[float, float]
"""Loss and gradient norm."""


@dataclass(frozen=True)
class Turn:
    """One way's turn, of the slowest rank."""

    tokens_per_s: float
    step_s: tuple[float, ...]
    wait_share: float
    """Of the turn that was spent waiting for batches."""
    host_s: float
    """Processor time of a step, of all of this process's threads: what other work on the machine disturbs least."""
    peak_bytes: int
    """Weights and moments, and the most that a step took beside them."""


@dataclass(frozen=True)
class Result:
    config: RunConfig
    ways: dict[str, str]
    """Each way's name and its batch, in words."""
    turns: dict[str, list[Turn]]
    agreement: dict[str, dict[str, Figures]]
    """By precision and way."""
    first_losses: dict[str, float]
    absent: str | None
    """Why transformers takes no part."""


def compare(config: RunConfig, process: DistContext, turns: int, steps: int, with_peer: bool, say: Callable) -> Result:
    """Check that the ways agree, then let them take turns.

    Raises:
        UserError: they do not agree.
    """
    absent = why_no_peer(config, with_peer)
    if absent:
        say(f"transformers takes no part: {absent}")
    agreement = check_agreement(config, process, absent is None)
    say(f"the ways agree: {describe(agreement)}")
    weights = Transformer(config.model, config.train.seed).state_dict()
    with scratch_folder(process) as folder, ExitStack() as stack:
        dataset = random_dataset(config, folder, load_tokenizer(config.data.tokenizer), process)
        ways = [ours(config, process, dataset, stack, say), reference(config, process, dataset, weights)]
        if not absent:
            ways.append(peer(config, process, dataset, weights, stack))
        first_losses = warmed_up(ways, process, say)
        taken: dict[str, list[Turn]] = {way.name: [] for way in ways}
        for number in range(turns):
            # Each way goes first in its turn, so that none always follows the same other.
            for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                taken[way.name].append(take_turn(way, steps, process))
            rates = ", ".join(f"{name} {each[-1].tokens_per_s:,.0f}" for name, each in taken.items())
            say(f"turn {number + 1} of {turns}, tokens/s: {rates}")
    return Result(config, {way.name: str(way.batch) for way in ways}, taken, agreement, first_losses, absent)


def why_no_peer(config: RunConfig, with_peer: bool) -> str | None:
    if not with_peer:
        return "not asked for"
    if not has_transformers():
        return "it is not installed"
    try:
        select_architecture(config.model)
    except UserError as error:
        return str(error).splitlines()[0]
    return None


# -- whether they compute the same ------------------------------------------------------------------------------------


def check_agreement(config: RunConfig, process: DistContext, with_peer: bool) -> dict[str, dict[str, Figures]]:
    """Loss and gradient norm of every way, with the same weights and batch, uncompiled and without dropout.

    Raises:
        UserError: one differs from ours.
    """
    weights = shaken(config)
    makers: dict[str, Callable[[], nn.Module]] = {
        "myllm": lambda: loaded(config, weights),
        "the reference's way": lambda: reference_model(config.model, weights),
    }
    if with_peer:
        makers["transformers"] = lambda: peer_model(config.model, weights)
    precisions = dict.fromkeys((torch.float32, compute_dtype(config.train.precision, process.device)))
    found: dict[torch.dtype, dict[str, Figures]] = {precision: {} for precision in precisions}
    for name, make in makers.items():
        model = make().to(process.device).eval()
        for precision in precisions:
            found[precision][name] = loss_and_norm(model, config, process, precision)
        del model  # before the next one is made
    for precision, figures in found.items():
        refuse_difference(figures, precision)
    return {str(precision).removeprefix("torch."): figures for precision, figures in found.items()}


def shaken(config: RunConfig) -> Weights:
    """Weights that no part is indifferent to: those of the start have norms of 1, biases of 0 and a loss of ln V."""
    weights, generator = Transformer(config.model).state_dict(), torch.Generator().manual_seed(config.train.seed)
    for name, tensor in weights.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 2:
            tensor.copy_(noise / tensor.shape[1] ** 0.5)
        else:
            tensor.copy_(0.3 * noise + (0 if name.endswith("bias") else 1))
    return weights


def loaded(config: RunConfig, weights: Weights) -> Transformer:
    model = Transformer(config.model)
    model.load_state_dict(weights)
    return model


def loss_and_norm(model: nn.Module, config: RunConfig, process: DistContext, precision: torch.dtype) -> Figures:
    generator = torch.Generator().manual_seed(config.train.seed)
    shape = (2, 1, config.model.max_seq_len)
    tokens, targets = torch.randint(config.model.vocab_size, shape, generator=generator).to(process.device).unbind()
    model.zero_grad()
    half = precision is not torch.float32
    scale = 2.0**12 if precision is torch.float16 else 1.0  # without one, float16 loses small gradients
    with exact_products() if not half else nullcontext():
        with torch.autocast(process.device.type, precision, enabled=half):
            given = model(tokens, targets)
        loss = given if isinstance(given, Tensor) else given[0]
        (loss * scale).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.nn.utils.get_total_norm(gradients).item() / scale


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 products without TF32's shortcuts."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def refuse_difference(figures: dict[str, Figures], precision: torch.dtype) -> None:
    """
    Raises:
        UserError: a way's loss or gradient norm is not ours.
    """
    loss, norm = figures["myllm"]
    for name, (other_loss, other_norm) in figures.items():
        near = abs(other_loss - loss) <= LOSS_TOLERANCE[precision] * abs(loss)
        if not (near and abs(other_norm - norm) <= NORM_TOLERANCE[precision] * norm):
            raise UserError(
                f"nothing was timed, since the ways do not compute the same in {precision}: with the same weights and "
                f"batch, loss and gradient norm are {loss:.6f} and {norm:.6f} for myllm, {other_loss:.6f} and "
                f"{other_norm:.6f} for {name}"
            )


def describe(agreement: dict[str, dict[str, Figures]]) -> str:
    """In one line."""
    return "; ".join(
        f"{precision} loss {', '.join(f'{loss:.6f}' for loss, _ in figures.values())} and gradient norm "
        f"{', '.join(f'{norm:.5f}' for _, norm in figures.values())} ({', '.join(figures)})"
        for precision, figures in agreement.items()
    )


# -- turns ------------------------------------------------------------------------------------------------------------


def warmed_up(ways: list[Way], process: DistContext, say: Callable) -> dict[str, float]:
    """Everything compiled and allocated; the loss of each way's first step, as it trains.

    Raises:
        UserError: a first loss is far from ours.
    """
    losses = {}
    for way in ways:
        started = time.perf_counter()
        losses[way.name] = distributed.broadcast_object(way.step().item())
        for _ in range(WARM_UP_STEPS):
            way.step()
        synchronize(process)
        say(f"{way.name}: warmed up in {time.perf_counter() - started:.1f} s, first loss {losses[way.name]:.4f}")
    mine = next(iter(losses.values()))
    for name, loss in losses.items():
        if not abs(loss - mine) <= START_TOLERANCE * mine:
            raise UserError(
                f"nothing was timed: the first training step's loss is {mine:.4f}, but {loss:.4f} for {name}"
            )
    return losses


def take_turn(way: Way, steps: int, process: DistContext) -> Turn:
    reset_peak(process.device)
    before = peak_bytes(process.device)
    way.step()  # fills the caches that the other ways left to theirs
    synchronize(process)
    distributed.barrier()
    waited, host, started, marks = way.wait_s(), time.process_time(), time.perf_counter(), [mark(process)]
    for _ in range(steps):
        way.step()
        marks.append(mark(process))
    synchronize(process)
    elapsed = time.perf_counter() - started
    wait_share, host_s = (way.wait_s() - waited) / elapsed, (time.process_time() - host) / steps
    peak = way.held_bytes + peak_bytes(process.device) - before
    ranks = distributed.all_gather_object((elapsed, between(marks), wait_share, host_s, peak))
    elapsed, step_s, wait_share, host_s, _ = max(ranks)
    return Turn(steps * way.batch.batch_tokens / elapsed, step_s, wait_share, host_s, max(rank[-1] for rank in ranks))


def mark(process: DistContext) -> float | torch.cuda.Event:
    """A moment: on CUDA one of the device's, so that steps are told apart without waiting for any."""
    if process.device.type != "cuda":
        synchronize(process)
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(marks: list) -> tuple[float, ...]:
    """Seconds from each mark to the next, once all are past."""
    pairs = itertools.pairwise(marks)
    return tuple(b - a if isinstance(a, float) else a.elapsed_time(b) / 1_000 for a, b in pairs)


def synchronize(process: DistContext) -> None:
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)
    elif process.device.type == "mps":
        torch.mps.synchronize()
